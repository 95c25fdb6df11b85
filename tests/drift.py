"""Fifty changes to what a machine file manages, drawn by chance: are all of them shown by `plan`, and mended?

    python -m tests.drift NAME          an installed machine, whose file is in METAL_MACHINES

For as long as it runs, NAME.local.toml asks for things to harm (`WISHES`), which are taken away again at the end. Some
of what the system itself needs is harmed too, nothing by which one could be locked out. tests/rehearsal/test_drift.py
does the same in a throwaway root; here it is `fab plan` and `fab provision` as a person types them, on a running system.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from provision.host import connect
from provision.machine import load_machine, machines_folder

FAB = Path(sys.executable).with_name("fab")
PROJECT = Path(__file__).resolve().parent.parent
DEADLINE_S = 3600  # of one command, on an emulated machine

PACKAGES = ("htop", "nano", "tmux", "zsh")
# Of a network namespace each, so that a root without a kernel of its own can have them too.
SYSCTL = {
    "net.core.somaxconn": "4000",
    "net.ipv4.ip_default_ttl": "66",
    "net.ipv4.tcp_fin_timeout": "55",
    "net.ipv4.tcp_keepalive_time": "7100",
}
UNITS = {**{f"drift{n}.service": "enabled" for n in range(4)}, "drift4.service": "disabled", "drift5.service": "masked"}  # fmt: skip
WISHES = (
    f"\n[packages]\ndrift = {json.dumps(PACKAGES)}\n"
    + "".join(f'[files."/etc/drift/file{n}"]\ntext = "one\\ntwo {n}\\n"\nmode = "640"\n' for n in range(10))
    # Not in /etc/systemd/system: a unit that lies there cannot be masked.
    + "".join(
        f'[files."/usr/local/lib/systemd/system/{name}"]\n'
        'text = "[Service]\\nExecStart=/usr/bin/sleep infinity\\n[Install]\\nWantedBy=multi-user.target\\n"\n'
        for name in UNITS
    )
    + "".join(f'[folders."/srv/drift{n}"]\nmode = "750"\n' for n in range(8))
    + "".join(
        f'[lines.drift{n}]\nfile = "/etc/drift/lines{n}"\nline = "wanted"\nmatch = "^(un)?wanted$"\n'
        for n in range(6)
    )
    + "".join(f'[users.drift{n}]\ngroups = ["wheel"]\n' for n in range(6))
    + "[links]\n"
    + "".join(f'"/etc/drift/link{n}" = "/srv/drift{n}"\n' for n in range(8))
    + "[units]\n"
    + "".join(f'"{name}" = "{state}"\n' for name, state in UNITS.items())
    + "[sysctl]\n"
    + "".join(f'"{key}" = "{value}"\n' for key, value in SYSCTL.items())
)
CLEAN = f"""
set +e
for unit in {" ".join(UNITS)}; do
  systemctl unmask "$unit"; systemctl disable --now "$unit"
done 2> /dev/null
rm -rf /etc/drift /srv/drift? /usr/local/lib/systemd/system/drift?.service /etc/sysctl.d/90-metal.conf* /etc/hosts.x /etc/locale.conf.x
systemctl daemon-reload
for user in drift{{0..5}}; do userdel --remove "$user" 2> /dev/null; done
true
"""


@dataclass(frozen=True)
class Change:
    """What is done to the machine (bash, as root), the Step that must show it, and what its lines in the plan must hold."""

    kind: str
    step: str  # a name as a regular expression
    script: str
    shown: str


def file_changes(path: str, kind: str = "file") -> Iterator[Change]:
    """Of a file with mode 640 or 644 that is root's."""
    step = re.escape(f"file {path}")
    yield Change(f"{kind} content", step, f"echo other > {path}", "-other")
    yield Change(f"{kind} content", step, f"echo more >> {path}", "-more")
    yield Change(f"{kind} mode", step, f"chmod 606 {path}", "-regular file, mode 606,")
    yield Change(f"{kind} owner", step, f"chown 1:0 {path}", "-regular file, mode ")
    yield Change(f"{kind} content", step, f"rm {path}", "+regular file")
    yield Change(f"{kind} type", step, f"mv {path} {path}.x; ln -s {path}.x {path}", "-symbolic link")


def unit_changes(name: str, state: str) -> Iterator[Change]:
    step = re.escape(f"unit {name}")
    if state == "enabled":
        yield Change("unit", step, f"systemctl disable {name}", "-disabled")
        yield Change("unit", step, f"systemctl stop {name}", "-inactive")
        yield Change("unit", step, f"systemctl mask {name}", "-masked")
    else:
        seen = {"disabled": "-enabled", "masked": "-disabled"}[state]
        yield Change("unit", step, f"systemctl unmask {name}; systemctl {seen[1:-1]} {name}", seen)


def user_changes(name: str) -> Iterator[Change]:
    step = f"user {name}"
    yield Change("user", step, f"usermod --shell /bin/false {name}", "-/bin/false")
    yield Change("user", step, f"gpasswd --delete {name} wheel", f"+{name} wheel")
    yield Change("user", step, f"userdel {name}", "+/bin/bash")
    yield Change("user", step, f"rm -r /home/{name}", "+home")


def wished() -> Iterator[list[Change]]:
    """For each thing of WISHES what may happen to it."""
    for n in range(10):
        yield list(file_changes(f"/etc/drift/file{n}"))
    for n in range(8):
        step, path = f"directory /srv/drift{n}", f"/srv/drift{n}"
        yield [
            Change("folder mode", step, f"chmod 707 {path}", "- directory, mode 707"),
            Change("folder owner", step, f"chown 1:0 {path}", "- directory, mode 750"),
            Change("folder", step, f"rmdir {path}", ""),
        ]
    for n in range(8):
        step, path = f"link /etc/drift/link{n}", f"/etc/drift/link{n}"
        yield [
            Change("link", step, f"ln -sfn /elsewhere {path}", "- /elsewhere"),
            Change("link", step, f"rm {path}", ""),
            Change("link", step, f"rm {path}; touch {path}", ""),
        ]
    for n in range(6):
        step, path = f"line drift{n} of .*", f"/etc/drift/lines{n}"
        yield [
            Change("line", step, f"echo unwanted >> {path}", "-unwanted"),
            Change("line", step, f": > {path}", "+wanted"),
            Change("line", step, f"rm {path}", "+wanted"),
        ]
    for n in range(6):
        yield list(user_changes(f"drift{n}"))
    for name, state in UNITS.items():
        yield list(unit_changes(name, state))
    for name in PACKAGES:
        yield [Change("package", r"\d+ packages", f"pacman -Rdd --noconfirm {name} > /dev/null", f" {name}")]
    for key in SYSCTL:
        yield [Change("sysctl", "kernel settings", f"sysctl --quiet --write {key}=100", f"-{key} = ")]
    yield list(file_changes("/etc/sysctl.d/90-metal.conf", "sysctl file"))


def of_the_system(user: str) -> Iterator[list[Change]]:
    """What every installation has."""
    keys = f"/home/{user}/.ssh/authorized_keys"
    yield list(file_changes("/etc/hosts"))
    yield list(file_changes("/etc/locale.conf"))
    yield [Change("link", "link /etc/localtime", "ln -sfn /usr/share/zoneinfo/Asia/Tokyo /etc/localtime", "Tokyo")]  # fmt: skip
    yield [Change("unit", "unit systemd-timesyncd.*", "systemctl disable systemd-timesyncd.service", "-disabled")]  # fmt: skip
    yield [Change("folder mode", f"directory /home/{user}", f"chmod 701 /home/{user}", "- directory, mode 701")]  # fmt: skip
    yield [Change("file content", f"file {keys}", f"echo 'ssh-ed25519 AAAA stranger' >> {keys}", "stranger")]
    yield [Change("file content", "file /boot/loader/loader.conf", "echo timeout 9 >> /boot/loader/loader.conf", "-timeout 9")]  # fmt: skip


def draw(things: Sequence[list[Change]], count: int, seed: int) -> list[Change]:
    """Changes of `count` things, every kind of thing among them."""
    chance = random.Random(seed)
    order = list(things)
    chance.shuffle(order)
    first: dict[str, list[Change]] = {}
    for thing in order:
        first.setdefault(thing[0].kind.partition(" ")[0], thing)
    others = [thing for thing in order if thing not in first.values()]
    return [chance.choice(thing) for thing in [*first.values(), *others][:count]]


def blocks(plan: str) -> dict[str, str]:
    """Name of each Step in the text of a plan → its lines."""
    found = re.split(r"(?m)^ *\d+\. (.+?): ", plan)
    return dict(zip(found[1::2], found[2::2], strict=True))


def hidden(plan: str, changes: Sequence[Change]) -> list[Change]:
    """The changes that the plan does not show."""
    steps = blocks(plan)
    return [
        change
        for change in changes
        if not any(re.fullmatch(change.step, name) and change.shown in text for name, text in steps.items())
    ]


def unasked(plan: str, changes: Sequence[Change]) -> list[str]:
    """Steps of the plan that nothing was done to."""
    return [name for name in blocks(plan) if not any(re.fullmatch(change.step, name) for change in changes)]


def fab(name: str, task: str) -> str:
    """What a task prints. Ends the program where it fails."""
    began = time.monotonic()
    argv = [str(FAB), "--search-root", str(PROJECT), "-H", name, task]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S)
    print(f"  fab {task}: {time.monotonic() - began:.0f} s", flush=True)
    if done.returncode:
        sys.exit(
            f"fab {task} ended with status {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    return done.stdout


def tally(changes: Sequence[Change]) -> Mapping[str, int]:
    kinds = [change.kind for change in changes]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def run(name: str, count: int, seed: int) -> bool:
    """True where all was shown and mended."""
    machine = load_machine(name, machines_folder())
    clean = fab(name, "provision") and fab(name, "plan")
    if "nothing to do" not in clean:
        sys.exit(f"The machine is not as its file says, to begin with:\n{clean}")
    changes = draw([*wished(), *of_the_system(machine.user.name)], count, seed)
    with connect(machine, machines_folder() / "known_hosts") as host:
        host.run("\n".join(change.script for change in changes), deadline_s=600)
    plan = fab(name, "plan")
    missed, others = hidden(plan, changes), unasked(plan, changes)
    fab(name, "provision")
    again = fab(name, "plan")
    mended = "nothing to do" in again
    for change in missed:
        print(f"  not shown: {change.step}: {change.script}")
    for step in others:
        print(f"  shown, though nobody touched it: {step}")
    said = f"{len(changes)} changes ({', '.join(f'{kind} {n}' for kind, n in tally(changes).items())})"
    print(
        f"{said}: {len(changes) - len(missed)} shown in {len(blocks(plan))} Steps; {'all mended' if mended else again}"
    )
    return mended and not missed and not others


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.drift", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("name", help="of the machine")
    parser.add_argument("--changes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    wanted = parser.parse_args()
    local = machines_folder() / f"{wanted.name}.local.toml"
    before = local.read_text() if local.exists() else None
    try:
        local.write_text((before or "") + WISHES)
        good = run(wanted.name, wanted.changes, wanted.seed)
        with connect(load_machine(wanted.name, machines_folder()), machines_folder() / "known_hosts") as host:
            host.run(CLEAN, deadline_s=300)
    finally:
        if before is None:
            local.unlink()
        else:
            local.write_text(before)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
