"""`fab -H a,b,c`: several real sshds, fab as a program. That they work at once is counted on the hosts, not timed."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from provision.errors import ProvisionError
from provision.parallel import (
    Board,
    Row,
    RowConsole,
    Stopped,
    demand_common,
    phases,
    share_wipe,
    unique_hosts,
)
from provision.pins import pin
from tests.sshd import Sshd, wait_for
from tests.test_tasks import FAB, ROOT, fab

NAMES = ("anna", "berta", "cleo")

# Takes the place of lsblk, which `disks` asks: notes that this machine is at it, and waits until so many are.
BARRIER = """#!/bin/bash
touch {folder}/{name}
for _ in {{1..1200}}; do
  [ "$(ls {folder} | grep -vc alone)" -lt {count} ] || exec /usr/bin/lsblk "$@"
  sleep 0.05
done
touch {folder}/{name}.alone
exit 1
"""


class Fleet:
    """Three machines in one folder of machine files; their installed systems' keys are pinned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "machines"
        self.folder.mkdir()
        self.barrier = folder / "barrier"
        self.barrier.mkdir(mode=0o777)
        self.servers = {name: Sshd(folder / name) for name in NAMES}
        for name, server in self.servers.items():
            (self.folder / f"{name}.toml").write_text(
                f'[disk]\nserial = "SERIAL-{name}"\n[user]\nauthorized_keys = ["{server.public_key}"]\n'
                f'[ssh]\naddress = "127.0.0.1"\nport = {server.port}\nidentity = "{server.identity}"\n'
            )
            pin(self.folder / "known_hosts", name, server.host_key)

    def meet(self, count: int) -> None:
        """From now on `disks` ends on a machine only when `count` machines have begun it."""
        for name, server in self.servers.items():
            script = server.path("/run/bin/lsblk")
            script.write_text(BARRIER.format(folder=self.barrier, name=name, count=count))
            script.chmod(0o755)

    def met(self) -> set[str]:
        return {path.name for path in self.barrier.iterdir()}

    def log(self, name: str) -> str:
        """The one log of this machine."""
        (path,) = (self.folder / "state" / "metal-to-model" / name).glob("*-fab-*.log")
        return path.read_text()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    yield made
    for server in made.servers.values():
        server.close()


def summary(text: str) -> dict[str, str]:
    """machine → its line of the last table."""
    *_, head = re.finditer(r"machine +time +error +log", text)
    table = text[head.end() :].splitlines()[1:]
    return {line.split()[0]: line for line in table if line.strip() and line.split()[0] in NAMES}


def test_machines_are_at_work_at_the_same_time(fleet: Fleet) -> None:
    fleet.meet(len(NAMES))
    done = fab(fleet.folder, "-H", ",".join(NAMES), "disks")
    assert fleet.met() == set(NAMES), "each waited for the others and none in vain"
    assert done.returncode == 0, done.stdout + done.stderr
    ends = summary(done.stdout)
    assert list(ends) == list(NAMES)
    for name in NAMES:
        assert " ok " in ends[name]
        assert re.search(rf"^{name} +\| .*/dev/", done.stdout, re.M), "each line says whose it is"
        assert "/dev/" in fleet.log(name)


def test_one_that_fails_does_not_stop_the_others(fleet: Fleet) -> None:
    fleet.servers["anna"].swap_host_key()
    fleet.servers["berta"].stop_listening()
    done = fab(fleet.folder, "-H", ",".join(NAMES), "disks")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    ends = summary(done.stdout)
    assert "failed" in ends["anna"]
    assert "presents the host key" in ends["anna"]
    assert "failed" in ends["berta"]
    assert "127.0.0.1" in ends["berta"]
    assert " ok " in ends["cleo"]
    assert "/dev/" in fleet.log("cleo")
    assert "which is not the expected one" in fleet.log("anna")
    assert "which is not the expected one" not in fleet.log("cleo")


def test_a_machine_file_with_errors_fails_alone(fleet: Fleet) -> None:
    (fleet.folder / "berta.toml").write_text("[disk]\nserail = 'X'\n")
    done = fab(fleet.folder, "-H", "anna,berta", "disks")
    assert done.returncode == 1
    assert "unknown key 'serail'" in fleet.log("berta")
    assert " ok " in summary(done.stdout)["anna"]


def test_nobody_is_asked_and_the_option_is_named(fleet: Fleet) -> None:
    (fleet.folder / "known_hosts").unlink()
    done = fab(fleet.folder, "-H", "anna,berta", "disks", answers="yes\nyes\n")
    assert done.returncode == 1
    for name in ("anna", "berta"):
        told = f"fab -H {name} provision --fingerprint {fleet.servers[name].fingerprint}"
        assert told in fleet.log(name)
    assert not (fleet.folder / "known_hosts").exists()


def test_each_goes_on_to_its_own_next_task(fleet: Fleet) -> None:
    """anna fails in the first task and does not begin the second; cleo does both."""
    fleet.servers["anna"].stop_listening()
    done = fab(fleet.folder, "-H", "anna,cleo", "disks", "fetch-checkpoints")
    assert done.returncode == 1
    assert "/dev/" in fleet.log("cleo")
    assert "There is no run on cleo yet" in fleet.log("cleo"), "the answer to the second task"
    assert "no run on" not in fleet.log("anna")


def test_the_same_machine_twice_is_one(fleet: Fleet) -> None:
    done = fab(fleet.folder, "-H", "anna, anna,", "disks")
    assert done.returncode == 0, done.stderr
    assert "Named more than once, done once: anna" in done.stderr
    assert "anna |" not in done.stdout, "one machine is as it always was"
    assert not (fleet.folder / "state").exists()


def test_options_of_one_machine_are_refused_before_any_is_dialled(fleet: Fleet) -> None:
    done = fab(fleet.folder, "-H", "anna,cleo", "plan", "--address", "127.0.0.2")
    assert done.returncode == 1
    assert "--address says something of one machine, and 2 were named." in done.stderr
    assert not (fleet.folder / "anna.local.toml").exists()
    done = fab(fleet.folder, "-H", "anna,cleo", "provision", "--wipe=SERIAL-anna,SERIAL-berta")
    assert done.returncode == 1
    assert "SERIAL-berta is the disk of none of these machines; nothing was begun." in done.stderr
    assert not (fleet.folder / "state").exists()


def begin(fleet: Fleet, stdout: int, *arguments: str) -> "subprocess.Popen[bytes]":
    """fab in the background, with Ctrl-C as a person's shell leaves it."""
    environment = {
        **os.environ,
        "METAL_MACHINES": str(fleet.folder),
        "XDG_STATE_HOME": str(fleet.folder / "state"),
        "COLUMNS": "160",
        "TERM": "xterm",
    }
    environment.pop("SSH_AUTH_SOCK", None)
    return subprocess.Popen(
        ["env", "--default-signal=INT", str(FAB), *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
    )


def test_ctrl_c_stops_watching_all(fleet: Fleet) -> None:
    fleet.meet(len(NAMES) + 1)  # one more than there are: they wait
    process = begin(fleet, subprocess.PIPE, "-H", ",".join(NAMES), "disks")
    wait_for(lambda: fleet.met() == set(NAMES), "all three to be at it", deadline_s=60)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert "What was begun on the hosts goes on" in text
    assert all("not watched any more" in line for line in summary(text).values())
    assert len(summary(text)) == len(NAMES)


def test_a_live_line_a_machine_on_a_terminal(fleet: Fleet) -> None:
    fleet.meet(len(NAMES))
    fleet.servers["berta"].swap_host_key()
    (fleet.barrier / "someone").touch()  # takes berta's place, which will not come
    ours, theirs = pty.openpty()
    process = begin(fleet, theirs, "-H", ",".join(NAMES), "disks")
    os.close(theirs)
    seen = bytearray()

    def read() -> None:
        with suppress(OSError):  # a terminal whose other end is closed
            while data := os.read(ours, 65536):
                seen.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    assert process.wait(timeout=120) == 1
    reader.join()
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert "elapsed" in text, "the live table"
    assert b"\x1b[1A" in seen, "is drawn in place"
    assert "anna |" not in text
    assert text.count("/dev/") >= 2, "what `disks` is for is shown whole"
    assert "which is not the expected one" in text, "and so is an error"
    assert " ok " in summary(text)["cleo"]
    assert "failed" in summary(text)["berta"]


def test_each_brings_its_own_checkpoints_home(fleet: Fleet, tmp_path: Path) -> None:
    for name in ("anna", "cleo"):
        folder = fleet.servers[name].path("/run/home/ml/metal/runs/first/checkpoints/step-00000001")
        folder.mkdir(parents=True)
        manifest = {"format": 1, "step": 1, "files": {"empty": {"bytes": 0, "sha256": EMPTY}}}
        (folder / "empty").touch()
        (folder / "manifest.json").write_text(json.dumps(manifest))
        fleet.servers[name].inside("chown", "-R", "4242:4242", "/run/home/ml")
    done = subprocess.run(
        [str(FAB), "--search-root", str(ROOT), "-H", "anna,cleo", "fetch-checkpoints"],
        cwd=tmp_path,
        env={
            **os.environ,
            "METAL_MACHINES": str(fleet.folder),
            "XDG_STATE_HOME": str(fleet.folder / "state"),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("anna", "cleo"):
        manifest_here = tmp_path / f"checkpoints/{name}/first/checkpoints/step-00000001/manifest.json"
        assert manifest_here.exists(), done.stdout
        assert f"{name} | " in done.stdout, "what fetching says comes with the machine's name"


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # sha256 of nothing


def test_a_serial_lets_only_its_own_disk_be_wiped() -> None:
    disks = {"a": ["S1"], "b": ["S2"], "c": ["S3", "S4"]}
    assert share_wipe("S1, S3,", disks) == {"a": "S1", "b": "", "c": "S3"}
    assert share_wipe("S1,S4,S3", disks) == {"a": "S1", "b": "", "c": "S4,S3"}
    with pytest.raises(ProvisionError, match="S9 is the disk of none"):
        share_wipe("S1,S9", disks)
    with pytest.raises(ProvisionError, match="the disk of a and b"):
        share_wipe("S1", {"a": ["S1"], "b": ["S1"]})


def test_hosts_are_unique_by_name_and_in_order() -> None:
    assert unique_hosts(["b", " a", "", "root@b:22", "a"]) == (["b", "a"], ["b", "a"])
    assert unique_hosts(["root@10.0.0.7"]) == (["root@10.0.0.7"], [])


def test_options_of_one_machine() -> None:
    demand_common({"wipe": "S1,S2", "fingerprint": ""}, ["a", "b"], "provision")
    with pytest.raises(ProvisionError, match="--fingerprint says something of one machine"):
        demand_common({"fingerprint": "SHA256:x"}, ["a", "b"], "provision")


def test_what_is_done_together_waits_for_what_each_does_by_itself() -> None:
    def call(name: str, **options: object) -> tuple[Any, Any]:
        return SimpleNamespace(task=SimpleNamespace(name=name), kwargs=options), None

    tasks = [call("provision"), call("verify"), call("train"), call("train", each=True), call("runs")]
    done = list(phases({"a": tasks, "b": tasks}))
    assert [(together, [step[0].task.name for step in chains["b"]]) for together, chains in done] == [
        (False, ["provision", "verify"]),
        (True, ["train"]),
        (False, ["train", "runs"]),
    ]


def test_a_row_shows_the_step_at_work_and_its_last_line(tmp_path: Path) -> None:
    row = Row("anna", tmp_path / "anna" / "log")
    board = Board([row], Console(file=io.StringIO(), width=100), whole=False)
    console = RowConsole(board, row)
    with console.status("") as status:
        status.update(r"file /etc/x  [dim]\[options] of pacman[/]")
        assert (row.at, row.last) == ("file /etc/x", "[options] of pacman")
        console.print("[green]done[/] file /etc/x")
    assert (row.at, row.last) == ("", "done file /etc/x")
    assert row.log.read_text() == "done file /etc/x\n", "the log has what was printed, without colours"


def test_a_thread_ends_at_its_next_line_after_ctrl_c(tmp_path: Path) -> None:
    row = Row("anna", tmp_path / "log")
    board = Board([row], Console(file=io.StringIO()), whole=False)
    console = RowConsole(board, row)
    board.stop()
    with pytest.raises(Stopped):
        console.print("the plan, before it is applied")
    assert not row.log.exists()
