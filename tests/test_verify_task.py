"""`fab verify` against a real sshd: what it asks, what it keeps, what it leaves out. The workload is a mock that is quick."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console

from provision import verify as verifying
from provision.checks import Check, render_checks
from provision.errors import ProvisionError
from provision.host import Host
from provision.units import folder_of
from provision.verify import verify_machine
from tests.sshd import Sshd, sshd
from tests.test_tasks import fab, refused
from tests.transport.trainer import installed

__all__ = ["sshd"]

pytest.importorskip("torch")

BENCH = """
import json
print(json.dumps({"environment": "a processor, float32, torch", "tokens_per_s": 123.0, "mfu": None, "compiled": False,
                  "parameters": 7e6, "micro_batch": 2, "n_ctx": 64}))
"""


@pytest.fixture
def host(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    files = {"workload/__init__.py": b"", "workload/__main__.py": BENCH.encode()}
    monkeypatch.setattr(verifying, "package_files", lambda: files)
    # What boots this computer is not ours, and no system is booted here.
    monkeypatch.setattr(verifying, "checks", lambda machine, has_gpu: [Check("one", "echo well", "-")])
    with installed(sshd) as session:
        yield session


def test_all_of_it_is_shown_and_kept(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = verifying.long_checks
    chosen = ("disk speed", "training speed", "load")  # the others import torch once more each
    monkeypatch.setattr(
        verifying, "long_checks", lambda *given: [check for check in every(*given) if check.name in chosen]
    )
    said, console = list[str](), Console(record=True, width=150, quiet=True)
    record = verify_machine(host.wanted.machine, host, tmp_path, console, load_s=1, say=said.append)
    assert record.good
    assert [entry.name for entry in record.entries] == ["one", *chosen]
    assert record.figures["tokens_per_s"] == 123
    assert record.figures["load_tflops"] > 0
    assert any("disk speed, training speed, load (1 s)" in line for line in said)
    (path,) = (tmp_path / "verify").glob("*.json")
    assert json.loads(path.read_text())["good"] is True
    page = (tmp_path / "verify/index.html").read_text()
    assert "123 tokens/s" in page


def test_another_verification_that_is_at_work_ends_first_and_says_nothing_of_this_one(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after Ctrl-C and an update of this program, with which the checks are others."""
    before, now = (Check("disk speed", f"echo {when}", "-") for when in ("before; sleep 1", "now"))
    script = render_checks([before, Check("load", "echo before", "-")])
    host.start_unit(verifying.UNIT, script, folder=folder_of(verifying.UNIT), user="ml")
    monkeypatch.setattr(verifying, "long_checks", lambda *given: [now])
    record = verify_machine(host.wanted.machine, host, tmp_path, Console(quiet=True), say=lambda line: None)
    assert [(entry.name, entry.seen) for entry in record.entries] == [("one", "well"), ("disk speed", "now")]


def test_what_is_wrong_is_kept_and_told_with_its_remedy(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Check("two", "echo it is broken; exit 1", "mend it")
    monkeypatch.setattr(verifying, "checks", lambda machine, has_gpu: [wrong])
    said = list[str]()
    with pytest.raises(ProvisionError) as caught:
        verify_machine(host.wanted.machine, host, tmp_path, Console(quiet=True), quick=True, say=said.append)
    assert caught.value.message == "two: it is broken\n  mend it"
    assert caught.value.hint == "Then: fab -H box verify"
    assert said[0] == "Left out: disk speed, training speed, load: it shall be quick."
    (path,) = (tmp_path / "verify").glob("*.json")
    assert json.loads(path.read_text())["entries"][0]["remedy"] == "mend it"
    assert "mend it" in (tmp_path / "verify/index.html").read_text()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo figure busy_processes 2", "somebody computes on a card"),
        ("exit 1", "without a Python environment"),
    ],
)
def test_what_takes_minutes_is_left_out_where_it_would_disturb_or_say_nothing(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    monkeypatch.setattr(
        verifying, "checks", lambda machine, has_gpu: [Check("Python environment", script, "-")]
    )
    said = list[str]()
    with pytest.raises(ProvisionError) if script == "exit 1" else nullcontext():
        verify_machine(host.wanted.machine, host, tmp_path, Console(quiet=True), say=said.append)
    assert reason in said[0]


def test_as_it_is_typed(sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this computer, which is not one of ours: the exit code is 1, and each fault has its remedy."""
    with installed(sshd):
        pass
    folder = sshd.folder / "machines"
    (folder / "box.local.toml").write_text(f'[ssh]\nidentity = "{sshd.identity}"\n')
    monkeypatch.setenv("METAL_MACHINES", str(folder))
    monkeypatch.chdir(tmp_path)
    message = refused(fab(folder, "-H", "box", "verify", "--quick", cwd=tmp_path))
    assert "boot entries: loader.conf boots 'nothing', which is no entry" in message
    assert "Then: fab -H box verify" in message
    assert (tmp_path / "checkpoints/box/verify/index.html").exists()
