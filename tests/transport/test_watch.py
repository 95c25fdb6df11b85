"""A run's checkpoints come home as they are saved: the trainer that trains nothing, a real sshd, a real rsync."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from provision import jobs, runs
from provision.errors import ConnectionLost, ProvisionError
from provision.fetch import matches, parse_manifest
from provision.host import Host
from provision.watch import watch
from tests.sshd import Proxy, Sshd, wait_for
from tests.transport.trainer import installed, trainer


@pytest.fixture
def host(sshd: Sshd, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(jobs, "package_files", trainer)
    monkeypatch.setattr(runs, "RESTART_S", 0)
    with installed(sshd, proxy.port) as session:
        yield session


def start(host: Host, sshd: Sshd, steps: int) -> str:
    sshd.path("/run/home/ml/pace").write_text("0.1")
    return jobs.train(
        host, host.wanted.machine, settings=[f"train.steps={steps}"], detach=True, say=lambda text: None
    )


def test_checkpoints_come_as_they_are_saved_until_the_run_ends(
    host: Host, sshd: Sshd, proxy: Proxy, tmp_path: Path
) -> None:
    """In the middle the connection is cut. The run keeps three checkpoints; more than those come home."""
    run = start(host, sshd, 60)
    looks, said = 0, list[str]()

    def look_again(seconds: float) -> None:
        nonlocal looks
        looks += 1
        time.sleep(0.3)
        if looks == 2:
            proxy.cut()

    done = watch(host, host.wanted.machine, tmp_path, sleep=look_again, say=said.append)
    assert not done.at_work
    assert looks >= 2
    folder = tmp_path / run
    names = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert names[-1] == "step-00000060"
    assert len(names) > 3
    for name in names:
        manifest = folder / "checkpoints" / name / "manifest.json"
        for file, piece in parse_manifest(manifest.read_bytes()).items():
            assert matches(manifest.parent / file, piece)
    assert (folder / "metrics.jsonl").read_text().count("\n") == 60
    assert (folder / "checkpoints/latest").read_text() == "step-00000060\n"


def test_a_fetch_that_loses_the_connection_is_begun_again(
    host: Host, sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(host, sshd, 5)
    wait_for(lambda: bool(list(sshd.path("/run/home/ml/metal/runs").glob("*/status"))), "its end")
    rsync, said = host.rsync, list[str]()

    def lose_once(*args: object, **options: object) -> None:
        monkeypatch.setattr(host, "rsync", rsync)
        raise ConnectionLost("rsync from box ended with status 12.")

    monkeypatch.setattr(host, "rsync", lose_once)
    done = watch(host, host.wanted.machine, tmp_path, sleep=lambda seconds: None, say=said.append)
    assert done.here == 1
    assert said[1] == "rsync from box ended with status 12. Looking again in 15 s; what arrived is kept."


def test_ctrl_c_ends_the_watching_only(host: Host, sshd: Sshd, tmp_path: Path) -> None:
    run = start(host, sshd, 1000)

    def press(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(host, host.wanted.machine, tmp_path, sleep=press, say=lambda text: None)
    assert not sshd.path(f"/run/home/ml/metal/runs/{run}/status").exists()
    with pytest.raises(ProvisionError, match="expected all, latest"):
        watch(host, host.wanted.machine, tmp_path, which="x")
