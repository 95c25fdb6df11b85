"""Training on a host: the real workload, sent, started as a unit, followed, stopped, gone on with."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from provision import jobs, runs
from provision.errors import ProvisionError
from provision.fetch import fetch_checkpoints
from provision.host import Host, connect
from tests.sshd import Sshd, wait_for
from tests.transport.trainer import installed

TINY = [
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=16",
    "model.n_ctx=32",
    "train.steps=6",
    "train.batch=2",
    "train.micro_batch=2",
    "train.warmup=1",
    "train.log_every=1",
    "train.eval_every=3",
    "train.eval_sequences=2",
    "train.save_every=3",
    "train.sample_tokens=4",
]
LONG = [*TINY, "train.steps=1000000", "train.eval_every=1000000", "train.save_every=1000000"]
RUNS = "/run/home/ml/metal/runs"


@pytest.fixture
def host(sshd: Sshd) -> Iterator[Host]:
    with installed(sshd) as session:
        yield session


@pytest.fixture(autouse=True)
def package_that_nobody_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is saved in an editor while a test runs would rightly be sent."""
    files = jobs.package_files()
    monkeypatch.setattr(jobs, "package_files", lambda: files)


def train(host: Host, settings: list[str], lines: list[str], **options: object) -> str:
    return jobs.train(
        host,
        host.wanted.machine,
        preset="demo",
        settings=settings,
        on_line=lines.append,
        say=lines.append,
        **options,  # type: ignore[arg-type]
    )


def log_of(sshd: Sshd, run: str) -> str:
    path = sshd.path(f"{RUNS}/{run}/log")
    return path.read_text() if path.exists() else ""


def test_a_run_is_trained_followed_and_fetched(host: Host, sshd: Sshd, tmp_path: Path) -> None:
    lines: list[str] = []
    run = train(host, TINY, lines)
    assert any("trained 6 steps" in line for line in lines)
    assert host.traffic.execs == 5, "look, send, start, where to begin, follow"
    enabled = ("/run/bin/systemctl", "is-enabled", f"metal-run-{run}")
    wait_for(lambda: sshd.inside(*enabled).stdout == "disabled\n", "the unit's end")
    owner = sshd.path(f"{RUNS}/{run}/metrics.jsonl").stat().st_uid
    assert owner == 4242, "the unit runs as the user"
    home = tmp_path / "home"
    done = fetch_checkpoints(host, host.wanted.machine, home)
    assert done.here >= 1
    sample = subprocess.run(
        [sys.executable, "-m", "workload", "sample", home / run, "--tokens", "5", "--device", "cpu"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert sample.stdout
    again = fetch_checkpoints(host, host.wanted.machine, home)
    assert (again.moved, again.execs) == ((), 1)


def test_an_unchanged_package_is_not_sent_again_and_a_changed_one_is(
    host: Host, sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = jobs.package_files()
    changed = {**files, "workload/more.py": b"# a line more\n"}
    for expected in (True, False, True):
        before = host.traffic.bytes_sent
        run = train(host, LONG, [], detach=True)
        assert (host.traffic.bytes_sent - before > 400_000) is expected
        jobs.stop(host, host.wanted.machine, run, now=True, say=lambda line: None)
        if not expected:
            monkeypatch.setattr(jobs, "package_files", lambda: changed)
    sources = list(sshd.path("/run/home/ml/metal/source").iterdir())
    assert {path.name for path in sources} == {jobs.content_hash(files), jobs.content_hash(changed)}
    assert not [path for source in sources for path in source.rglob("*.toml~")]


def test_a_stopped_run_has_saved_ends_well_and_can_go_on(host: Host, sshd: Sshd) -> None:
    machine = host.wanted.machine
    run = train(host, LONG, [], detach=True)
    wait_for(lambda: "tok/s" in log_of(sshd, run), "a step", 60)
    lines: list[str] = []
    assert jobs.stop(host, machine, on_line=lines.append, say=lines.append) == run, "the one at work"
    assert any("stopped at step" in line and "saved" in line for line in lines)
    assert "saved. fab -H box resume" in lines[-1]
    assert list(sshd.path(f"{RUNS}/{run}/checkpoints").glob("step-*/manifest.json"))
    sent = host.traffic.bytes_sent
    assert jobs.resume(host, machine, detach=True) == run, "the last one"
    assert host.traffic.bytes_sent - sent < 10_000, "it goes on with the source it has"
    wait_for(lambda: log_of(sshd, run).count("model    GPT-2") == 2, "it to go on", 60)
    jobs.stop(host, machine, run, on_line=lines.append)
    assert log_of(sshd, run).count("stopped at step") == 2, "the log is added to"
    with pytest.raises(ProvisionError, match="There is no run nosuch on box"):
        jobs.resume(host, machine, "nosuch")


def test_a_killed_trainer_is_started_again_and_loses_no_row(
    host: Host, sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "RESTART_S", 0)
    run = train(
        host, [*TINY, "train.steps=300", "train.eval_every=300", "train.save_every=40"], [], detach=True
    )
    wait_for(lambda: "step  60/300" in log_of(sshd, run), "steps", 60)
    sshd.inside("pkill", "-KILL", "-f", "workload train")
    lines: list[str] = []
    jobs.attach(host, host.wanted.machine, run, on_line=lines.append, say=lines.append)
    assert "metal: ended with status 137; starting again in 0 s" in log_of(sshd, run)
    assert "going on from step" in log_of(sshd, run)
    text = sshd.path(f"{RUNS}/{run}/metrics.jsonl").read_text()
    rows = [row["step"] for row in map(json.loads, text.splitlines()) if row["kind"] == "step"]
    assert rows == list(range(1, 301))


def test_a_failing_run_is_a_failure_with_its_last_lines(host: Host, sshd: Sshd) -> None:
    lines: list[str] = []
    with pytest.raises(ProvisionError, match="failed with status 1") as caught:
        train(host, ["data.source=/nowhere"], lines)
    assert "/nowhere" in caught.value.message
    assert "fab -H box logs" in caught.value.hint
    assert len([line for line in lines if "/nowhere" in line]) == 1, "it was not tried again"


def test_mistakes_are_found_before_anything_is_sent(host: Host) -> None:
    for preset, settings in (("nosuch", []), ("demo", ["train.stepz=3"]), ("demo", ["train.steps=many"])):
        with pytest.raises(ProvisionError):
            jobs.train(host, host.wanted.machine, preset=preset, settings=settings)
    assert host.traffic.execs == 0
    with pytest.raises(ProvisionError, match="not the id of a run"):
        train(host, [], [], resume="../x")
    with pytest.raises(ProvisionError, match="not the id of a run"):
        train(host, [], [], name="a b")
    with pytest.raises(ProvisionError, match="There is no run nosuch on box"):
        train(host, [], [], resume="nosuch")
    with pytest.raises(ProvisionError, match="There is no run on box yet"):
        jobs.attach(host, host.wanted.machine)


def test_nothing_is_trained_on_the_iso(sshd: Sshd) -> None:
    sshd.pin(live=True)
    with connect(sshd.machine(), sshd.pins) as session:
        with pytest.raises(ProvisionError, match="on the install ISO"):
            train(session, TINY, [])
        with pytest.raises(ProvisionError, match="on the install ISO"):
            fetch_checkpoints(session, session.wanted.machine, Path("nowhere"))
