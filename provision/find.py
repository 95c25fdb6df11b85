"""Finding a machine again after its reboot: by the host key that we made there, wherever it answers.

A DHCP server often gives the installed system another address than the ISO had. So where the old address stays
silent, the machine is looked for at the machine file's, under its name (mDNS, DNS), where this computer's neighbour
table has its MAC, and, if that is allowed, in the subnet. Found means: that key, a new boot id, / on its disk.
"""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from provision.dial import Wanted
from provision.errors import Locked, ProvisionError, UnknownKey
from provision.host import Host, Progress, say_nothing
from provision.machine import Machine, at_address
from provision.nearby import Network, elsewhere, load_interfaces, pinned_keys, subnet, sweep
from provision.person import Ask, ask_nobody
from provision.secrets import reveal
from provision.unlock import Opener

ELSEWHERE_AFTER_S = 30.0  # of silence at the old address, before others are tried
ELSEWHERE_TIMEOUT_S = 3.0
SEEN_TIMEOUT_S = 15.0  # where its key was seen: a machine that boots is slow
SWEEP_AFTER_S = 180.0  # most machines are back by then
SWEEP_EVERY_S = 60.0
ANSWER_S = 60.0  # for a person; the machine is not looked for meanwhile
BOOT_S = 900.0  # firmware of large boards trains memory for minutes

# As root: without udev's records only root may read a partition's id off the disk.
LOOK = r"""
cat /proc/sys/kernel/random/boot_id
source=$(findmnt --nofsroot --noheadings --output SOURCE / || true)
echo "$source"
lsblk --inverse --noheadings --raw --output PARTUUID "$source" 2> /dev/null | xargs || true
lsblk --inverse --noheadings --paths --output TYPE,NAME,SERIAL "$source" 2> /dev/null | awk '$1 == "disk" {print $2, $3}' | xargs || true
"""


@dataclass(frozen=True)
class Search:
    """Where a machine is looked for once its address stays silent, and who may be asked.

    `places` gives addresses. `network` is the subnet that may be swept: unasked where `unasked`, else after a yes.
    """

    places: Callable[[], Iterable[str]] = tuple
    network: Network | None = None
    unasked: bool = False
    ask: Ask = ask_nobody
    elsewhere_after_s: float = ELSEWHERE_AFTER_S
    sweep_after_s: float = SWEEP_AFTER_S
    sweep_every_s: float = SWEEP_EVERY_S


def search_from(machine: Machine, host: Host, macs: Collection[str], ask: Ask, *, unasked: bool) -> Search:
    """Where to look for a machine that answers at the address of `host` now."""
    own = machine.ssh.address or machine.name
    return Search(
        places=lambda: [place for place in (host.peer, *elsewhere(machine, macs)) if place not in ("", own)],
        network=subnet(host.peer, load_interfaces()),
        unasked=unasked,
        ask=ask,
    )


@dataclass(frozen=True)
class Look:
    """What one attempt saw: the machine itself, or why not. `final`: waiting longer will not help.

    `ours`: the key that answered is one of the machine's.
    """

    host: Host | None = None
    seen: str = ""
    final: ProvisionError | None = None
    ours: bool = False


@dataclass
class Finder:
    """One search for one machine. `roots`: PARTUUIDs that / must lie on one of; empty where any will do."""

    wanted: Wanted
    old_boot_id: str
    roots: Collection[str]
    opener: Opener | None
    search: Search
    say: Progress
    may_sweep: bool | None = None  # None: nobody was asked yet
    swept_at: float = 0.0
    seen_at: list[str] = field(default_factory=list)  # where it answered, and was not ready yet
    seen_when: float = float("-inf")
    started: float = field(default_factory=time.monotonic)
    told: dict[str, str] = field(default_factory=dict)  # what was last said of a place

    @property
    def name(self) -> str:
        return self.wanted.machine.name

    def look(self, address: str = "", timeout_s: float = ELSEWHERE_TIMEOUT_S) -> Look:
        """One attempt at one address, "" being the machine's own. The system before the reboot may still answer."""
        wanted = self.wanted
        if address:
            wanted = replace(wanted, machine=at_address(wanted.machine, address), timeout_s=timeout_s)
        try:
            host = Host(wanted, progress=self.say)
        except Locked as error:
            return self.open(wanted, error)
        except UnknownKey as error:
            message = f"After the reboot, {error.message}\nExpected the key of the installed system."
            return Look(seen=error.message, final=ProvisionError(message, boot_order(self.name)))
        except ProvisionError as error:
            return Look(seen=error.message)
        new, source, ids, disks = ask_where(host)
        restarted = new not in ("", self.old_boot_id)
        if restarted and host.system == "installed":
            if not self.roots or set(ids.lower().split()) & set(self.roots):
                return Look(host)
            final = ProvisionError(
                f"{self.name} restarted, but / is on {source}{f' ({disks})' if disks else ''}, and not on the disk with "
                f"serial {self.wanted.machine.disk.serial} that was installed.",
                boot_order(self.name),
            )
            host.close()
            return Look(final=final, ours=True)
        host.close()
        if restarted:
            again = ProvisionError(f"{self.name} restarted and is on the ISO again.", boot_order(self.name))
            return Look(final=again, ours=True)
        return Look(
            seen=f"{self.name} has not gone down yet" if new else f"{self.name} is going down", ours=True
        )

    def open(self, wanted: Wanted, locked: Locked) -> Look:
        """It waits for the passphrase of its disk."""
        if self.opener is None:
            return Look(final=locked, ours=True)
        try:
            return Look(seen=self.opener.open(wanted), ours=True)
        except ProvisionError as error:
            return Look(final=error, ours=True)

    def tell(self, place: str, text: str) -> None:
        """Say what is seen there, when it changes."""
        if self.told.get(place) != text:
            self.told[place] = text
            self.say(f"{time.monotonic() - self.started:.0f} s: {text}")

    def find(self, deadline_s: float, poll_s: float) -> Host:
        """Look until it is found; ProvisionError at the deadline, or where waiting longer will not help."""
        while True:
            here = self.look()
            if here.host:
                return here.host
            waited = time.monotonic() - self.started
            if not here.ours and (here.final or waited > self.search.elsewhere_after_s):
                if host := self.look_at(self.search.places()):
                    return host
                if not here.final and self.may_look_around(waited) and (host := self.look_around()):
                    return host
            if here.final:
                raise here.final
            self.tell("", here.seen)
            if waited > deadline_s:
                before = self.seen_when
                if not here.ours and (host := self.ask_address()):
                    return host
                if self.seen_when == before:
                    raise self.not_found(waited, here.seen)
                deadline_s = waited + BOOT_S  # a person told where it is, and there it boots on
            time.sleep(poll_s)

    def look_at(self, places: Iterable[str]) -> Host | None:
        """At other addresses. Who answers there with a key that is not the machine's is somebody else."""
        for place in dict.fromkeys([*self.seen_at, *places]):
            there = self.look(place, SEEN_TIMEOUT_S if place in self.seen_at else ELSEWHERE_TIMEOUT_S)
            if there.host:
                return there.host
            if there.ours and there.final:
                raise there.final
            if there.ours:
                self.note(place, there)
        return None

    def note(self, place: str, there: Look) -> None:
        """It answers there, and is not ready yet."""
        self.tell(place, f"{place}: {there.seen}")
        self.seen_at, self.seen_when = [place], time.monotonic()

    def seen_lately(self) -> bool:
        return time.monotonic() - self.seen_when < self.search.sweep_every_s

    def may_look_around(self, waited: float) -> bool:
        """Not as long as it may just be slow, nor when it was seen on its way back a moment ago."""
        search = self.search
        slow_s = search.elsewhere_after_s if search.unasked else search.sweep_after_s
        return waited > slow_s and not self.seen_lately()

    def look_around(self) -> Host | None:
        """In the subnet, if that is allowed. Only where the key is the machine's is anybody logged in to."""
        network = self.search.network
        if network is None:
            return None
        first, found = self.may_sweep is None, []
        if self.may_sweep is None:
            what = f"{network.num_addresses} addresses of {network} for the host key of {self.name}, without logging in"
            self.may_sweep = self.search.unasked or (
                self.search.ask(f"Look at the {what}? [yes/no] ", ANSWER_S).lower() == "yes"
            )
        if self.may_sweep and (first or time.monotonic() - self.swept_at > self.search.sweep_every_s):
            self.tell(str(network), f"looking for its key in {network}")
            machine = self.wanted.machine
            keys = pinned_keys(machine, self.wanted.pins)
            found = self.seen_at = sweep(network, machine.ssh.port, keys)
            self.swept_at = time.monotonic()
            if host := self.look_at(()):
                return host
        return self.ask_address() if first and not found else None

    def ask_address(self) -> Host | None:
        """A person's answer, "" to go on waiting."""
        question = f"{self.name} is not found. Its address, as its console shows it (empty: none): "
        while address := self.search.ask(question, ANSWER_S):
            try:
                there = self.look(address)
            except ProvisionError as error:  # not an address
                there = Look(seen=error.message)
            if there.host:
                return there.host
            if there.ours and there.final:
                raise there.final
            if there.ours:
                self.note(address, there)
                return None
            question = f"{there.seen}\nIts address (empty: none): "
        return None

    def not_found(self, waited: float, seen: str) -> ProvisionError:
        sweep_too = ""
        if self.search.network is not None and not self.may_sweep:
            sweep_too = f"To look for its key in all of {self.search.network} too: --sweep\n"
        return ProvisionError(
            f"Waited {waited:.0f} s for {self.name} to come up; last seen: {seen}",
            f"Its console shows its address; if that is a new one: fab -H {self.name} provision --address NEW\n"
            f"{sweep_too}If it is the same, when it is up: fab -H {self.name} provision",
        )


def reconnect_after_reboot(
    machine: Machine,
    pins: Path,
    old_boot_id: str,
    *,
    deadline_s: float,
    roots: Collection[str] = (),
    opener: Opener | None = None,
    search: Search | None = None,
    key_files: Sequence[str] = (),
    on_wait: Progress = say_nothing,
    timeout_s: float = 5,
    poll_s: float = 2,
) -> Host:
    """Wait for the installed system, known by the key pinned as NAME, by a new boot id and by what / is on.

    Where it waits for the passphrase of its disk, `opener` gives it. Raises ProvisionError when the ISO comes up
    again, or another disk, at once; at the deadline, with what was seen last.
    """
    wanted = Wanted(machine, pins, "", "", tuple(key_files), None, timeout_s)
    finder = Finder(wanted, old_boot_id, roots, opener, search or Search(), on_wait)
    return finder.find(deadline_s, poll_s)


def opener_for(machine: Machine) -> Opener | None:
    """What opens its disk at boot, where we do that. Looks the passphrase up now: before a reboot, not after it."""
    if machine.disk.unlock != "ssh":
        return None
    passphrase = passphrase_of(machine)
    return Opener(lambda: passphrase)


def passphrase_of(machine: Machine) -> str:
    if not machine.disk.passphrase:
        raise Locked(
            f"{machine.name} waits for the passphrase of its disk, and disk.passphrase says no passphrase.",
            "Put a reference to it into the machine file, or type it on the machine's console.",
        )
    return reveal(machine.disk.passphrase)


def tell_on(console: Console, status: Status) -> Progress:
    """What is seen meanwhile: in the spinner's line; where there is no terminal, in the log."""

    def tell(text: str) -> None:
        status.update(escape(text))
        if not console.is_terminal:
            console.print(f"  {escape(text)}", highlight=False, soft_wrap=True)

    return tell


def unlock_machine(machine: Machine, pins: Path, key_files: Sequence[str], console: Console) -> Host:
    """Wait until a machine runs that was switched on, and give it the passphrase of its disk where it waits for it."""
    opener = Opener(lambda: passphrase_of(machine))
    with console.status("waiting for the machine") as status:
        host = reconnect_after_reboot(
            machine,
            pins,
            "",
            deadline_s=BOOT_S,
            opener=opener,
            search=Search(lambda: elsewhere(machine, ())),
            key_files=key_files,
            on_wait=tell_on(console, status),
        )
    if opener.tries:
        console.print(f"Its disk is open, and {machine.name} runs.")
    return host


def ask_where(host: Host) -> tuple[str, str, str, str]:
    """Boot id, what / is mounted from, the ids of the partitions under it, their disks; "" where the host goes down."""
    try:
        lines = host.run(LOOK).stdout.splitlines()
    except ProvisionError:
        lines = []
    boot_id, source, ids, disks = (line.strip() for line in [*lines, "", "", "", ""][:4])
    return boot_id, source, ids, disks


def boot_order(name: str) -> str:
    return (
        "Take the install medium out, or put the disk first in the firmware's boot order, and restart. Then:\n"
        f"  fab -H {name} provision"
    )
