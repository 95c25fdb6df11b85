"""The tasks as a person types them: `fab` as a program, what it prints, its exit code, and that nothing was changed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from invoke.exceptions import Exit

from provision.console import readable
from provision.pins import load_pins
from tests.provision.conftest import KEY
from tests.sshd import Sshd, sshd
from tests.transport.trainer import installed, typed

ROOT = Path(__file__).resolve().parent.parent
FAB = Path(sys.executable).with_name("fab")

__all__ = ["sshd"]


def fab(
    folder: Path, *arguments: str, answers: str = "", cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "METAL_MACHINES": str(folder),
        "XDG_STATE_HOME": str(folder / "state"),
        "COLUMNS": "200",
    }
    environment.pop("SSH_AUTH_SOCK", None)
    return subprocess.run(
        [str(FAB), "--search-root", str(ROOT), *arguments],
        cwd=cwd,
        env=environment,
        input=answers,
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one message of a task that failed as it should: no traceback, exit code 1."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.startswith("\nerror: ")
    return done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "gpu1.toml").write_text('[disk]\nserial = "X"\n[user]\nauthorized_keys = ["' + KEY + '"]\n')
    return tmp_path


@pytest.fixture
def box(sshd: Sshd) -> Path:
    """The machine files of a private sshd, whose machine is called `box`."""
    machine = sshd.machine()
    folder = sshd.folder / "machines"
    (folder / "box.local.toml").write_text(f'[ssh]\nidentity = "{sshd.identity}"\n')
    assert machine.name == "box"
    return folder


def test_list_and_help_explain(folder: Path) -> None:
    listed = fab(folder, "--list").stdout
    names = "provision plan verify update rollback inspect disks seed unlock train runs attach logs stop resume sample report remove"
    for name in (*names.split(), "fetch-checkpoints"):
        assert f"\n  {name} " in listed
    assert "--wipe" in fab(folder, "--help", "provision").stdout
    said = fab(folder, "--help", "train").stdout
    for option in ("--preset", "--data", "--name", "--set", "--detach", "--resume", "--share"):
        assert option in said


def test_the_fabfile_stays_short() -> None:
    text = (ROOT / "fabfile.py").read_text()
    assert len(text.splitlines()) <= 200
    for task in text.split("\n\n\n"):
        assert len(task.splitlines()) < 20 or task.startswith('"""'), task


@pytest.mark.parametrize(
    "task", ["provision", "plan", "update", "rollback", "train", "runs", "stop", "fetch-checkpoints"]
)
def test_without_a_host_nothing_runs_here(folder: Path, task: str) -> None:
    message = refused(fab(folder, task))
    assert "No machine was named." in message
    assert "gpu1" in message


def test_dry_is_refused(folder: Path) -> None:
    assert "Use: fab -H gpu1 plan" in refused(fab(folder, "--dry", "-H", "gpu1", "plan"))


def test_unknown_machine(folder: Path) -> None:
    assert "Did you mean 'gpu1'?" in refused(fab(folder, "-H", "gpu", "plan"))


def test_machine_file_errors_come_before_any_connection(folder: Path) -> None:
    (folder / "gpu1.toml").write_text("[disk]\nserail = 'X'\nesp_mib = 'big'\n")
    message = refused(fab(folder, "-H", "gpu1", "provision"))
    assert f"{folder}/gpu1.toml:2: unknown key 'serail' in [disk]; did you mean 'serial'?" in message
    assert f"{folder}/gpu1.toml:3: disk.esp_mib must be a whole number" in message


def test_unreachable_and_unresolvable_hosts(folder: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        (folder / "gpu1.local.toml").write_text(
            f'[ssh]\naddress = "127.0.0.1"\nport = {unused.getsockname()[1]}\n'
        )
        message = refused(fab(folder, "-H", "gpu1", "plan"))
    assert "127.0.0.1" in message
    (folder / "gpu1.local.toml").write_text('[ssh]\naddress = "no-such-host.invalid"\n')
    assert "no-such-host.invalid" in refused(fab(folder, "-H", "gpu1", "plan"))


def test_an_unknown_host_key_is_not_accepted(sshd: Sshd, box: Path) -> None:
    message = refused(fab(box, "-H", "box", "plan"))
    assert sshd.fingerprint in message
    assert "--fingerprint" in message
    assert not (box / "known_hosts").exists()


def test_a_changed_host_key_is_refused(sshd: Sshd, box: Path) -> None:
    sshd.pin()
    before = load_pins(box / "known_hosts")
    sshd.swap_host_key()
    message = refused(fab(box, "-H", "box", "provision"))
    assert "which is not the expected one" in message
    assert load_pins(box / "known_hosts") == before


def test_a_wrong_fingerprint_is_refused(sshd: Sshd, box: Path) -> None:
    assert "which is not the expected one" in refused(
        fab(box, "-H", "box", "plan", "--fingerprint", "SHA256:" + "x" * 43)
    )


def test_a_host_that_is_neither_iso_nor_ours_is_left_alone(sshd: Sshd, box: Path) -> None:
    message = refused(fab(box, "-H", "box", "provision", "--fingerprint", sshd.fingerprint, "--wipe", "none"))
    assert "is neither the Arch install ISO nor an installation of ours" in message
    assert not sshd.path("/var/lib/metal-to-model").exists()


def test_disks_are_listed_before_a_serial_is_known(sshd: Sshd, box: Path) -> None:
    (box / "box.toml").write_text(
        f"[ssh]\nport = {sshd.port}\n[user]\nauthorized_keys = ['{sshd.public_key}']\n"
    )
    done = fab(box, "-H", "box", "disks", "--fingerprint", sshd.fingerprint, "--address", "127.0.0.1")
    assert done.returncode == 0, done.stderr
    assert "/dev/" in done.stdout
    assert 'address = "127.0.0.1"' in (box / "box.local.toml").read_text()
    assert "identity" in (box / "box.local.toml").read_text()
    message = refused(fab(box, "-H", "box", "plan", "--fingerprint", sshd.fingerprint))
    assert "disk.serial is missing" in message


def test_a_machine_that_is_not_where_it_was_is_found_by_its_names(sshd: Sshd, box: Path) -> None:
    """As after a boot of the ISO with a seed: the key is pinned, the address is a new one, the name is known."""
    local = (
        f'[ssh]\naddress = "no-such-host.invalid"\nport = {sshd.port}\nidentity = "{sshd.identity}"\n'
        '[system]\nhostname = "localhost"\n'
    )
    (box / "box.local.toml").write_text(local)
    message = refused(fab(box, "-H", "box", "disks"))
    assert "no-such-host.invalid" in message, "without a pin a name says nothing"
    sshd.pin(live=True)
    done = fab(box, "-H", "box", "disks")
    assert done.returncode == 0, done.stderr
    assert "box is at localhost, by its host key." in done.stdout
    assert "/dev/" in done.stdout
    sshd.swap_host_key()
    message = refused(fab(box, "-H", "box", "disks"))
    assert "no-such-host.invalid" in message
    assert "authenticat" not in (sshd.folder / "sshd.log").read_text().lower().replace("preauth", "")


def test_a_run_from_its_start_to_its_end(sshd: Sshd, box: Path, tmp_path: Path) -> None:
    """Every verb as it is typed. The package that is sent is the trainer that trains nothing (transport/trainer.py)."""
    with installed(sshd):
        pass
    typed_fab = typed(tmp_path, box)

    def run_fab(*words: str) -> str:
        done = typed_fab("box", *words)
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    said = run_fab("train", "--name", "try", "--set", "train.steps=5000", "--detach")
    run = said.split()[0]
    assert run.endswith("-try")
    assert f"{run} has started on box" in said
    assert "is already training" in run_fab("train", "--set", "train.steps=7")
    assert "training" in run_fab("runs")
    assert "it is gone" not in run_fab("remove", "--run", run, "--yes")
    assert "saved. fab -H box resume" in run_fab("stop")
    assert "stopped at step" in run_fab("logs", "--lines", "3")
    assert "goes on" in run_fab("resume", "--detach")
    assert "was ended" in run_fab("stop", "--now")
    assert "once more and so on" in run_fab("sample", "--prompt", "once more", "--tokens", "3")
    assert f"checkpoints/box/{run}/report.html" in run_fab("report")
    assert "1 fetched into" in run_fab("fetch-checkpoints", "--which", "latest", "--watch")
    assert "was not removed" in run_fab("remove", "--run", run)
    assert "is gone from box" in run_fab("remove", "--run", run, "--yes")
    assert "No run on box yet." in run_fab("runs")


@pytest.mark.parametrize(
    ("said", "told"), [((), "goes on; the same command follows it"), (("Gone.",), "Gone.")]
)
def test_ctrl_c_says_what_becomes_of_what_was_begun(said: tuple[str, ...], told: str) -> None:
    with pytest.raises(Exit) as ended, readable(*said):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert told in str(ended.value)
