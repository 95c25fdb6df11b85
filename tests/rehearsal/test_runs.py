"""A training run on an installed machine that is restarted, loses its power, and fills its disk."""

import json
import os
import re
import subprocess
from contextlib import suppress
from typing import Any

import pytest

from provision.errors import ProvisionError
from provision.rehearsal.bed import Bed
from provision.rehearsal.loop import TRAINING, fab_command
from provision.rehearsal.vm import wait_until
from tests.faults.install import Install
from tests.rehearsal.conftest import Done
from tests.rehearsal.hardware import forget
from workload.metrics import TIMING

pytestmark = pytest.mark.rehearsal

STEPS = 60
SETTINGS = {**TRAINING, "train.steps": str(STEPS), "train.save_every": "5", "train.eval_every": "30"}
DEADLINE_S = 1200
FILLER = "/home/ml/film.mkv"


class Trainer(Install):
    """The machine that `whole_way` left, and runs on it."""

    def fab(self, *words: str, status: int = 0) -> str:
        done = subprocess.run(
            fab_command(*words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, **self.rehearsal.environment},
            timeout=DEADLINE_S,
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == status, said
        return said

    def train(self, name: str, *words: str) -> str:
        """Begin a run; its id."""
        settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
        said = self.fab("train", "--preset", "demo", "--name", name, *settings, *words)
        found = re.search(r"(\S+) has started on", said)
        assert found, said
        return found[1]

    def boot(self) -> None:
        self.rehearsal.boot_again()
        self.wait_for_installed()

    def rows(self, run: str) -> list[dict[str, Any]]:
        """Of the run's metrics, without what depends on the clock and without a last line that is cut."""
        text = self.inside(f"cat /home/ml/metal/runs/{run}/metrics.jsonl 2> /dev/null || true")
        rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [{key: row[key] for key in row if key not in TIMING} for row in rows]

    def wait_for_step(self, run: str, step: int) -> None:
        def reached() -> bool:
            try:
                return any(row["step"] >= step for row in self.rows(run) if row["kind"] == "step")
            except ProvisionError:  # it is just going down, or coming up
                return False

        wait_until(reached, self.vm.check, DEADLINE_S, f"step {step} of {run}")

    def boot_id(self) -> str:
        return self.inside("cat /proc/sys/kernel/random/boot_id")


@pytest.mark.rotating
def test_a_run_outlives_a_reboot_a_power_cut_and_a_full_disk(whole_way: Done, bed: Bed) -> None:
    """It goes on by itself, and its rows are those of a run that nothing happened to."""
    assert whole_way.status == 0, whole_way.text[-3000:]
    trainer = Trainer(bed, bed.machine(), [], "", print)
    trainer.stage = "installed"
    trainer.boot()
    undisturbed = trainer.rows(trainer.train("undisturbed"))
    assert [row["step"] for row in undisturbed if row["kind"] == "step"] == list(range(1, STEPS + 1))

    run = trainer.train("cut", "--detach")
    trainer.wait_for_step(run, 12)
    before = trainer.boot_id()
    with suppress(ProvisionError):  # it may hang up before it has answered
        trainer.inside("systemctl reboot --no-block")

    def restarted() -> bool:
        try:
            return trainer.boot_id() != before
        except ProvisionError:
            return False

    wait_until(restarted, trainer.vm.check, DEADLINE_S, "the reboot")
    trainer.wait_for_step(run, 34)
    trainer.vm.kill()
    trainer.boot()
    trainer.fab("attach", "--run", run)
    assert trainer.rows(run) == undisturbed
    log = trainer.inside(f"cat /home/ml/metal/runs/{run}/log")
    assert "the machine goes down; the run goes on after its boot" in log
    assert trainer.inside(f"systemctl is-enabled metal-run-{run}.service || true").strip() == "disabled"

    run = trainer.train("full", "--detach")
    trainer.wait_for_step(run, 12)
    trainer.inside(f"fallocate --length $(df --block-size=1 --output=avail /home/ml | tail -n 1) {FILLER}")
    said = trainer.fab("attach", "--run", run, status=1)
    assert "full" in said, said
    trainer.inside(f"rm {FILLER}")
    trainer.fab("resume", "--run", run)
    assert trainer.rows(run) == undisturbed
    assert f"{run}" in trainer.fab("runs")
    forget(trainer.vm)
