"""The verbs of runs, on two machines at once: each does its part and says whose it is. fab as a program."""

import shutil
from pathlib import Path

from tests.sshd import Sshd, wait_for
from tests.transport.trainer import installed, typed

NAMES = ("anna", "berta")


def test_every_verb_works_on_several_machines(tmp_path: Path) -> None:
    """The trainer trains nothing (transport/trainer.py). Where one has no run, the other one's work is done."""
    servers = {name: Sshd(tmp_path / name) for name in NAMES}
    machines = tmp_path / "machines"
    machines.mkdir()
    try:
        for name, server in servers.items():
            with installed(server, name=name):
                pass
            shutil.copy(server.folder / "machines" / f"{name}.toml", machines)
            (machines / f"{name}.local.toml").write_text(f'[ssh]\nidentity = "{server.identity}"\n')
            with (machines / "known_hosts").open("a") as pins:
                pins.write((server.folder / "machines" / "known_hosts").read_text())
        fab = typed(tmp_path, machines)

        def each(*words: str, of: str, code: int = 0) -> None:
            """Every machine's own lines hold `of`."""
            done = fab(",".join(NAMES), *words)
            assert done.returncode == code, done.stdout + done.stderr
            assert "Traceback" not in done.stdout + done.stderr
            for name in NAMES:
                said = [line for line in done.stdout.splitlines() if line.startswith(f"{name:5} |")]
                assert any(of in line for line in said), done.stdout

        each("runs", of="No run on")
        each(
            "train",
            "--each",
            "--name",
            "both",
            "--set",
            "train.steps=5000",
            "--detach",
            of="-both has started on",
        )
        for server in servers.values():
            wait_for(
                lambda s=server: bool(list(s.path("/run/home/ml/metal/runs").glob("*/checkpoints/latest"))),
                "a save",
            )  # type: ignore[misc]
        each("runs", of="training")
        each("stop", of="has ended, saved")
        each("logs", "--lines", "2", of="stopped at step")
        each("resume", "--detach", of="goes on, on")
        each("stop", "--now", of="was ended")
        each("sample", "--prompt", "say", of="say and so on")
        each("report", of="report.html")
        each("fetch-checkpoints", "--which", "latest", of="1 fetched into")
        for name in NAMES:
            assert (
                len(list((tmp_path / "checkpoints" / name).glob("*/checkpoints/step-*/manifest.json"))) == 1
            )
        (run,) = (path.name for path in servers["anna"].path("/run/home/ml/metal/runs").iterdir())
        done = fab("anna,berta", "remove", "--run", run)
        assert done.returncode == 1
        assert "--yes asks nothing" in done.stdout
        fab("anna,berta", "remove", "--run", run, "--yes")
        assert "No run on anna yet." in fab("anna,berta", "runs").stdout
    finally:
        for server in servers.values():
            server.close()
