"""Secrets: referred to, looked up late, used once, and nowhere to be seen."""

import hashlib
import re
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from pytest_mock import MockerFixture

from provision.apply import Progress, apply
from provision.errors import ProvisionError
from provision.facts import Facts
from provision.host import connect
from provision.machine import Machine, load_machine
from provision.secrets import Secret, ask_person, is_reference, reveal
from provision.steps import (
    Password,
    Plan,
    Planned,
    Script,
    Step,
    make_plan,
    parse_probes,
    render_apply,
    render_plan,
    render_probes,
    secret_file,
)
from provision.system import system
from tests.provision.conftest import machine_folder
from tests.sshd import Sshd, sshd

__all__ = ["sshd"]

SECRET = "correct horse $battery 'staple' \\ ü"
NEEDLE = "needle-in-the-haystack"


def test_a_secret_prints_as_stars(machine: Machine) -> None:
    secret = Secret("command:pass show gpu1")
    whole = replace(machine, user=replace(machine.user, password=secret))
    for text in (str(secret), repr(secret), f"{secret}", f"{[secret]}", f"{secret!s:>5}".strip()):
        assert "***" in text
        assert "pass" not in text
    assert "password=***" in repr(whole)
    assert "pass show" not in repr(whole)
    assert not Secret()


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("env:PASSWORD", True),
        ("file:~/secret", True),
        ("file:/etc/secret", True),
        ("command:pass show gpu1", True),
        ("prompt:Password of ml", True),
        ("", True),
        ("file:secret", False),
        ("env:", False),
        ("env:A B", False),
        ("command:  ", False),
        ("Env:PASSWORD", False),
        ("hunter2", False),
        ("prompt:a\nb", False),
    ],
)
def test_what_a_reference_is(text: str, good: bool) -> None:
    assert is_reference(text) == good


def test_the_secret_itself_in_a_machine_file_is_refused_and_not_repeated(tmp_path: Path) -> None:
    for value in ('"hunter2"', "42424242", '["hunter2"]'):
        with pytest.raises(ProvisionError) as caught:
            load_machine("gpu1", machine_folder(tmp_path, f"[user]\npassword = {value}\n"))
        assert "gpu1.toml:2: user.password" in caught.value.message
        assert "env:NAME, file:/PATH (or file:~/PATH), command:PROGRAM ARGUMENTS, or prompt:TEXT" in str(
            caught.value
        )
        assert not re.search(r"hunter2|42424242", str(caught.value))


def test_each_kind_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("METAL_TEST_SECRET", SECRET)
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    (tmp_path / "secret").chmod(0o600)
    asked: list[str] = []

    def prompt(text: str) -> str:
        asked.append(text)
        return SECRET

    assert reveal(Secret("env:METAL_TEST_SECRET")) == SECRET
    assert reveal(Secret("file:~/secret")) == SECRET
    assert reveal(Secret(f"command:cat '{tmp_path}/secret'")) == SECRET
    assert reveal(Secret("command:echo $HOME; id")) == "$HOME; id"  # no shell
    assert reveal(Secret("prompt:Password of ml"), prompt) == SECRET
    assert asked == ["Password of ml"]


def test_a_person_is_asked_on_a_terminal_and_for_one_machine(mocker: MockerFixture) -> None:
    typed = mocker.patch("getpass.getpass", return_value=SECRET)
    terminal = mocker.patch("provision.secrets.sys.stdin")
    terminal.isatty.return_value = True
    assert ask_person("Password") == SECRET
    with ThreadPoolExecutor() as pool:
        assert pool.submit(ask_person, "Password").result() == ""
    terminal.isatty.return_value = False
    assert ask_person("Password") == ""
    typed.assert_called_once_with("Password: ")


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("env:METAL_NOT_SET", "The secret at env:METAL_NOT_SET is empty or not there."),
        ("file:/nowhere/secret", "The secret at file:/nowhere/secret is empty or not there."),
        ("file:~nobody-of-that-name/x", "cannot be read"),
        ("file:{folder}", "cannot be read"),
        ("file:{folder}/open", "others on this computer may read it"),
        ("file:{folder}/lines", "is more than one line"),
        ("command:/nowhere/program", "did not give a secret: FileNotFoundError"),
        ("command:'", "did not give a secret: ValueError"),
        ("command:false", "ended with exit 1"),
        ("command:true", "is empty or not there"),
        ("prompt:Password", "is empty or not there"),
        ("", "There is no secret to look up"),
    ],
)
def test_what_cannot_be_looked_up_is_said(tmp_path: Path, reference: str, expected: str) -> None:
    (tmp_path / "open").write_text("x")
    (tmp_path / "open").chmod(0o644)
    (tmp_path / "lines").write_text("one\ntwo\n")
    (tmp_path / "lines").chmod(0o600)
    with pytest.raises(ProvisionError) as caught:
        reveal(Secret(reference.format(folder=tmp_path)), prompt=lambda _: "")
    assert expected in caught.value.message


def bash(root: Path, script: str) -> str:
    """As root, in a mount namespace: this computer's /usr in the scratch root, and a /run that is empty but for the secret."""
    secret = secret_file(Secret("env:A"))
    setup = (
        f"mount --bind /usr {root}/usr; mount --bind /dev {root}/dev; mount -t tmpfs tmpfs /run; umask 077\n"
        f'mkdir -p {secret.rpartition("/")[0]}; printf %s "$0" > {secret}; cp {secret} {secret_file(Secret("env:B"))}\n'
        "umask 022; exec bash --norc -euo pipefail -s"
    )
    argv = ["unshare", "--mount", "--propagation", "private", "bash", "-euc", setup, SECRET]
    done = subprocess.run(argv, input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr
    return done.stdout


def plan_for(root: Path, step: Step) -> Plan:
    return make_plan("scratch", [step], parse_probes([step], bash(root, render_probes([step], str(root)))))


def password_of(root: Path, user: str) -> str:
    lines = (line.split(":") for line in (root / "etc/shadow").read_text().splitlines())
    return next(fields[1] for fields in lines if fields[0] == user)


def test_the_password_is_set_found_done_and_mended(root: Path) -> None:
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/bash\nml:x:1000:1000::/home/ml:/bin/bash\n")
    (root / "etc/shadow").write_text("root:*::::::\nml:*:20000::::::\n")
    step = Password("ml", Secret("env:A"), why="console")
    plan = plan_for(root, step)
    assert SECRET not in render_plan(plan) + render_apply(plan, str(root)) + repr(plan)
    bash(root, render_apply(plan, str(root)))
    hashed = password_of(root, "ml")
    verify = ["perl", "-e", "print crypt($ARGV[0], $ARGV[1])", SECRET, hashed]
    assert subprocess.run(verify, capture_output=True, text=True, check=True).stdout == hashed
    assert hashed.startswith("$6$")
    record = root / "var/lib/metal-to-model/password/ml"
    assert record.stat().st_mode & 0o777 == 0o600
    assert not plan_for(root, step)

    assert plan_for(root, Password("ml", Secret("env:B"), why="another reference"))
    shadow = root / "etc/shadow"
    shadow.write_text(shadow.read_text().replace(hashed, "$6$other$"))
    again = plan_for(root, step)
    assert again
    bash(root, render_apply(again, str(root)))
    assert not plan_for(root, step)


def test_the_secrets_are_removed_from_the_host_also_after_a_failure(root: Path) -> None:
    for script in ("true", "false"):
        step = replace(Script("use", why="", probe="true", script=script), secret=Secret("env:A"))
        applied = render_apply(Plan("", (Planned(step, ""),), 0), str(root))
        look = f"bash -euo pipefail <(cat <<'EOF'\n{applied}\nEOF\n) || true\nls {secret_file(Secret('env:A'))} 2>&1 || true"
        assert "No such file" in bash(root, look)


def test_a_password_is_wanted_only_where_the_file_says_so(machine: Machine, live: Facts) -> None:
    def names(wanted: Machine) -> list[str]:
        return [step.name for step in system(wanted, live, 1800000000)]

    assert "password of ml" not in names(machine)
    with_password = replace(machine, user=replace(machine.user, password=Secret("env:A")))
    listed = names(with_password)
    assert listed.index("password of ml") == listed.index("user ml") + 1


def test_a_secret_travels_unseen(sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a real sshd: in the file for root while the Step runs; in no process's arguments, log or unit, and gone after."""
    monkeypatch.setenv("METAL_TEST_SECRET", NEEDLE)
    machine = sshd.machine()
    sshd.pin(live=True)
    secret = Secret("env:METAL_TEST_SECRET")
    script = f"stat --format 'mode %a %U' {secret_file(secret)}; sha256sum < {secret_file(secret)}; sleep 1"
    step = replace(Script("use", why="", probe="true", script=script), secret=secret)
    lines: list[str] = []
    progress = Progress(
        begin=lambda _: None, output=lines.append, end=lambda *_: None, log=tmp_path / "provision.log"
    )
    seen: list[str] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.append(subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout)
            time.sleep(0.05)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        with connect(machine, sshd.pins) as host:
            apply(Plan("", (Planned(step, ""),), 0), machine, host, progress)
            everything = host.run("cat /run/metal/metal-apply/* /run/standin-journal-*; ls /run/metal").stdout
    finally:
        done.set()
        watcher.join()
    assert "mode 600 root" in lines
    assert f"{hashlib.sha256(NEEDLE.encode()).hexdigest()}  -" in lines
    assert "metal-apply" in everything
    assert "secrets" not in everything.split()
    assert NEEDLE not in everything + (tmp_path / "provision.log").read_text() + "".join(seen)
    assert sum("metal-apply" in text for text in seen) > 1


def test_what_is_missing_is_said_before_anything_is_sent(sshd: Sshd, tmp_path: Path) -> None:
    machine = sshd.machine()
    sshd.pin(live=True)
    step = replace(
        Script("use", why="", probe="true", script="touch /run/touched"), secret=Secret("env:NOT_SET_AT_ALL")
    )
    progress = Progress(
        begin=lambda _: None, output=lambda _: None, end=lambda *_: None, log=tmp_path / "provision.log"
    )
    with connect(machine, sshd.pins) as host, pytest.raises(ProvisionError, match="NOT_SET_AT_ALL"):
        apply(Plan("", (Planned(step, ""),), 0), machine, host, progress)
    assert not sshd.path("/run/touched").exists()
    assert not sshd.path("/run/metal").exists()
