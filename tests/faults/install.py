"""One installation of a rehearsed machine, cut where it was planned, and gone on with until it is done."""

import math
import os
import queue
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from provision.errors import ProvisionError
from provision.pins import fingerprint_of, parse_key
from provision.rehearsal import tools
from provision.rehearsal.bed import NAME, Bed
from provision.rehearsal.loop import Rehearsal, fab_command
from provision.rehearsal.vm import Vm, says_ssh, wait_until
from tests.faults.compare import COLLECT, parse_state
from tests.faults.cuts import Cut, Hit, Stage
from tests.faults.watch import Frozen, Watch
from tests.sshd import Proxy

Say = Callable[[str], None]

SECRET_VARIABLE = "METAL_FAULTS_PASSWORD"
RUN_DEADLINE_S = 1800  # of one `fab provision`
ENGAGED_S = 120  # until a `fab` that was started has looked at the machine
BACK_S = 90  # until a lost connection stands again: it is dialled every 15 s at the latest
COLLECT_DEADLINE_S = 600

# Spoiled in the new system before its stage begins: else it would find all but its packages done, and no Step of
# these kinds could be cut there. Step → what spoils it.
SPOILED = {
    "file /etc/hosts": "rm /etc/hosts",
    "file /etc/locale.conf": "chmod 600 /etc/locale.conf",
    "link /etc/localtime": "rm /etc/localtime",
    "unit systemd-timesyncd.service": "systemctl --quiet disable --now systemd-timesyncd.service",
    "directory /home/ml": "chmod 755 /home/ml",
    "file /etc/systemd/resolved.conf.d/10-mdns.conf": "echo >> /etc/systemd/resolved.conf.d/10-mdns.conf",
    "file /etc/vconsole.conf": "chown ml /etc/vconsole.conf",
    "file /boot/loader/loader.conf": "rm /boot/loader/loader.conf",
}
DONE = re.compile(r"^\s*done\s+([\d.]+) s  (.*)")


@dataclass
class Outcome:
    """What became of an installation."""

    hits: list[Hit] = field(default_factory=list)
    runs: int = 0  # of `fab provision`
    boots: int = 0
    seconds: float = 0.0
    state: dict[str, dict[str, str]] = field(default_factory=dict)
    steps: dict[Stage, dict[str, float]] = field(default_factory=lambda: {"live": {}, "installed": {}})
    leaks: list[str] = field(default_factory=list)  # where the password was found
    samples: int = 0  # of the process list, searched for it


@dataclass(frozen=True)
class Line:
    """A line of output of a `fab`; None where it ended."""

    fab: "Fab"
    text: str | None


class Fab:
    """A `fab provision` at work. What it prints goes to a file and to `events`."""

    def __init__(
        self, argv: Sequence[str], environment: dict[str, str], log: Path, events: "queue.Queue[object]"
    ) -> None:
        self.engaged = False
        self.lines: list[str] = []
        self.events = events
        self.log = log
        self.process = subprocess.Popen(
            tools.bound(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
            text=True,
            errors="replace",
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as output, self.log.open("a", buffering=1) as log:
            for line in output:
                log.write(line)
                self.lines.append(line.rstrip("\n"))
                self.events.put(Line(self, line.rstrip("\n")))
        self.process.wait()
        self.events.put(Line(self, None))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Install:
    """A machine on its way through `cuts`; `until_done` makes them and returns when `fab provision` has succeeded.

    It needs an entered Bed and a machine that is off. The password is set, so that a secret is on the way too.
    After `cutting_s` no more cuts are made, and the installation goes on to its end.
    """

    def __init__(
        self, bed: Bed, vm: Vm, cuts: Sequence[Cut], secret: str, say: Say, *, cutting_s: float = math.inf
    ) -> None:
        self.bed, self.vm, self.cuts, self.secret, self.say = bed, vm, list(cuts), secret, say
        self.rehearsal = Rehearsal(bed, vm, Console(width=160, quiet=True))
        self.events: queue.Queue[object] = queue.Queue()
        self.watches: list[Watch] = []
        self.outcome = Outcome()
        self.stage: Stage = "live"
        self.stopped = False
        self.cutting_until = time.monotonic() + cutting_s

    @contextmanager
    def machine(self) -> Iterator[None]:
        """In the live system, reached through a relay; off at the end."""
        self.rehearsal.boot(cold=False)
        self.outcome.boots += 1
        self.proxy = Proxy(self.vm.ssh_port)
        self.redirect()
        try:
            yield
        finally:
            for watch in self.watches:
                watch.close()
            self.proxy.close()
            self.vm.kill()

    def redirect(self) -> None:
        """The machine file leads to the relay and names the password."""
        path = self.rehearsal.machines / f"{NAME}.local.toml"
        text = path.read_text().replace(f"port = {self.vm.ssh_port}", f"port = {self.proxy.port}")
        path.write_text(text.replace("[user]\n", f'[user]\npassword = "env:{SECRET_VARIABLE}"\n', 1))

    @property
    def cuts_to_make(self) -> list[Cut]:
        return self.cuts if time.monotonic() < self.cutting_until else []

    @property
    def environment(self) -> dict[str, str]:
        return {**self.rehearsal.environment, SECRET_VARIABLE: self.secret}

    def until_done(self) -> Outcome:
        began = time.monotonic()
        self.arm()
        fab: Fab | None = self.start()
        while fab:
            fab = self.next(fab)
        self.outcome.seconds = time.monotonic() - began
        return self.outcome

    def start(self) -> Fab:
        self.outcome.runs += 1
        fingerprint = fingerprint_of(parse_key(self.bed.parts.keys.host_line))
        self.rehearsal.logs.mkdir(exist_ok=True)
        log = self.rehearsal.logs / "provision.log"
        with log.open("a") as file:
            file.write(f"$ fab -H {NAME} provision    (run {self.outcome.runs})\n")
        return Fab(fab_command("provision", "--fingerprint", fingerprint), self.environment, log, self.events)

    def next(self, fab: Fab) -> Fab | None:
        """Wait for something to happen and deal with it; the `fab` that is at work then, None at the end."""
        event = self.wait(RUN_DEADLINE_S, f"`fab provision` to go on after: {' / '.join(fab.lines[-3:])}")
        if isinstance(event, Line) and event.fab is fab:
            if event.text is None:
                return self.ended(fab)
            return self.heard(fab, event.text)
        elif isinstance(event, Frozen) and event.watch is self.watches[-1]:
            return self.frozen(fab, event)
        return fab

    def wait(self, deadline_s: float, what: str) -> object:
        until = time.monotonic() + deadline_s
        while True:
            try:
                return self.events.get(timeout=0.5)
            except queue.Empty:
                self.vm.check()
                if time.monotonic() > until:
                    raise ProvisionError(f"Waited {deadline_s:.0f} s in vain for {what}.") from None

    def heard(self, fab: Fab, text: str) -> Fab:
        """Deal with a line that `fab` printed; the `fab` that is at work then."""
        if "following it to its end" in text or "Steps to do" in text or "nothing to do" in text:
            fab.engaged = True
        if found := DONE.match(text):
            steps = self.outcome.steps[self.stage]
            steps[found[2]] = max(steps.get(found[2], 0.0), float(found[1]))
        for cut in self.cuts_to_make:
            if cut.line and cut.stage == self.stage and text.startswith(cut.line):
                return self.at_moment(fab, cut)
        if text.startswith("Rebooting."):
            # Nobody reaches the new system before it is watched; what is connected still says its last words.
            self.proxy.accepting = False
            self.arrive()
            self.proxy.accepting = True
        return fab

    def arrive(self) -> None:
        """In the installed system, after its boot."""
        spoil = self.stage == "live"
        self.stage = "installed"
        self.wait_for_installed()
        self.outcome.boots += 1
        self.say("  installed system")
        if spoil:
            self.inside("\n".join(["set -e", *SPOILED.values()]))
        self.arm()

    def at_moment(self, fab: Fab, cut: Cut) -> Fab:
        """Cut where no Step is at work; the same command again."""
        if cut.kind == "power":
            self.vm.kill()
        fab.kill()
        self.cuts.remove(cut)
        self.outcome.hits.append(Hit(cut, cut.aim))
        self.say(f"  {cut.kind:10} cut {cut.aim}")
        if cut.kind == "power":
            self.proxy.cut()
            self.watches[-1].close()
            self.rehearsal.boot_again()
            self.redirect()
            if self.pinned and self.stage == "live":
                self.arrive()
            else:
                self.outcome.boots += 1
                self.arm()
        elif cut.line == "Rebooting.":
            self.pause(15)  # whether the host was told in time, its going down tells
            if self.watches[-1].lost:
                self.arrive()
        return self.start()

    @property
    def pinned(self) -> bool:
        """Whether this computer knows the installed system's key."""
        path = self.rehearsal.machines / "known_hosts"
        return path.exists() and any(line.startswith(f"{NAME} ") for line in path.read_text().splitlines())

    def ended(self, fab: Fab) -> Fab | None:
        if fab.process.returncode == 0:
            return None
        said = "\n".join(fab.lines[-12:])
        if fab is self.bereaved:
            if "ended without an exit status" not in said:
                raise ProvisionError(f"After the power cut, `fab` said something else:\n{said}")
            return self.start()
        raise ProvisionError(
            f"`fab provision` ended with status {fab.process.returncode}:\n{said}", f"All of it: {fab.log}"
        )

    bereaved: Fab | None = None  # sees its machine's power go, and is left alone with that

    def frozen(self, fab: Fab, event: Frozen) -> Fab | None:
        """The machine stands still in a Step: the cut."""
        due = [cut for cut in self.cuts_to_make if cut.stage == self.stage and cut.step == event.wanted]
        if not due:  # the time for cuts is over
            event.watch.go_on()
            return fab
        cut = due[0]
        self.cuts.remove(cut)
        if cut.kind == "stop":
            fab.kill()
            self.stopped = True
            return None
        if cut.kind == "power":
            self.vm.kill()
        hit = Hit(cut, event.during, event.ended)
        self.outcome.hits.append(hit)
        where = f"in '{event.during}'" if event.during else f"after Step {event.ended}, aimed at '{cut.step}'"
        self.say(f"  {cut.kind:10} cut {where}")
        return {"power": self.after_power, "connection": self.connection, "process": self.process}[cut.kind](
            fab, event, cut
        )

    def after_power(self, fab: Fab, event: Frozen, cut: Cut) -> Fab:
        """Boot it again, and the same command again. The first `fab` of a stage is left to find out by itself."""
        patient = (
            sum(hit.cut.kind == "power" and hit.cut.stage == cut.stage for hit in self.outcome.hits) == 1
        )
        self.proxy.cut(accept=False)
        if not patient:
            fab.kill()
        event.watch.close()
        self.rehearsal.boot_again()
        self.redirect()
        self.outcome.boots += 1
        self.arm()
        self.proxy.mend()
        if patient:
            self.bereaved = fab
            return fab
        return self.start()

    def connection(self, fab: Fab, event: Frozen, cut: Cut) -> Fab:
        """Away for less than a minute, while the machine goes on; `fab` comes back to it by itself."""
        self.engage(fab)
        if cut.drop == "swallow":
            self.proxy.swallow()
        else:
            self.proxy.cut(accept=False)
        event.watch.go_on()
        self.pause(cut.drop_s)
        if cut.drop == "swallow":
            self.proxy.cut(accept=False)
        accepted = self.proxy.accepted
        self.proxy.mend()
        wait_until(
            lambda: self.proxy.accepted > accepted or fab.process.poll() is not None,
            self.vm.check,
            BACK_S,
            "fab to dial again",
        )
        self.pause(2.5)  # for login
        return fab

    def process(self, fab: Fab, event: Frozen, cut: Cut) -> Fab:
        """kill -9, and the same command again: it must have looked at the machine before the next such cut."""
        self.engage(fab)
        fab.kill()
        again = self.start()
        event.watch.go_on()
        return again

    def engage(self, fab: Fab) -> None:
        """Let a `fab` get as far as looking at the machine; what it says meanwhile is dealt with."""
        until = time.monotonic() + ENGAGED_S
        while not fab.engaged and fab.process.poll() is None:
            event = self.wait(until - time.monotonic(), "`fab` to look at the machine")
            if isinstance(event, Line) and event.fab is fab and event.text is not None:
                self.heard(fab, event.text)  # no moment to cut at: the machine stands still

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)
        self.vm.check()

    # The machine from inside, past the relay

    def ssh(self) -> list[str]:
        """argv of OpenSSH into the system that the host is in, as root or as one who may sudo."""
        live = self.bed.ssh_command(self.vm.ssh_port)
        if self.stage == "live":
            return live
        pins = self.rehearsal.machines / "known_hosts"
        known = ["-o", f"UserKnownHostsFile={pins}", "-o", f"HostKeyAlias={NAME}"]
        options = ["-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"]
        options += ["-o", "ConnectTimeout=20", "-o", "LogLevel=ERROR", "-p", str(self.vm.ssh_port)]
        return [
            "ssh",
            "-F",
            "none",
            "-i",
            str(self.bed.parts.keys.identity),
            *known,
            *options,
            "ml@127.0.0.1",
        ]

    def inside(self, script: str, *, deadline_s: float = 60, stdin: str = "") -> str:
        """A bash script as root of the machine; its output. What it reads on stdin is in no argument."""
        command = f"bash --norc --noprofile -c {shlex.quote(script)}"
        if self.stage == "installed":
            command = f"sudo -n {command}"
        done = subprocess.run(
            [*self.ssh(), command],
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline_s,
            check=False,
        )
        if done.returncode:
            raise ProvisionError(
                f"In the machine, status {done.returncode}: {done.stdout[-2000:]}{done.stderr}"
            )
        return done.stdout

    def wait_for_installed(self) -> None:
        """Until the installed system lets us in: before, the live system may still answer, with another key."""

        def answers() -> bool:
            if not says_ssh(self.vm.ssh_address, self.vm.ssh_port):
                return False
            done = subprocess.run([*self.ssh(), "true"], capture_output=True, check=False)
            return done.returncode == 0

        wait_until(answers, self.vm.check, 400, "the installed system's sshd")

    def arm(self) -> None:
        """Watch for the Steps of this stage that are still to be cut."""
        wanted: dict[str, list[float]] = {}
        for cut in self.cuts_to_make:
            if cut.stage == self.stage and cut.step:
                wanted.setdefault(cut.step, []).append(cut.after_s)
        watch = Watch(self.ssh(), wanted, self.events)
        self.watches.append(watch)
        wait_until(lambda: watch.ready.is_set() or watch.lost, self.vm.check, 60, "the watcher")
        if watch.lost:
            raise ProvisionError("The watcher inside the machine did not start.")

    def collect(self) -> dict[str, dict[str, str]]:
        self.outcome.state = parse_state(self.inside(COLLECT, deadline_s=COLLECT_DEADLINE_S))
        return self.outcome.state
