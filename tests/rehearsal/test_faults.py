"""What goes wrong on the way, in a real machine: cuts in a few Steps, others every day, and faults that a person mends.

The day's cuts are printed; METAL_DAY repeats those of another day. All of them: `make faults`.
"""

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from provision.apply import UNIT
from provision.facts import PROBE, parse_facts
from provision.machine import load_machine
from provision.rehearsal.bed import NAME, Bed
from provision.rehearsal.loop import fab_command
from provision.rehearsal.vm import Vm
from provision.steps import merge_packages
from provision.system import CONCERNS, system
from tests.faults.cuts import Cut, rotate
from tests.faults.install import SPOILED, Fab, Install
from tests.faults.leaks import find_leaks
from tests.faults.watch import Frozen
from tests.rehearsal.hardware import today
from tests.sshd import Proxy, wait_for

pytestmark = pytest.mark.rehearsal

LAST = "python environment"  # takes as long as a fifth of all else, and nothing comes after it
SECRET = "open-sesame-4f1c"
STOP = f"echo 0 > /sys/fs/cgroup/system.slice/{UNIT}.service/cgroup.freeze\nsystemctl stop {UNIT}.service"


def live_steps(install: Install) -> list[str]:
    """Names of the Steps that wait for a machine with a blank disk."""
    machine = load_machine(NAME, install.rehearsal.machines)
    return [step.name for step in system(machine, parse_facts(install.inside(PROBE)), int(time.time()))]


def installed_steps(install: Install) -> list[str]:
    """Names of the Steps that will have something to do in the new system, but for the last."""
    machine = load_machine(NAME, install.rehearsal.machines)
    facts = replace(parse_facts(install.inside(PROBE)), system="installed", owner=NAME)
    steps = merge_packages(step for concern in CONCERNS for step in concern(machine, facts))
    return [*(step.name for step in steps if step.packages), *SPOILED]


def test_cut_in_todays_steps_and_run_again(bed: Bed, vm: Vm) -> None:
    """The power, the connection and `fab` cut in Steps of both stages, in one installation that succeeds all the same.

    It is ended where the last Step begins: nothing else is left to do then. The password that was set on the way is
    to be read nowhere.
    """
    day = today()
    install = Install(bed, vm, [], SECRET, print)
    with install.machine():
        cuts = rotate({"live": live_steps(install), "installed": installed_steps(install)}, day)
        print(f"METAL_DAY={day}", *cuts, sep="\n")
        install.cuts = [*cuts, Cut("installed", LAST, "stop", 1.0)]
        outcome = install.until_done()
        assert install.stopped
        assert len(outcome.hits) >= len(cuts) - 1, "one Step may have been over before it could be stopped"
        assert sum(hit.on_target for hit in outcome.hits) >= len(cuts) - 2, (
            "most were cut where it was planned"
        )
        install.inside(STOP)
        plan = subprocess.run(
            fab_command("plan"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, **install.environment},
            check=False,
        )
        assert "installed system" in plan.stdout, plan.stdout + plan.stderr
        assert ": 1 Steps to do" in plan.stdout
        assert f"  1. {LAST}: " in plan.stdout
        assert find_leaks(install) == []
        assert outcome.samples >= len(cuts)


class Mishap(Install):
    """An installation to which something happens, and which then is not gone on with by itself."""

    deed: Callable[[], object] | None = None

    def provision(
        self, *, step: str = "", after_s: float = 0.0, deed: Callable[[], object] | None = None
    ) -> str:
        """What `fab provision` prints, to its end. In `step` it stands still for `deed`, or is killed for lack of one."""
        self.cuts, self.deed = [Cut("live", step, "stop", after_s)] if step else [], deed
        self.arm()
        at_work = self.start()
        fab: Fab | None = at_work
        while fab:
            fab = self.next(fab)
        return "\n".join(at_work.lines)

    def frozen(self, fab: Fab, event: Frozen) -> Fab | None:
        if self.deed:
            self.deed()
            event.watch.go_on()
            return fab
        fab.kill()
        return None

    def ended(self, fab: Fab) -> None:
        assert fab.process.returncode == 1, "it must have failed, with one readable error"
        assert "Traceback" not in "\n".join(fab.lines)


@contextmanager
def drop_in(install: Install, unit: str, text: str) -> Iterator[None]:
    """A unit of the live system that behaves otherwise for a while."""
    path = f"/run/systemd/system/{unit}.d/50-fault.conf"
    install.inside(f"mkdir -p {path.rpartition('/')[0]}\ncat > {path}\nsystemctl daemon-reload", stdin=text)
    yield
    install.inside(f"rm {path}\nsystemctl daemon-reload")


# The ISO's keyring as it is before pacman-init.service has run, and a clock that nothing sets right.
WRONG_CLOCK = """
systemctl stop pacman-init.service systemd-timesyncd.service
find /etc/pacman.d/gnupg -mindepth 1 -delete
date --set 'YEAR-02-03 04:05:06'
"""


def half_way(mirror: Proxy) -> None:
    """Some of the packages come through yet, then nobody answers there."""
    enough = mirror.relayed_bytes + 20_000_000

    def cut() -> None:
        wait_for(lambda: mirror.relayed_bytes > enough, "packages", deadline_s=300)
        mirror.cut(accept=False)

    threading.Thread(target=cut).start()


@pytest.mark.rotating
def test_faults_that_a_person_mends(bed: Bed, vm: Vm) -> None:
    """Keyring, clock, mirror, disk: what is wrong is named; mended, the same command goes on."""
    install = Mishap(bed, vm, [], SECRET, print)
    mirror = Proxy(bed.server.http.server_port)
    with install.machine():
        local = install.rehearsal.machines / f"{NAME}.local.toml"
        text = local.read_text()
        ours, theirs = f":{bed.server.http.server_port}/repository", f":{mirror.port}/repository"
        assert ours in text
        local.write_text(text.replace(ours, theirs))
        base = next(name for name in live_steps(install) if name.startswith("install "))

        install.inside(WRONG_CLOCK.replace("YEAR", "2011"))
        with drop_in(install, "pacman-init.service", "[Service]\nExecStartPre=/bin/false\n"):
            said = install.provision()
        assert "Step 'keyring of the ISO' failed" in said
        assert "pacman-init.service failed" in said
        assert abs(int(install.inside("date +%s")) - time.time()) < 100, "the clock was set all the same"

        # A keyring whose own key will be made in fifteen years, and a slow second one; then the mirror goes away.
        install.inside(
            f"{WRONG_CLOCK.replace('YEAR', '2041')}systemctl start pacman-init.service", deadline_s=200
        )
        with drop_in(install, "pacman-init.service", "[Service]\nExecStartPre=/bin/sleep 8\n"):
            said = install.provision(step=base, deed=lambda: half_way(mirror))
        assert f"Step '{base}' failed" in said
        assert "pkg.tar.zst' from 10.0.2.2" in said, "it was in the middle of the packages"
        assert f"the mirror does not answer: http://10.0.2.2{theirs}" in said
        mirror.mend()

        filler = "/mnt/var/cache/pacman/pkg/film.mkv"
        free = "$(df --block-size=1 --output=avail /mnt | tail -n 1)"
        said = install.provision(
            step=base, after_s=15, deed=lambda: install.inside(f"fallocate --length {free} {filler}")
        )
        assert f"Step '{base}' failed" in said
        assert "/mnt is full" in said
        install.inside(f"rm {filler}")

        said = install.provision(step="file /etc/fstab")
        assert re.search(rf"^  done .* s  {base}$", said, re.MULTILINE), said
    mirror.close()
