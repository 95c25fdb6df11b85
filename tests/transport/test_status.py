"""The table of runs: its facts from a real host with the trainer that trains nothing, its words on values."""

import json
from collections.abc import Iterator

import pytest
from rich.console import Console

from provision import jobs, runs
from provision.host import Host
from provision.status import Status, describe_card, parse_status, render_status, show_runs
from tests.sshd import Sshd, wait_for
from tests.transport.trainer import installed, trainer


@pytest.fixture
def host(sshd: Sshd) -> Iterator[Host]:
    with installed(sshd) as session:
        yield session


def text_of(shown: object) -> str:
    console = Console(width=200, file=None, record=True, quiet=False)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def test_the_table_is_one_exec(host: Host, sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "package_files", trainer)
    monkeypatch.setattr(runs, "RESTART_S", 0)
    machine = host.wanted.machine
    assert "No run on box yet." in text_of(show_runs(host, machine))

    def train(steps: int, **options: object) -> str:
        return jobs.train(
            host,
            machine,
            settings=[f"train.steps={steps}"],
            on_line=lambda line: None,
            say=lambda line: None,
            **options,  # type: ignore[arg-type]
        )

    done = train(12, name="first")
    at_work = train(5000, name="second", detach=True)
    wait_for(lambda: sshd.path(f"/run/home/ml/metal/runs/{at_work}/checkpoints/latest").exists(), "a save")
    execs = host.traffic.execs
    table = text_of(show_runs(host, machine))
    assert host.traffic.execs == execs + 1
    lines = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    assert "done" in lines[done]
    assert "12/12" in lines[done]
    assert "0.0833" in lines[done], "1/12"
    assert "training" in lines[at_work]
    assert "/5000" in lines[at_work]
    assert " 100 " in lines[at_work], "tokens a second"
    assert "free on the disk of box" in table
    jobs.stop(host, machine, say=lambda line: None, on_line=lambda line: None)
    assert "stopped" in text_of(show_runs(host, machine))


def facts(**lines: str) -> Status:
    return parse_status("free 1000\nrun r-1\n" + "".join(f"{word} {rest}\n" for word, rest in lines.items()))


@pytest.mark.parametrize(
    ("lines", "state"),
    [
        ({"unit": "active"}, "starting"),
        ({"unit": "active", "step": '{"step": 3}'}, "training"),
        ({"unit": "activating"}, "restarting"),
        ({"unit": "deactivating", "stop": ""}, "saving"),
        ({"unit": "inactive"}, "cut short"),
        ({"unit": "failed", "status": "1"}, "failed (1)"),
        ({"unit": "inactive", "status": "137", "stop": ""}, "stopped"),
        ({"unit": "inactive", "status": "0", "step": '{"step": 3}', "config": "steps = 9"}, "stopped"),
        ({"unit": "inactive", "status": "0", "step": '{"step": 9}', "config": "steps = 9"}, "done"),
    ],
)
def test_a_state_is_a_word(lines: dict[str, str], state: str) -> None:
    assert facts(**lines).rows[0].state == state


def test_the_time_left_is_of_the_pace_and_of_the_steps_that_are_planned_now() -> None:
    step = json.dumps({"step": 10, "tokens": 5000, "tokens_per_s": 250.0, "loss": 3.5, "temperature_c": 61.2})
    row = facts(unit="active", step=step, config="steps = 99", state='{"step": 5, "steps": 30}').rows[0]
    assert (row.step, row.steps, row.eta_s, row.loss, row.sensors) == (10, 30, 40.0, 3.5, "61 °C")
    assert "0:40" in text_of(render_status("box", facts(unit="active", step=step, config="steps = 30")))


def test_what_is_cut_or_odd_is_no_error() -> None:
    row = facts(unit="active", step='{"step": 1', eval="null", state="[1]", config="steps = x").rows[0]
    assert (row.step, row.steps, row.loss, row.eta_s) == (0, None, None, None)
    skipped = facts(unit="active", step='{"step": 4, "loss": null, "tokens_per_s": null}').rows[0]
    assert (skipped.step, skipped.loss) == (4, None)


def test_a_card_is_described() -> None:
    line = "0, NVIDIA H200, 98, 38000, 143771, 64, 412.10"
    assert describe_card(line) == "GPU 0 NVIDIA H200: 98 % busy, 38000 of 143771 MiB, 64 °C, 412.10 W"
    assert describe_card("[N/A]") == "[N/A]"
