"""One run over two virtual machines with a cable between them, one of which loses its power: tens of minutes.

    python -m tests.rehearsal.together [--go-on] [--cache FOLDER]

Both are installed as `make rehearsal` does it (`--go-on`: they are, by an earlier call) and started again with a second
network card. Then `fab -H left,right train`, twice: once undisturbed, once with the power of `right` cut in the middle.
The rows must be the same. That a machine is gone is noticed after a minute and a half (workload/lifeline.py).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from provision.errors import ProvisionError
from provision.host import Host, connect
from provision.machine import load_machine
from provision.pins import fingerprint_of, parse_key
from provision.rehearsal import qemu
from provision.rehearsal.bed import DEFAULT_CACHE, NAME, Bed
from provision.rehearsal.loop import TRAINING, Rehearsal, fab_command
from provision.rehearsal.vm import Vm, free_port, wait_until
from workload.metrics import TIMING

NAMES = ("left", "right")
DEADLINE_S = 5400
STEPS = 60
SETTINGS = {**TRAINING, "train.steps": str(STEPS), "train.save_every": "5", "train.eval_every": "30"}
CABLE = """
[files."/etc/systemd/network/10-cable.network"]
text = '''
[Match]
MACAddress={mac}

[Network]
Address={address}
LinkLocalAddressing=no
'''
"""


class Cabled(Vm):
    """A machine that gets a second network card when it is started the next time."""

    cable: Sequence[str] = ()

    def spawn(self, argv: Sequence[str]) -> "subprocess.Popen[bytes]":
        return super().spawn([*argv, *(self.cable if "qemu-system-x86_64" in argv else ())])


def mac(index: int) -> str:
    return f"52:54:00:83:00:0{index + 1}"


class Pair:
    """The two machines, and fab as a person types it."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.folder = bed.folder / "vm" / "together"
        self.machines = self.folder / "machines"
        self.vms: dict[str, Cabled] = {}
        for name in NAMES:
            hardware = qemu.Hardware((qemu.Disk("REHEARSAL0"),), bed.accelerator)
            medium = bed.parts.medium / "medium.img"
            self.vms[name] = Cabled(bed.folder / "vm" / f"together-{name}", hardware, medium)
            bed.stack.callback(self.vms[name].kill)

    def fab(self, hosts: str, *words: str) -> str:
        say(f"$ fab -H {hosts} {' '.join(words)}")
        done = subprocess.run(
            fab_command(*words, name=hosts),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "METAL_MACHINES": str(self.machines),
                "XDG_STATE_HOME": str(self.folder / "logs"),
            },
            timeout=DEADLINE_S,
            check=False,
        )
        said = done.stdout + done.stderr
        if done.returncode:
            raise ProvisionError(f"fab -H {hosts} {words[0]} ended with {done.returncode}:\n{said[-4000:]}")
        return said

    def install(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.machines.mkdir(parents=True)
        fingerprint = fingerprint_of(parse_key(self.bed.parts.keys.host_line))
        for index, name in enumerate(NAMES):
            rehearsal = Rehearsal(self.bed, self.vms[name], Console(quiet=True))
            rehearsal.boot(cold=False)
            text = (rehearsal.machines / f"{NAME}.toml").read_text()
            text += CABLE.format(mac=mac(index), address=f"10.83.0.{index + 1}/24")
            (self.machines / f"{name}.toml").write_text(text)
            shutil.copy(rehearsal.machines / "defaults.toml", self.machines)
            shutil.copy(rehearsal.machines / f"{NAME}.local.toml", self.machines / f"{name}.local.toml")
            self.fab(name, "plan", "--fingerprint", fingerprint)
        self.fab(",".join(NAMES), "provision")
        for name in NAMES:
            self.power_off(name)

    def power_off(self, name: str) -> None:
        """Over SSH: an installed machine need not react to the button."""
        vm = self.vms[name]
        with self.dial(name) as host:
            host.run("systemctl poweroff --no-block")
        wait_until(lambda: not vm.running, lambda: None, 300, f"{name} to be off")
        vm.kill()

    def start(self) -> None:
        """Both, with the cable: a datagram is a frame, so either end may be off."""
        ports = [free_port(), free_port()]
        for index, name in enumerate(NAMES):
            ends = f"udp=127.0.0.1:{ports[1 - index]},localaddr=127.0.0.1:{ports[index]}"
            card = f"virtio-net-pci,netdev=cable,mac={mac(index)},romfile="
            self.vms[name].cable = ["-netdev", f"socket,id=cable,{ends}", "-device", card]
            self.power_on(name)
            local = self.machines / f"{name}.local.toml"
            text = re.sub(r"(?m)^port = \d+", f"port = {self.vms[name].ssh_port}", local.read_text())
            local.write_text(text)

    def power_on(self, name: str) -> None:
        self.vms[name].start()
        self.vms[name].wait_for_ssh()

    def dial(self, name: str) -> Host:
        return connect(load_machine(name, self.machines), self.machines / "known_hosts", timeout_s=60)

    def rows(self, run: str) -> list[dict[str, Any]]:
        """Of the run's steps, without what depends on the clock, without a last line that is cut."""
        with self.dial(NAMES[0]) as host:
            text = host.run(f"cat ~/metal/runs/{run}/metrics.jsonl 2>/dev/null || true", as_root=False).stdout
        rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [{key: row[key] for key in row if key not in TIMING} for row in rows if row["kind"] == "step"]

    def train(self, name: str) -> str:
        """Begin the run; its id."""
        settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
        hosts = ",".join(NAMES)
        said = self.fab(hosts, "train", "--preset", "demo", "--name", name, *settings, "--detach")
        found = re.search(r"(\S+) has started on left.* on right.* led by left", said)
        if not found:
            raise ProvisionError(f"No run has started:\n{said}")
        return found[1]

    def wait_for(self, run: str, step: int) -> None:
        def reached() -> bool:
            return len(self.rows(run)) >= step

        def check() -> None:
            for vm in self.vms.values():
                vm.check()
            time.sleep(5)

        wait_until(reached, check, DEADLINE_S, f"step {step} of {run}")

    def end_of(self, run: str) -> None:
        self.wait_for(run, STEPS)
        for name in NAMES:
            with self.dial(name) as host:
                script = (
                    f"until [ -e ~/metal/runs/{run}/status ]; do sleep 1; done; cat ~/metal/runs/{run}/status"
                )
                status = host.run(script, as_root=False, deadline_s=900).stdout.strip()
            if status != "0":
                raise ProvisionError(f"{run} ended on {name} with status {status}.", f"fab -H {name} logs")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def go(pair: Pair, *, go_on: bool) -> bool:
    """Whether the rows of both runs are the same, and all there."""
    if not go_on:
        pair.install()
    pair.start()
    plain = pair.train("plain")
    pair.end_of(plain)
    say(f"{plain}: {STEPS} steps, nothing happened to it")
    cut = pair.train("cut")
    pair.wait_for(cut, 25)
    pair.vms["right"].kill()
    say("the power of right is cut")
    before = len(pair.rows(cut))
    pair.power_on("right")
    pair.end_of(cut)
    with pair.dial("left") as host:
        log = host.run(f"cat ~/metal/runs/{cut}/log", as_root=False).stdout
    again = re.search(r"going on from step (\d+)", log)
    if not again:
        raise ProvisionError(f"{cut} was never begun again:\n{log[-3000:]}")
    say(f"{cut}: the power went at step {before}; it went on from step {again[1]}")
    one, other = pair.rows(plain), pair.rows(cut)
    same = one == other and [row["step"] for row in one] == list(range(1, STEPS + 1))
    say(f"{len(other)} rows, {'the same' if same else 'NOT the same'} as those of {plain}")
    return same


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal.together", description=__doc__)
    parser.add_argument("--go-on", action="store_true", help="the machines are installed already")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    arguments = parser.parse_args(argv)
    try:
        with Bed(arguments.cache, on_build=lambda name: say(f"building {name}")) as bed:
            return 0 if go(Pair(bed), go_on=arguments.go_on) else 1
    except ProvisionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
