"""Probe, plan, apply, and probe again: the only module between the pure planners and the host."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from provision.drift import Extras, parse_extras, render_look
from provision.errors import ProvisionError
from provision.facts import PROBE, Facts, parse_facts
from provision.host import Host
from provision.machine import Machine
from provision.secrets import Prompt, ask_person, reveal
from provision.steps import (
    SECRETS,
    Plan,
    Step,
    make_plan,
    parse_probes,
    render_apply,
    render_probes,
    secret_file,
)
from provision.system import system
from provision.system.crypt import UNLOCK_KEY
from provision.system.layout import MOUNT, layout
from provision.system.network import HOST_KEY

UNIT = "metal-apply"
PROBE_DEADLINE_S = 120
APPLY_DEADLINE_S = 4 * 3600  # a full install over a slow mirror


def gather_facts(host: Host) -> Facts:
    """One exec: what the host is and has."""
    return parse_facts(host.look(PROBE, deadline_s=PROBE_DEADLINE_S).stdout)


def plan_for(machine: Machine, facts: Facts, host: Host) -> Plan:
    """One exec for all Steps' probes; changes nothing."""
    steps = system(machine, facts, now_s=int(time.time()))
    live = facts.system == "live"
    root, mounts = (MOUNT, layout(machine).probe_mounts) if live else ("", ())
    title = f"{machine.name}, {'live ISO' if live else 'installed system'} at {host.address}"
    return probe(title, steps, host, root, mounts)


def probe(
    title: str, steps: Sequence[Step], host: Host, root: str = "", mounts: Sequence[tuple[str, str, str]] = ()
) -> Plan:
    """One exec: those of the Steps that are to be done."""
    answer = host.look(render_probes(steps, root, mounts), deadline_s=PROBE_DEADLINE_S).stdout
    return make_plan(title, steps, parse_probes(steps, answer))


def wanted_packages(machine: Machine, facts: Facts) -> tuple[str, ...]:
    """Of Arch's repositories, as the planners name them. Refuses a machine that they refuse."""
    steps = system(machine, facts, now_s=int(time.time()))
    return tuple(name for step in steps for name in step.packages)


def look_for_extras(machine: Machine, facts: Facts, host: Host) -> Extras:
    """One exec: what an installed machine has and its file does not name; changes nothing."""
    steps = system(machine, facts, now_s=int(time.time()))
    answer = host.look(render_look(machine, facts, steps), deadline_s=PROBE_DEADLINE_S).stdout
    return parse_extras(machine, facts, steps, answer)


@dataclass
class Progress:
    """Turns the lines of a running apply into events, and keeps what a failure needs.

    ``begin(name)``, ``output(line)`` and ``end(name, seconds)`` are told as they happen.
    """

    begin: Callable[[str], None]
    output: Callable[[str], None]
    end: Callable[[str, float], None]
    log: Path
    current: str = ""
    failed: str = ""
    since: float = 0.0
    tail: list[str] = field(default_factory=list)

    def line(self, text: str) -> None:
        with self.log.open("a") as log:
            log.write(text + "\n")
        marker, _, rest = text.partition(" ")
        if marker == "@@begin":
            self.current, self.since, self.tail = rest.partition(" ")[2], time.monotonic(), []
            self.begin(self.current)
        elif marker == "@@end":
            self.end(self.current, time.monotonic() - self.since)
        elif marker == "@@failed":
            self.failed = self.current
        elif text.strip():
            self.tail = [*self.tail[-19:], text.rstrip()]
            self.output(text.rstrip())


def apply(
    plan: Plan,
    machine: Machine,
    host: Host,
    progress: Progress,
    prompt: Prompt = ask_person,
    *,
    task: str = "provision",
) -> None:
    """Do the plan's Steps on the host, in a unit that survives the connection; ProvisionError names the Step that failed.

    `prompt` asks a person for a secret that a Step needs and that is `prompt:TEXT`; `task` is what goes on after a failure.
    """
    send_secrets(plan, host, prompt)
    root = MOUNT if host.system == "live" else ""
    code = host.run_unit(UNIT, render_apply(plan, root), on_line=progress.line, deadline_s=APPLY_DEADLINE_S)
    if code:
        raise ProvisionError(
            f"Step '{progress.failed or progress.current}' failed with exit {code}:\n"
            + "\n".join(f"  {line}" for line in progress.tail),
            f"Whole output: {progress.log}\nWhen the cause is mended, this goes on from there: fab -H {machine.name} {task}",
        )


def send_secrets(plan: Plan, host: Host, prompt: Prompt) -> None:
    """What Steps of the plan need to know, each in a file for root in memory; `render_apply` has them removed at its end.

    All are looked up before anything is sent: what is missing must not stop an installation half-way.
    """
    wanted = {planned.step.secret for planned in plan.pending if planned.step.secret}
    for secret, text in [(secret, reveal(secret, prompt)) for secret in wanted]:
        host.run(
            f"umask 077\ninstall -d -m 711 {SECRETS.rpartition('/')[0]}\nmkdir -p {SECRETS}\ncat > {secret_file(secret)}",
            stdin=text.encode(),
        )


def follow_earlier(host: Host, progress: Progress) -> None:
    """Wait for the Steps that an earlier, interrupted run left at work on the host. How they ended shows in the next probe."""
    host.run_unit(UNIT, "true", on_line=progress.line, deadline_s=APPLY_DEADLINE_S)


def demand_empty(plan: Plan) -> None:
    """The second probe: what was applied must now be found done."""
    if plan:
        names = "\n".join(
            f"  {planned.step.name}: observed {planned.observed.strip()!r}" for planned in plan.pending
        )
        raise ProvisionError(
            f"After all Steps ran, {len(plan.pending)} of them are not as they should be:\n{names}",
            "This is a defect of those Steps or of the host; nothing was claimed done that is not.",
        )


def read_host_key(host: Host) -> str:
    """The public half of the key that the new system will present."""
    return host.look(f"cat {MOUNT}{HOST_KEY}.pub").stdout.strip()


def read_unlock_key(host: Host) -> str:
    """The public half of the key that the initramfs will present, where it has an sshd."""
    return host.look(f"cat {MOUNT}{UNLOCK_KEY}.pub").stdout.strip()


def unmount_target(host: Host) -> None:
    """Leave the new system complete on its disk."""
    # Lazily where something (pacman's gpg-agent, for one) still holds it: after the sync nothing can be lost.
    host.run(f"sync\numount --recursive {MOUNT} || umount --recursive --lazy {MOUNT}\nsync", deadline_s=120)


def reboot(host: Host) -> None:
    """In a second, so that this answer still arrives."""
    host.run("systemd-run --quiet --on-active=1 systemctl reboot", deadline_s=30)
