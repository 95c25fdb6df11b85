"""python -m workload, as a person or a systemd unit calls it."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from workload.__main__ import main
from workload.checkpoint import list_complete
from workload.config import KEYS, load_config
from workload.runs import CONFIG

SIZES = "n_layer=1 n_head=2 n_embd=16 n_ctx=16 batch=2 micro_batch=2"
TINY = [
    *SIZES.split(),
    "tokenizer=bytes",
    "eval_sequences=2",
    "sample_tokens=8",
    "log_every=1",
    "max_seconds=0",
]


@pytest.fixture(autouse=True)
def _signals_as_before() -> "object":
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A finished run, made in this process."""
    out = tmp_path / "runs" / "one"
    settings = [*TINY, "steps=4", "eval_every=2", "save_every=2"]
    assert main(["train", "--out", str(out), "--threads", "1", "--device", "cpu", "--set", *settings]) == 0
    return out


@pytest.mark.parametrize(
    ("given", "command", "spins"),
    [({}, "sample", "100000"), ({}, "bench", None), ({"OMP_WAIT_POLICY": "active"}, "sample", None)],
)
def test_threads_wait_asleep_but_between_the_products_of_a_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict[str, str], command: str, spins: str | None
) -> None:
    """And a person's own setting stays."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    monkeypatch.setattr(os, "environ", clean | given)
    words = [str(tmp_path / "no-run")] if command == "sample" else ["--set", "nosuch=1"]
    assert main([command, *words]) == 1
    assert os.environ["OMP_WAIT_POLICY"] == given.get("OMP_WAIT_POLICY", "PASSIVE")
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_help_names_every_key_and_needs_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, workload.__main__ as m\n"
        "try: m.main(['train', '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'numpy', 'tiktoken', 'rich', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert child.returncode == 0, child.stderr
    for key in KEYS:
        assert re.search(rf"  {key} .*\w", child.stdout)
    assert "gpt2-124m" in child.stdout


def test_train_ends_with_a_sample_and_the_reports_path(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = capsys.readouterr().out
    assert re.search(
        r"^step 4/4  loss \d\.\d{4}  val \d\.\d{4} = \d\.\d{4} bits/byte  lr .* tok/s  eta 0:00$",
        output,
        re.M,
    )
    assert "OTHELLO.\n" in output
    assert re.search(r"trained 4 steps in \d+:\d\d: validation loss 5\.\d+ -> 5\.\d+, ", output)
    assert f"report   {run / 'report.html'}" in output
    assert (run / "report.html").stat().st_size > 5000
    manifest = json.loads((run / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 4)


def test_sample_eval_and_report_read_a_run_or_a_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    capsys.readouterr()
    alone = tmp_path / "alone"
    (run / "checkpoints" / "step-00000004").rename(alone)  # as one that came home without its run
    samples = []
    for path in (alone, alone, run):
        assert main(["sample", str(path), "--prompt", "To be", "--tokens", "12", "--threads", "1"]) == 0
        samples.append(capsys.readouterr().out)
    assert samples[0] == samples[1]
    assert all(sample.startswith("To be") and len(sample) > 12 for sample in samples)
    scores = []
    for path in (alone, run):
        assert main(["eval", str(path), "--sequences", "4", "--threads", "1"]) == 0
        scores.append(capsys.readouterr().out)
    assert scores[0].startswith("step 4: validation loss 5.")
    assert scores[1].startswith("step 2: validation loss 5.")
    assert sorted(path.name for path in alone.iterdir()) == sorted(
        [*json.loads((alone / "manifest.json").read_text())["files"], "manifest.json"]
    )
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").exists()


def test_prepare_and_train_on_it(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, out = tmp_path / "shards", tmp_path / "run"
    assert main(["prepare", str(text), "--out", str(shards), "--tokenizer", "bytes"]) == 0
    assert re.search(r"^train  \d,\d+ tokens of \d,\d+ bytes$", capsys.readouterr().out, re.M)
    settings = [*TINY, "steps=1", f"data.source={shards}", "sample_tokens=0"]
    assert main(["train", "--out", str(out), "--threads", "1", "--set", *settings]) == 0
    output = capsys.readouterr().out
    assert f"data     {shards}: " in output
    assert not (out / "data").exists()
    assert "sample" not in [
        json.loads(line)["kind"] for line in (out / "metrics.jsonl").read_text().splitlines()
    ]


def test_the_same_out_again_goes_on_and_refuses_another_model(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--out", str(run), "--threads", "1", "--set"]
    settings = [*TINY, "eval_every=2", "save_every=2"]
    assert main([*arguments, *settings, "steps=6"]) == 0
    output = capsys.readouterr().out
    assert f"{run}, going on from step 4" in output
    assert "trained 6 steps" in output
    assert main(["train", "--resume", "--out", str(run), "--threads", "1"]) == 0  # finished: the end again
    assert "trained 6 steps" in capsys.readouterr().out
    assert main([*arguments, "n_embd=32"]) == 1
    assert "was begun with another [model]" in capsys.readouterr().err
    assert load_config("demo", [*settings, "steps=6"]).model.n_embd == 16


def test_resume_without_out_takes_the_newest_run(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent.parent)
    assert main(["train", "--resume", "--threads", "1"]) == 0
    assert "run      runs/one, going on from step 4" in capsys.readouterr().out
    monkeypatch.chdir(run)
    assert main(["train", "--resume"]) == 1
    assert "no run below runs to resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["train", "--preset", "gpt3"], 'there is no preset "gpt3"'),
        (
            ["train", "--set", "n_layers=2", "steps=x"],
            "did you mean model.n_layer?\n--set steps=x: train.steps must be",
        ),
        (["train", "--resume", "--out", "nowhere"], "nowhere: there is no run to resume"),
        (["train", "--set", "data.source=nowhere.txt"], "nowhere.txt: there is no such file or folder"),
        (["train", "--device", "tpu"], "there is no device tpu"),
        (["sample", "nowhere"], "nowhere: there is no such folder"),
        (["sample", "."], ".: neither a complete checkpoint nor a run"),
        (["report", "."], ".: no metrics.jsonl"),
        (["prepare", "nowhere", "--out", "x"], "nowhere: there is no such file or folder"),
    ],
)
def test_errors_are_read_by_people(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert complaint in shown.err
    assert "Traceback" not in shown.err


def test_a_damaged_checkpoint_is_one_readable_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = run / "checkpoints" / "step-00000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for arguments in (
        ["sample", str(run), "--checkpoint", "latest"],
        ["train", "--resume", "--out", str(run)],
    ):
        assert main([*arguments, "--threads", "1"]) == 1
        error = capsys.readouterr().err
        assert "model.safetensors" in error
        assert "remove that folder to go on from the one before it" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_0_and_resume_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "workload",
        "train",
        "--out",
        str(out),
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    settings = [*TINY, "steps=1000000", "eval_every=1000000", "save_every=1000000"]
    with subprocess.Popen([*command, "--set", *settings], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if re.match(r"step +20/", line):
                child.send_signal(number)
                break
        rest = child.stdout.read()
        assert child.wait(timeout=60) == 0
    stopped = re.search(r"stopped at step (\d+) of 1000000, saved; go on with\n    (.+)\n", rest)
    assert stopped, rest
    step = int(stopped[1])
    assert [path.name for path in list_complete(out / "checkpoints")] == [f"step-{step:08d}"]
    assert (out / "report.html").exists()
    resumed = subprocess.run(
        [sys.executable, *stopped[2].split()[1:], "--threads", "1", "--set", f"steps={step + 2}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on from step {step}" in resumed.stdout
    assert f"trained {step + 2} steps" in resumed.stdout
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, step + 3))


def test_the_demo_begins_without_arguments(tmp_path: Path) -> None:
    """Only its beginning: the whole takes minutes."""
    command = [sys.executable, "-u", "-m", "workload", "train", "--threads", "1"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        seen = []
        for line in child.stdout:
            seen.append(line)
            if line.startswith("step 0: validation loss"):
                break
        child.terminate()
        child.communicate(timeout=60)
        assert child.returncode == 0
    assert seen[0].startswith("run      runs/demo-20")
    assert any("data     demo: 305,971 gpt2 tokens" in line for line in seen)
    assert (tmp_path / seen[0].split()[1] / CONFIG).exists()


def test_a_full_disk_is_one_readable_error(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is a stand-in: the file system's error is raised where a page would be written."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "report.html")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    assert main(["report", str(run)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the disk is full")
    assert "make room" in said
