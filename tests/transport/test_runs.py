"""The life of a run: crashes, power cuts, reboots, crash loops, checks before it, and the verbs of every day.

The trainer here trains nothing (tests/transport/trainer.py) and systemd is tests/standin/systemctl, as neither torch's
seconds nor a reboot are needed for this; test_jobs.py has the real trainer, tests/rehearsal/ the real systemd.
"""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

import pytest

from provision import jobs, preflight, runs
from provision.dataset import find_data, prepare_arguments
from provision.errors import ProvisionError
from provision.host import Host
from provision.runs import Folder, render_service, train_script
from tests.sshd import Proxy, Sshd, wait_for
from tests.transport.trainer import installed, trainer

HOME = "/run/home/ml"
RUNS = f"{HOME}/metal/runs"


@pytest.fixture
def host(sshd: Sshd) -> Iterator[Host]:
    with installed(sshd) as session:
        yield session


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "package_files", trainer)
    monkeypatch.setattr(runs, "RESTART_S", 0)


def train(
    host: Host, steps: int = 10, lines: list[str] | None = None, more: tuple[str, ...] = (), **options: object
) -> str:
    lines = [] if lines is None else lines
    return jobs.train(
        host,
        host.wanted.machine,
        settings=[f"train.steps={steps}", *more],
        on_line=lines.append,
        say=lines.append,
        **options,  # type: ignore[arg-type]
    )


def rows(sshd: Sshd, run: str) -> list[int]:
    text = sshd.path(f"{RUNS}/{run}/metrics.jsonl").read_text()
    return [json.loads(line)["step"] for line in text.splitlines()]


def has_rows(sshd: Sshd, run: str, n: int) -> bool:
    return sshd.path(f"{RUNS}/{run}/metrics.jsonl").exists() and len(rows(sshd, run)) >= n


def log_of(sshd: Sshd, run: str) -> str:
    path = sshd.path(f"{RUNS}/{run}/log")
    return path.read_text() if path.exists() else ""


def systemctl(sshd: Sshd, *words: str) -> str:
    return sshd.inside("/run/bin/systemctl", *words).stdout.strip()


def status_of(sshd: Sshd, run: str) -> str:
    path = sshd.path(f"{RUNS}/{run}/status")
    return path.read_text().strip() if path.exists() else ""


# Crashes


@pytest.mark.parametrize("status", [1, 137])
def test_a_crash_is_followed_by_a_start_from_the_newest_checkpoint(
    host: Host, sshd: Sshd, status: int
) -> None:
    """It fails once, at step 17; rows after checkpoint 15 are made again and are in the file once."""
    sshd.path(f"{HOME}/crash").write_text(f"17 {status} once")
    lines: list[str] = []
    run = train(host, 30, lines)
    assert f"metal: ended with status {status}; starting again in 0 s" in lines
    assert "model    none, from step 15" in lines
    assert lines[-1] == "trained 30 steps"
    assert rows(sshd, run) == list(range(1, 31))
    assert status_of(sshd, run) == "0"
    wait_for(lambda: systemctl(sshd, "is-enabled", f"metal-run-{run}") == "disabled", "the unit's end")


def test_a_crash_loop_ends_with_its_reason(host: Host, sshd: Sshd) -> None:
    sshd.path(f"{HOME}/crash").write_text("7 9")
    lines: list[str] = []
    with pytest.raises(ProvisionError, match="failed with status 9") as caught:
        train(host, 30, lines)
    assert "for the 5th time since checkpoint step-00000005; not started again" in caught.value.message
    assert "the trainer fails at step 7" in caught.value.message
    (run,) = (path.name for path in sshd.path(RUNS).iterdir())
    fails = log_of(sshd, run).count("the trainer fails at step 7")
    assert fails == 1 + runs.TRIES, "one start that came to step 5, and five from there"
    assert f"fab -H box resume --run {run}" in caught.value.hint
    wait_for(lambda: systemctl(sshd, "is-active", f"metal-run-{run}") == "failed", "the unit's end")
    assert systemctl(sshd, "is-enabled", f"metal-run-{run}") == "disabled"
    systemctl(sshd, "boot")
    assert systemctl(sshd, "is-active", f"metal-run-{run}") == "inactive"
    sshd.path(f"{HOME}/crash").unlink()
    jobs.resume(host, host.wanted.machine, on_line=lines.append, say=lines.append)
    assert lines[-1] == "trained 30 steps"
    assert rows(sshd, run) == list(range(1, 31))


def test_a_trainer_killed_with_its_wrapper_is_counted_too(host: Host, sshd: Sshd) -> None:
    """As the kernel does it when memory runs out, and a power cut: nobody is there to write anything down."""
    sshd.path(f"{HOME}/pace").write_text("0.2")
    run = train(host, 1000, detach=True)
    for start in range(runs.TRIES):
        wait_for(lambda: log_of(sshd, run).count("from step 0") == start + 1, "a start")  # noqa: B023
        systemctl(sshd, "kill", f"metal-run-{run}")
    with pytest.raises(ProvisionError, match="not started again"):
        jobs.attach(host, host.wanted.machine, run, on_line=print)
    assert status_of(sshd, run) == "137"


def test_what_fails_at_once_is_not_tried_again(host: Host, sshd: Sshd) -> None:
    lines: list[str] = []
    with pytest.raises(ProvisionError, match="there is no data /nowhere"):
        jobs.train(
            host,
            host.wanted.machine,
            settings=["data.source=/nowhere"],
            on_line=lines.append,
            say=lines.append,
        )
    assert lines.count("error: there is no data /nowhere") == 1


# Reboots


def test_a_power_cut_is_followed_by_a_start_at_boot(host: Host, sshd: Sshd) -> None:
    run = train(host, 300, detach=True)
    for _ in range(2):
        seen = 0 if not has_rows(sshd, run, 1) else len(rows(sshd, run))
        wait_for(partial(has_rows, sshd, run, seen + 12), "steps")
        systemctl(sshd, "boot")
    jobs.attach(host, host.wanted.machine, on_line=lambda line: None, say=lambda line: None)
    assert rows(sshd, run) == list(range(1, 301))
    assert log_of(sshd, run).count("model    none") == 3


def test_a_shutdown_saves_and_the_boot_goes_on(host: Host, sshd: Sshd) -> None:
    run = train(host, 300, detach=True)
    wait_for(lambda: "step 10" in log_of(sshd, run), "steps")
    sshd.path("/run/standin-systemd/../standin-system").write_text("stopping\n")
    systemctl(sshd, "stop", f"metal-run-{run}")
    assert "the machine goes down; the run goes on after its boot" in log_of(sshd, run)
    assert not status_of(sshd, run)
    assert systemctl(sshd, "is-enabled", f"metal-run-{run}") == "enabled"
    sshd.path("/run/standin-system").unlink()
    systemctl(sshd, "boot")
    jobs.attach(host, host.wanted.machine, run, on_line=lambda line: None, say=lambda line: None)
    assert rows(sshd, run) == list(range(1, 301))


def test_a_follower_waits_for_a_boot_that_has_not_come_to_the_run_yet(host: Host, sshd: Sshd) -> None:
    run = train(host, 60, detach=True)
    wait_for(lambda: "step 10" in log_of(sshd, run), "steps")
    systemctl(sshd, "kill", f"metal-run-{run}")
    sshd.inside("pkill", "-KILL", "-f", "systemctl start")
    sshd.inside("rm", "-rf", "/run/standin-systemd")
    sshd.path("/run/standin-system").write_text("starting\n")
    lines: list[str] = []

    def progress(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            systemctl(sshd, "boot")

    jobs.attach(host, host.wanted.machine, run, on_line=progress, say=lambda line: None)
    assert lines[-1] == "trained 60 steps"


def test_what_ended_or_was_stopped_stays_ended_after_a_boot(host: Host, sshd: Sshd) -> None:
    ended = train(host, 5)
    stopped = train(host, 1000, detach=True)
    wait_for(lambda: "step 5" in log_of(sshd, stopped), "steps")
    jobs.stop(host, host.wanted.machine, say=lambda line: None)
    # A power cut between the status and the unit's being disabled: the condition in the unit holds it back.
    for run in (ended, stopped):
        systemctl(sshd, "enable", f"metal-run-{run}")
    systemctl(sshd, "boot")
    for run in (ended, stopped):
        assert systemctl(sshd, "is-active", f"metal-run-{run}") == "inactive"
        assert status_of(sshd, run) == "0"


def test_a_person_who_uses_systemctl_stops_it_as_well(host: Host, sshd: Sshd) -> None:
    run = train(host, 1000, detach=True)
    wait_for(lambda: "step 5" in log_of(sshd, run), "steps")
    systemctl(sshd, "stop", f"metal-run-{run}")
    assert status_of(sshd, run) == "0"
    assert "stopped at step" in log_of(sshd, run)


# Following, joining, stopping


def test_ctrl_c_leaves_it_running_and_the_same_command_joins(host: Host, sshd: Sshd) -> None:
    said: list[str] = []

    def press(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.train(host, host.wanted.machine, settings=["train.steps=5000"], on_line=press, say=said.append)
    run = said[0].split()[0]
    assert f"{run} goes on training on box" in said[-1]
    assert "fab -H box attach" in said[-1]
    assert "fab -H box stop" in said[-1]
    with pytest.raises(ProvisionError, match=f"already training: {run}") as caught:
        train(host, 6000)
    assert "fab -H box stop" in caught.value.hint
    assert train(host, 5000, detach=True) == run
    beside = train(host, 10, share=True, name="beside")
    assert beside.endswith("-beside")
    assert status_of(sshd, beside) == "0"
    assert sorted(path.name for path in sshd.path(RUNS).iterdir()) == sorted([run, beside])


def test_the_start_is_sent_twice_and_there_is_one_run(sshd: Sshd, proxy: Proxy) -> None:
    """The connection breaks after the host has started the unit and before it could say so."""
    with installed(sshd, proxy.port) as host:
        real = sshd.path("/run/bin/systemctl")
        real.rename(real.with_name("systemctl.real"))
        real.write_text(
            '#!/bin/bash\n/run/bin/systemctl.real "$@"\n'
            '[ "$1" != start ] || { echo start >>/run/starts; touch /run/started; sleep 2; }\n'
        )
        real.chmod(0o755)

        def cut() -> None:
            wait_for(sshd.path("/run/started").exists, "the unit to start")
            proxy.cut()

        thread = threading.Thread(target=cut, daemon=True)
        thread.start()
        run = train(host, 20)
        thread.join()
        assert rows(sshd, run) == list(range(1, 21))
        assert sshd.path("/run/starts").read_text() == "start\n"


def test_other_settings_for_a_run_at_work_are_refused_and_not_forgotten(host: Host, sshd: Sshd) -> None:
    sshd.path(f"{HOME}/pace").write_text("0.1")
    run = train(host, 1000, detach=True)
    said: list[str] = []
    with pytest.raises(ProvisionError, match=f"box is already training: {run}"):
        train(host, 2000, said, resume=run, share=True, detach=True)
    assert not any("has started" in line for line in said)
    jobs.stop(host, host.wanted.machine, now=True, say=said.append)


def test_stop_now_while_the_unit_begins(host: Host, sshd: Sshd) -> None:
    """Who stops the unit and the unit itself, which sees it, write its status at the same time."""
    waits = (
        ("head", "[[ $2 != 65536 ]] || until [ -e stop ]"),
        ("sync", "[[ $# != 1 || $1 != .st* ]] || for _ in {1..20}"),
    )
    for tool, until in waits:
        path = sshd.path(f"/run/bin/{tool}")
        path.write_text(f'#!/bin/bash\n{until}; do sleep 0.1; done\nexec /usr/bin/{tool} "$@"\n')
        path.chmod(0o755)
    run = train(host, 100000, detach=True)
    assert runs.stop_run(host, Folder(PurePosixPath(HOME) / "metal"), run, now=True) == "ended-now"
    assert status_of(sshd, run) == "137"
    assert not has_rows(sshd, run, 1)
    assert systemctl(sshd, "is-active", f"metal-run-{run}") == "inactive"


def test_stop_now_does_not_save(host: Host, sshd: Sshd) -> None:
    machine = host.wanted.machine
    sshd.path(f"{HOME}/pace").write_text("0.1")
    run = train(host, 1000, detach=True)
    wait_for(lambda: "step 5" in log_of(sshd, run), "steps")
    said: list[str] = []
    jobs.stop(host, machine, now=True, say=said.append)
    assert "was ended" in said[-1]
    assert "stopped at step" not in log_of(sshd, run)
    systemctl(sshd, "boot")
    assert systemctl(sshd, "is-active", f"metal-run-{run}") == "inactive"
    jobs.stop(host, machine, say=said.append)
    assert said[-1] == f"{run} on box has ended already."
    with pytest.raises(ProvisionError, match="There is no run nosuch"):
        jobs.stop(host, machine, "nosuch")


def test_a_run_that_is_stopped_before_its_first_step_has_saved_nothing(host: Host, sshd: Sshd) -> None:
    sshd.path(f"{HOME}/begin").write_text("2")
    run = train(host, 20, detach=True)
    wait_for(lambda: "from step" in log_of(sshd, run), "the trainer")
    said: list[str] = []
    jobs.stop(host, host.wanted.machine, say=said.append)
    assert (
        said[-1]
        == f"{run} has ended, before its first checkpoint. fab -H box resume --run {run} begins it again."
    )


def test_a_run_that_waits_for_its_next_start_is_stopped_too(
    host: Host, sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "RESTART_S", 300)
    sshd.path(f"{HOME}/crash").write_text("7 9")
    run = train(host, 1000, detach=True)
    wait_for(lambda: "starting again in 300 s" in log_of(sshd, run), "the crash")
    said: list[str] = []
    jobs.stop(host, host.wanted.machine, say=said.append)
    assert "was ended" in said[-1]
    assert status_of(sshd, run)
    assert systemctl(sshd, "is-active", f"metal-run-{run}") == "inactive"
    assert systemctl(sshd, "is-enabled", f"metal-run-{run}") == "disabled"


def test_logs_sample_report_and_remove(host: Host, sshd: Sshd, tmp_path: Path) -> None:
    machine, said = host.wanted.machine, list[str]()
    run = train(host, 12)
    jobs.logs(host, machine, lines=2, on_line=said.append)
    assert said == ["step 10", "trained 12 steps"]
    jobs.sample(host, machine, "to be or 'not' $HOME", tokens=7, say=said.append)
    assert said[-1] == "to be or 'not' $HOME and so on --tokens 7"
    opened: list[str] = []
    path = jobs.report(host, machine, tmp_path / "home", show=opened.append, say=said.append)
    assert path.read_text() == f"<html>report of {run}"
    assert opened == [path.as_uri()]
    assert str(path) in said[-1]
    with pytest.raises(ProvisionError, match="was not removed"):
        jobs.remove(host, machine, run, ask=lambda question, within_s=None: "no")
    jobs.remove(host, machine, run, yes=True, ask=lambda question, within_s=None: "", say=said.append)
    assert "are free again" in said[-1]
    assert not list(sshd.path(RUNS).iterdir())
    assert not sshd.path(f"/etc/systemd/system/metal-run-{run}.service").exists()
    for verb in (jobs.logs, jobs.resume):
        with pytest.raises(ProvisionError, match=f"There is no run {run} on box"):
            verb(host, machine, run)


def test_a_removal_that_was_cut_off_is_gone_on_with(host: Host, sshd: Sshd) -> None:
    """Between the renaming and the last byte: the checkpoints would lie there for ever, under a name that nothing shows."""
    machine, said = host.wanted.machine, list[str]()
    run = train(host, 12)
    sshd.path(f"{RUNS}/{run}").rename(sshd.path(f"{RUNS}/.{run}.removed"))
    with pytest.raises(ProvisionError, match="There is no run"):
        jobs.remove(host, machine, run, yes=True, ask=lambda question, within_s=None: "", say=said.append)
    assert not list(sshd.path(RUNS).iterdir())


def test_a_run_at_work_is_not_removed_and_is_sampled_on_the_processor(host: Host, sshd: Sshd) -> None:
    machine, said = host.wanted.machine, list[str]()
    run = train(host, 5000, detach=True)
    with pytest.raises(ProvisionError, match="is at work on box") as caught:
        jobs.remove(host, machine, run, yes=True, ask=lambda question, within_s=None: "")
    assert f"stop --run {run}" in caught.value.hint
    jobs.sample(host, machine, "x", say=said.append)
    assert said[-1].endswith("--device cpu")


# Before a run


def test_a_machine_that_is_not_ready_is_refused(host: Host, sshd: Sshd) -> None:
    host_file = sshd.path("/etc/metal-to-model")
    host_file.unlink()
    with pytest.raises(ProvisionError, match="not an installation of ours"):
        train(host)
    host_file.write_text("box\n")
    link = sshd.inside("readlink", "/opt/metal/env").stdout.strip()
    sshd.inside("ln", "-sfnT", "/opt/metal/envs/here", "/opt/metal/env")
    with pytest.raises(ProvisionError, match="not the one that its machine file asks for") as caught:
        train(host)
    assert "fab -H box provision" in caught.value.hint
    sshd.inside("rm", "/opt/metal/env")
    with pytest.raises(ProvisionError, match="has no Python environment"):
        train(host)
    sshd.inside("ln", "-sfnT", link, "/opt/metal/env")
    with pytest.raises(ProvisionError, match=r"checkpoints.* need [\d.]+ GB, and .* has room for"):
        train(host, preset="gpt2-1558m", data="", name="")  # type: ignore[arg-type]
    before = host.traffic.execs
    assert not sshd.path(f"{HOME}/metal").exists(), "nothing was sent"
    train(host, 3)
    assert host.traffic.execs - before == 5, "look, send, start, where to begin, follow"


SMI = """#!/bin/bash
# Stand-in for nvidia-smi where there is no GPU.
case $1 in
  --query-gpu=*) cat /run/smi-cards; exit $(cat /run/smi-status);;
  *) cat /run/smi-busy;;
esac
"""


def test_the_gpu_must_answer_and_be_free(host: Host, sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card on the bus and nvidia-smi are stand-ins: there is none here."""
    probe = preflight.PROBE.replace("section gpus\n", "section gpus; echo '0000:01:00.0 0x2684'\n")
    monkeypatch.setattr(preflight, "PROBE", probe)
    machine = host.wanted.machine
    seen = preflight.look(host, machine, "x", "")
    folder = preflight.wanted_environment(machine, seen.facts)
    sshd.inside("ln", "-sfnT", "/opt/metal/envs/here", folder)
    sshd.inside("ln", "-sfnT", folder, "/opt/metal/env")
    with pytest.raises(ProvisionError, match=r"its driver does not answer: nvidia-smi: .*No such file"):
        train(host)
    smi = sshd.path("/run/bin/nvidia-smi")
    smi.write_text(SMI)
    smi.chmod(0o755)
    cards, busy, status = (sshd.path(f"/run/smi-{name}") for name in ("cards", "busy", "status"))
    cards.write_text("Driver/library version mismatch\n")
    status.write_text("18")
    with pytest.raises(ProvisionError, match="Driver/library version mismatch"):
        train(host)
    status.write_text("0")
    cards.write_text("0, NVIDIA GeForce RTX 4090, 1, 24564\n")
    busy.write_text("1, 20000, /usr/bin/blender\n")
    with pytest.raises(ProvisionError, match="is in use") as caught:
        train(host)
    assert "1, root, 20000, /usr/bin/blender" in caught.value.message
    lines: list[str] = []
    train(host, 3, lines, share=True)
    assert "on 1 x NVIDIA GeForce RTX 4090" in lines[0]
    busy.write_text("")
    run = train(host, 3)
    assert "--nproc-per-node" not in sshd.path(f"{RUNS}/{run}/script").read_text()
    cards.write_text("0, NVIDIA GeForce RTX 4090, 1, 24564\n1, NVIDIA GeForce RTX 4090, 1, 24564\n")
    run = train(host, 3, lines)
    assert "on 2 x NVIDIA GeForce RTX 4090" in "\n".join(lines)
    assert "--nproc-per-node gpu" in sshd.path(f"{RUNS}/{run}/script").read_text(), "torchrun, a process each"
    with pytest.raises(ProvisionError, match="cannot be shared evenly by 2 processes"):
        train(host, 3, more=("train.batch=3", "train.micro_batch=3"))


def test_parameters_are_counted_as_the_model_has_them() -> None:
    torch = pytest.importorskip("torch")
    from workload.config import load_config
    from workload.model import GPT2, count_parameters

    for preset in ("demo", "gpt2-124m", "book-163m"):
        config = load_config(preset)
        with torch.device("meta"):
            model = GPT2(config.model)
        ours = preflight.count_parameters(config.model, config.data.tokenizer)
        assert abs(ours / count_parameters(model) - 1) < 0.01, preset
    config = load_config("gpt2-124m")
    assert preflight.runs_bytes(config) == 12 * 124_439_808 * (config.train.keep + 2)
    longer = replace(config, train=replace(config.train, steps=1000, keep_every=100))
    assert preflight.runs_bytes(longer) == 12 * 124_439_808 * (config.train.keep + 12)


# Data


def test_a_file_of_this_computer_is_sent_once(host: Host, sshd: Sshd, tmp_path: Path) -> None:
    text = tmp_path / "my book.txt"
    text.write_text("once upon a time\n" * 10_000)
    said: list[str] = []
    run = train(host, 3, said, data=str(text))
    assert any("sending 1 file, 170.0 kB" in line for line in said)
    (folder,) = sshd.path(f"{HOME}/metal/data").iterdir()
    assert (folder / "my book.txt").read_bytes() == text.read_bytes()
    assert (
        f"data.source={HOME}/metal/data/{folder.name}/my book.txt"
        in sshd.path(f"{RUNS}/{run}/script").read_text()
    )
    sent, execs = host.traffic.bytes_sent, host.traffic.execs
    train(host, 3, data=str(text))
    assert host.traffic.bytes_sent - sent < 30_000
    assert host.traffic.execs - execs == 4, "look, start, where to begin, follow"
    text.write_text("another\n")
    train(host, 3, data=str(text))
    assert len(list(sshd.path(f"{HOME}/metal/data").iterdir())) == 2


def test_a_folder_is_sent_and_goes_on_where_it_was_cut(host: Host, sshd: Sshd, tmp_path: Path) -> None:
    books = tmp_path / "books"
    (books / "deep").mkdir(parents=True)
    (books / ".git").mkdir()
    (books / ".git" / "junk").write_text("junk")
    (books / "deep" / "a b.txt").write_text("a")
    (books / "ö.md").write_text("b" * 3_000_000)
    seen = jobs.find_data(str(books), "gpt2", 0.1, print)
    staging = sshd.path(f"{HOME}/metal/{seen.key}").with_name("." + Path(seen.key).name + ".partial")
    staging.mkdir(parents=True)
    (staging / "ö.md").write_text("b" * 2_000_000)
    sshd.inside("chown", "-R", "ml:", f"{HOME}/metal")
    train(host, 3, data=str(books))
    (folder,) = sshd.path(f"{HOME}/metal/data").iterdir()
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "deep/a b.txt",
        "ö.md",
    ]
    assert (folder / "ö.md").stat().st_size == 3_000_000
    assert host.traffic.bytes_sent < 1_500_000


def test_data_that_arrived_wrong_gets_no_name(host: Host, sshd: Sshd, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("right")
    real = sshd.path("/run/bin/sha256sum")
    real.write_text(
        '#!/bin/bash\n[ "$1" != --check ] || echo wrong >text.txt\nexec /usr/bin/sha256sum "$@"\n'
    )
    real.chmod(0o755)
    with pytest.raises(ProvisionError, match="did not arrive whole"):
        train(host, 3, data=str(text))
    assert not list(sshd.path(f"{HOME}/metal/data").iterdir())
    real.unlink()
    train(host, 3, data=str(text))


def test_a_name_is_prepared_on_the_host_in_the_unit(host: Host, sshd: Sshd) -> None:
    said: list[str] = []
    hold = sshd.path(f"{HOME}/hold")
    hold.touch()
    run = train(host, 3, said, data="fineweb-10b", detach=True)
    assert any("makes token shards of fineweb-10b" in line for line in said)
    wait_for(lambda: "preparing fineweb-10b" in log_of(sshd, run), "preparation")
    systemctl(sshd, "boot")
    wait_for(lambda: log_of(sshd, run).count("preparing fineweb-10b") == 2, "preparation again")
    hold.unlink()
    jobs.attach(host, host.wanted.machine, run, on_line=said.append, say=said.append)
    assert said[-1] == "trained 3 steps"
    assert sshd.path(f"{HOME}/metal/data/fineweb-10b-gpt2/train.bin").exists()
    train(host, 3, said, data="fineweb-10b")
    assert log_of(sshd, run).count("preparing") == 2
    with pytest.raises(ProvisionError, match="there is no data set nosuch"):
        train(host, 3, data="nosuch")
    hold.touch()
    run = train(host, 3, data="hf:openwebtext/x:y@1", detach=True)
    wait_for(lambda: "preparing" in log_of(sshd, run), "preparation")
    jobs.stop(host, host.wanted.machine, say=said.append)
    assert status_of(sshd, run) == "0", "stopped before it had begun to train"


def test_data_that_is_nowhere_is_refused_here(host: Host, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for data, why in (
        (f"{tmp_path}/nothing", "there is no"),
        ("a b", "there is no"),
        (f"{tmp_path}/empty", "no file in it"),
    ):
        with pytest.raises(ProvisionError, match=why):
            train(host, 3, data=data)
    assert host.traffic.execs == 0


# Values


def test_a_split_that_was_chosen_makes_other_shards() -> None:
    folder = Folder(PurePosixPath("/home/ml/metal"))
    seen = find_data("hf:a/b:c@d", "bytes", 0.05, print)
    assert seen.key == "data/hf-a-b-c-d-bytes-0.05"
    assert prepare_arguments(seen, folder, "bytes", 0.05) == [
        *("hf:a/b:c@d", "--tokenizer", "bytes", "--val-fraction", "0.05"),
        *("--out", "/home/ml/metal/data/hf-a-b-c-d-bytes-0.05"),
    ]
    assert "--val-fraction" not in prepare_arguments(find_data("x", "gpt2", 0.1, print), folder, "gpt2", 0.1)


def test_the_unit_file_is_plain_and_a_path_with_more_is_refused() -> None:
    text = render_service("r-1", PurePosixPath("/home/ml/metal/runs/r-1"), "ml")
    assert "ConditionPathExists=!/home/ml/metal/runs/r-1/status\n" in text
    assert "ExecStart=/bin/bash /home/ml/metal/runs/r-1/unit /home/ml/metal/runs/r-1\n" in text
    with pytest.raises(ProvisionError, match="a character that a unit file"):
        render_service("r-1", PurePosixPath("/home/m l/%i"), "ml")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_systemd_finds_no_fault_in_the_unit_file(tmp_path: Path) -> None:
    unit = tmp_path / "metal-run-r-1.service"
    unit.write_text(render_service("r-1", PurePosixPath("/home/ml/metal/runs/r-1"), "root"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert str(unit.name) not in done.stderr, done.stderr
    assert done.returncode == 0


def test_the_script_quotes_what_a_person_wrote() -> None:
    script = train_script(
        Folder(PurePosixPath("/home/ml/metal")), "abc", "r-1", ["--set", "train.sample_prompt=$(x) 'y'"]
    )
    assert """'train.sample_prompt=$(x) '"'"'y'"'"''""" in script
