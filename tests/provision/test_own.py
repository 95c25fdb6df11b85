"""What a person adds by the machine file: how it is read and refused, planned, and done for real in a scratch root."""

import json
import os
import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pytest_mock import MockerFixture

from provision.errors import ProvisionError
from provision.facts import Facts
from provision.kinds import CHECKS, CheckedFile, Line, ParentFolders, UnitState
from provision.layers import render_value
from provision.machine import (
    PACKAGED_DEFAULTS,
    Machine,
    load_machine,
    named_sections,
    save_local,
    template_values,
)
from provision.schema import SCHEMA, named_examples
from provision.steps import File, Step, User, render_apply, render_plan, render_probes
from provision.steps import make_plan as plan_of_steps
from provision.system import CONCERNS, system
from provision.templates import check_template, fill
from tests.provision.conftest import KEY, Run, machine_folder
from tests.provision.test_steps import apply, plan_of
from tests.provision.test_system import GOLDEN, NOW, installed, render

GOOD = f'[disk]\nserial = "S4EWNX0R"\n[user]\nauthorized_keys = ["{KEY}"]\n'
OWN = f"""
[system]
groups = ["fcitx5-im"]
[packages]
editors = ["neovim", "helix"]
none = []
[values]
editor = "nvim"
[files."/etc/motd"]
source = "motd"
template = true
[files."~/.config/app/app.conf"]
text = "a ${{b}} $c\\n"
mode = "0600"
then = "systemctl try-restart app.service"
[files."/etc/sudoers.d/20-own"]
text = "%video ALL=(ALL) NOPASSWD: /usr/bin/nvidia-smi\\n"
mode = "440"
[files."/etc/systemd/system/own.service"]
text = "[Service]\\nExecStart=/usr/bin/true\\n"
[folders."/srv/models"]
owner = "ml:ml"
mode = "2775"
[links]
"~/models" = "/srv/models"
[lines.colour]
file = "/etc/pacman.conf"
line = "Color"
match = "^#? *Color$"
[lines.quiet]
file = "/etc/app.conf"
match = "^verbose"
[users.guest]
groups = ["video"]
authorized_keys = ["{KEY}"]
[users.robot]
password = "env:ROBOT"
[units]
"docker.service" = "enabled"
"bluetooth.service" = "disabled"
"own.timer" = "masked"
[sysctl]
"vm.swappiness" = "10"
"net.ipv4.tcp_rmem" = "4096  131072 6291456"
"""


def wish(folder: Path, text: str) -> Machine:
    (folder / "files").mkdir(parents=True, exist_ok=True)
    (folder / "files/motd").write_text("${system.hostname} $HOME $${system.hostname} ${values.editor}\n")
    return load_machine("gpu1", machine_folder(folder, GOOD + text))


def error_of(folder: Path, text: str) -> str:
    with pytest.raises(ProvisionError) as caught:
        wish(folder, text)
    return caught.value.message


def added(machine: Machine, plain: Machine, live: Facts, system_name: str) -> list[Step]:
    """The Steps that differ from those of the plain machine, which has golden files of its own."""
    facts = live if system_name == "live" else installed(machine, live)
    usual = set(system(plain, facts, NOW))
    return [step for step in system(machine, facts, NOW) if step not in usual]


@pytest.mark.parametrize("system_name", ["live", "installed"])
def test_golden_steps_of_what_is_added(
    tmp_path: Path, machine: Machine, live: Facts, system_name: str
) -> None:
    rendered = render(added(wish(tmp_path / "own", OWN), machine, live, system_name))
    golden = GOLDEN / f"own-{system_name}.txt"
    if "UPDATE_GOLDEN" in os.environ:  # then read the difference, line by line
        golden.write_text(rendered)
    assert rendered == golden.read_text()


def test_what_is_added_is_bash(tmp_path: Path, machine: Machine, live: Facts) -> None:
    steps = added(wish(tmp_path / "own", OWN), machine, live, "installed")
    plan = plan_of_steps("", steps, [("?", True)] * len(steps))
    for script in (render_probes(steps, ""), render_apply(plan, "")):
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr + script


def test_the_examples_of_the_defaults_are_a_machine_that_is_planned(
    tmp_path: Path, machine: Machine, live: Facts
) -> None:
    examples = named_examples(PACKAGED_DEFAULTS.read_text())
    assert set(examples) == set(named_sections())
    text = "\n".join(examples.values()).replace('text = ""', "").replace("~/.ssh/guest.pub", KEY)
    loaded = wish(tmp_path / "own", text)
    assert added(loaded, machine, live, "installed")
    for section in named_sections():
        assert getattr(loaded, section), section


def test_every_key_of_a_table_is_in_the_example_and_has_a_meaning_in_the_schema() -> None:
    properties = json.loads(SCHEMA.read_text())["properties"]
    for section, thing in named_sections().items():
        assert properties[section]["description"], section
        assert properties[section]["additionalProperties"]["anyOf"][1] == {"const": False}
        each = properties[section]["additionalProperties"]["anyOf"][0]
        if isinstance(thing.each, dict):
            assert set(each["properties"]) == set(thing.each)
            for key, described in each["properties"].items():
                assert described.get("description"), f"{section}.{key}"
    assert properties["lines"]["additionalProperties"]["anyOf"][0]["required"] == ["file"]


def test_files_of_a_machine_add_up_by_name(tmp_path: Path) -> None:
    base = """
[packages]
shell = ["zsh"]
tools = ["htop"]
[files."/etc/a"]
text = "base"
mode = "600"
[files."/etc/b"]
text = "b"
[units]
"a.service" = "enabled"
"""
    machine_folder(tmp_path, base, "base")
    own = 'extends = "base"\n' + GOOD
    own += '[packages]\ntools = ["btop"]\n[files]\n"/etc/b" = false\n[files."/etc/a"]\ntext = "own"\n'
    machine = load_machine("gpu1", machine_folder(tmp_path, own))
    assert machine.packages == {"shell": ("zsh",), "tools": ("btop",)}
    assert list(machine.files) == ["/etc/a"]
    assert (machine.files["/etc/a"].text, machine.files["/etc/a"].mode) == ("own", "600")
    assert machine.units == {"a.service": "enabled"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[files."etc/motd"]\ntext = "a"', ":5: [files]: 'etc/motd' is not a path from /"),
        ('[files."/etc/../x"]\ntext = "a"', ":5: [files]: '/etc/../x' is not a path from /"),
        ('[files]\n"/etc/a" = "b"', ':6: files."/etc/a" must be a table'),
        (
            '[files."/etc/a"]\nmod = "644"',
            ":6: unknown key 'mod' in [files.\"/etc/a\"]; did you mean 'mode'?",
        ),
        ('[files."/etc/a"]\nmode = "999"', ":6: files.\"/etc/a\".mode is '999'; expected an octal mode"),
        ('[files."/etc/a"]\nmode = 644', ':6: files."/etc/a".mode must be a string, not int 644'),
        ('[files."/etc/a"]\nsource = "../x"', ':6: files."/etc/a".source is'),
        ('[files."/etc/a"]\nsource = "mtd"', "files/mtd: No such file or directory; there are: motd"),
        ('[files."/etc/a"]\nsource = "motd"\ntext = "b"', ':7: files."/etc/a": has both source and text'),
        (
            '[files."/etc/a"]\ntemplate = true\ntext = "1\\n${system.hostnam}"',
            ":7: files.\"/etc/a\": line 2 of text: unknown value ${system.hostnam}; did you mean 'system.hostname'?",
        ),
        (
            '[files."/etc/a"]\ntemplate = true\ntext = "${zzz}"',
            "unknown value ${zzz}; expected name, SECTION.SETTING",
        ),
        ('[files."/etc/a"]\ntemplate = true\ntext = "${HOME}"', "line 1 of text: expected a name such as"),
        ('[files."/etc/a"]\n[links]\n"/etc/a" = "b"', ':7: links."/etc/a": /etc/a is files./etc/a too'),
        ('[files."~/a"]\n[folders."/home/ml/a"]', ':6: folders."/home/ml/a": /home/ml/a is files.~/a too'),
        ('[lines.a]\nline = "b"', ":5: lines.a lacks 'file'"),
        ('[lines.a]\nfile = "/etc/a"', ":5: lines.a: has neither line nor match"),
        (
            '[lines.a]\nfile = "/a"\nline = "b"\nmatch = "c"',
            ":8: lines.a: 'c' does not match the line itself",
        ),
        ('[lines.a]\nfile = "/a"\nmatch = "("', ":7: lines.a: '(' is no expression"),
        ('[lines.a]\nfile = "/a"\nmatch = "\\\\d"', ":7: lines.a.match is"),
        ("[users.root]", ":5: users.root: that is root already"),
        ("[users.ml]", ":5: users.ml: that is user.name already"),
        ('[users.a]\nauthorized_keys = ["x"]', ":6: users.a: 'x' is neither a public key line"),
        ('[users.a]\npassword = "hunter2"', ":6: users.a.password holds no reference"),
        ('[units]\n"sshd.service" = "masked"', ':6: units."sshd.service": sshd.service masked: nobody could'),
        ('[units]\ndocker = "enabled"', ":6: [units]: 'docker' is not a unit"),
        ('[units]\n"a.timer" = "on"', ":6: units.\"a.timer\" is 'on'; expected enabled, disabled or masked"),
        ('[sysctl]\n"vm.swappiness" = 10', ':6: sysctl."vm.swappiness" must be a string, not int 10'),
        ('[packages]\na = "b"', ":6: packages.a must be a list of strings"),
        ("[fils]", ":5: unknown section [fils]; did you mean 'files'?"),
        ("[files]\nx = true", ":6: [files]: 'x' is not a path"),
    ],
)
def test_what_cannot_be_added(tmp_path: Path, text: str, expected: str) -> None:
    message = error_of(tmp_path / "own", text + "\n")
    assert expected in message
    assert message.startswith("1 error(s)")


def test_a_source_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a").write_bytes(b"\xff")
    (tmp_path / "files/b").write_bytes(b"a\0b")
    (tmp_path / "files/c").write_bytes(b"x" * 300_000)
    text = "".join(f'[files."/etc/{name}"]\nsource = "{name}"\n' for name in "abc")
    message = error_of(tmp_path, text)
    assert message.startswith("3 error(s)")
    for said in (
        "files/a: it is not text: it is not UTF-8",
        "files/b: it is not text",
        "files/c: it has 300000",
    ):
        assert said in message


@pytest.mark.parametrize(
    ("path", "name"),
    [("/etc/hostname", "file /etc/hostname"), ("/home/ml/.ssh/authorized_keys", "authorized_keys")],
)
def test_what_the_system_makes_anyway_is_not_yours(tmp_path: Path, live: Facts, path: str, name: str) -> None:
    machine = wish(tmp_path / "own", f'[files."{path}"]\ntext = "a"\n')
    with pytest.raises(ProvisionError, match=name):
        system(machine, installed(machine, live), NOW)


@pytest.mark.parametrize(
    "text",
    [
        '[links]\n"/etc/hostname" = "/etc/other"\n',
        '[lines.a]\nfile = "/etc/hostname"\nline = "b"\n',
        '[folders."/etc/hostname"]\n',
        '[files."/etc/a"]\ntext = "a"\n[lines.a]\nfile = "/etc/a"\nline = "b"\n',
    ],
)
def test_two_steps_that_would_undo_each_other_are_refused(tmp_path: Path, live: Facts, text: str) -> None:
    machine = wish(tmp_path / "own", text)
    with pytest.raises(ProvisionError, match="would undo each other"):
        system(machine, installed(machine, live), NOW)


def test_local_settings_with_tables_survive_being_written(tmp_path: Path) -> None:
    (tmp_path / "gpu1.local.toml").write_text(
        '[files."/etc/a"]\ntext = "x\\ny"\n[units]\n"a.timer" = "enabled"\n'
    )
    save_local(tmp_path, "gpu1", "ssh", "address", "192.168.1.7")
    machine = load_machine("gpu1", machine_folder(tmp_path, GOOD))
    assert machine.files["/etc/a"].text == "x\ny"
    assert machine.units == {"a.timer": "enabled"}
    assert render_value({"a b": {"c": [1, True]}}) == '{ "a b" = { c = [1, true] } }'


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("${name}", "gpu1"),
        ("$name $1 $$ $HOME $", "$name $1 $$ $HOME $"),
        ("$${name} a${system.kernels}b", "${name} alinux-ltsb"),
        ("${python.offline} ${ssh.port}", "false 22"),
    ],
)
def test_templates(machine: Machine, text: str, filled: str) -> None:
    values = template_values(machine)
    assert check_template(text, values) is None
    assert fill(text, values) == filled


def test_no_secret_can_be_named_in_a_template(machine: Machine) -> None:
    assert check_template("${user.password}", template_values(machine)) is not None
    assert not any("pass" in name for name in template_values(machine))


# --- done for real, in a scratch root ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "line", "match", "after"),
    [
        ("a\n#Color\nb\n", "Color", "^#? *Color$", "a\nColor\nb\n"),
        ("Color\n", "Color", "^#? *Color$", "Color\n"),
        ("a\n# Color\nb\nColor\n", "Color", "^#? *Color$", "a\nColor\nb\n"),
        ("a\nb", "x = 1", "^x *=", "a\nb\nx = 1\n"),
        ("x=0\nx = 2\n", "x = 1", "^x *=", "x = 1\n"),
        ("a\nb\na b\n", "a", "", "a\nb\na b\n"),
        ("b\n", "a", "", "b\na\n"),
        (None, "a $b 'c' \\d", "", "a $b 'c' \\d\n"),
        ("a\nverbose 1\nverbose 2\n", "", "^verbose", "a\n"),
        ("verbose\n", "", "^verbose", ""),
        (None, "", "^verbose", None),
        ("\n\ta  \n", "b", "", "\n\ta  \nb\n"),
    ],
)
def test_a_line_is_set_and_nothing_else(
    run: Run,
    root: Path,
    before: str | None,
    line: str,
    match: str,
    after: str | None,
) -> None:
    path = root / "etc/app.conf"
    if before is not None:
        path.write_text(before)
        path.chmod(0o640)
    steps = [Line("/etc/app.conf", line, match, name="a", why="")]
    result = apply(run, root, plan_of(run, root, steps))
    assert result.returncode == 0, result.stdout + result.stderr
    assert (path.read_text() if path.exists() else None) == after
    assert not plan_of(run, root, steps)
    if before is not None:
        assert path.stat().st_mode & 0o777 == 0o640
    if after is not None and line:
        path.write_text("something else\n")
        assert "+" in render_plan(plan_of(run, root, steps))


def test_folders_of_a_home_are_its_owners(run: Run, root: Path) -> None:
    (root / "home/ml").mkdir()
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/bash\nml:x:1234:1234::/home/ml:/bin/bash\n")
    (root / "etc/group").write_text("root:x:0:\nml:x:1234:\n")
    steps = [ParentFolders(["/home/ml/.config", "/home/ml/.config/app"], "ml:ml", name="app.conf", why="")]
    assert apply(run, root, plan_of(run, root, steps)).returncode == 0
    assert not plan_of(run, root, steps)
    assert (root / "home/ml/.config/app").stat().st_uid == 1234


def test_a_user_of_no_other_group_is_one_too(run: Run, root: Path) -> None:
    steps = [User("robot", shell="/bin/bash", groups=(), why="")]
    assert apply(run, root, plan_of(run, root, steps)).returncode == 0
    assert not plan_of(run, root, steps)


def test_who_has_keys_may_log_in(tmp_path: Path, live: Facts) -> None:
    machine = wish(tmp_path / "own", OWN)
    steps = {step.name: step for step in system(machine, live, NOW)}
    assert "AllowUsers ml guest\n" in steps["file /etc/ssh/sshd_config.d/10-metal.conf"].expect


def checked(path: str, content: str) -> Step:
    return CheckedFile(
        path, content, why="", check=CHECKS[path[: path.rfind("/") + 1]], user="ml", mode=0o440
    )


@pytest.mark.skipif(not shutil.which("visudo"), reason="no sudo on this computer")
def test_a_sudoers_file_that_is_none_never_gets_its_place(run: Run, root: Path) -> None:
    (root / "etc/sudoers.d").mkdir()
    good = [checked("/etc/sudoers.d/20-own", "ml ALL=(ALL:ALL) NOPASSWD: ALL\n")]
    assert in_place(run, root, good) == 0
    bad = [checked("/etc/sudoers.d/20-own", "ml ALL = everything (\n")]
    result = run(as_target(render_apply(plan_of(run, root, bad), str(root))))
    assert result.returncode != 0
    assert "refused: /etc/sudoers.d/20-own stays as it was" in result.stdout
    assert not plan_of(run, root, good)
    assert [path.name for path in (root / "etc/sudoers.d").iterdir()] == ["20-own"]


def as_target(script: str) -> str:
    """The scratch root is no system to arch-chroot into; chroot does for these programs."""
    return script.replace("arch-chroot", "chroot")


def in_place(run: Run, root: Path, steps: list[Step]) -> int:
    result = run(as_target(render_apply(plan_of(run, root, steps), str(root))))
    print(result.stdout, result.stderr)
    return result.returncode


@pytest.fixture
def ssh_root(root: Path) -> Path:
    (root / "etc/ssh/sshd_config.d").mkdir(parents=True)
    (root / "run").mkdir()
    key = root / "etc/ssh/ssh_host_ed25519_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    (root / "etc/ssh/sshd_config").write_text(
        "Include /etc/ssh/sshd_config.d/*.conf\nAuthorizedKeysFile .ssh/authorized_keys\nUsePAM yes\n"
    )
    (root / "etc/ssh/sshd_config.d/10-metal.conf").write_text(
        "HostKey /etc/ssh/ssh_host_ed25519_key\nPasswordAuthentication no\nAllowUsers guest ml\n"
    )
    with (root / "etc/passwd").open("a") as passwd:
        passwd.write("ml:x:1234:1234::/home/ml:/bin/bash\nsshd:x:120:65534::/run/sshd:/usr/sbin/nologin\n")
    (root / "home/ml/.ssh").mkdir(parents=True)
    (root / "home/ml/.ssh/authorized_keys").write_text(f"{KEY}\n")
    return root


@pytest.mark.skipif(not Path("/usr/sbin/sshd").exists(), reason="no sshd on this computer")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("MaxAuthTries 4\n", ""),
        ("Match User guest\n  X11Forwarding no\n", ""),
        ("Prot 22\n", "Bad configuration option"),
        ("PubkeyAuthentication no\n", "sshd takes no public keys"),
        ("AuthenticationMethods publickey,publickey\n", "a key alone does not log in"),
        ("DenyUsers ml\n", "ml may not log in"),
        ("Match User ml\n  PubkeyAuthentication no\n", "sshd takes no public keys"),
        ("AllowGroups wheel\n", "groups decide who logs in"),
    ],
)
def test_an_sshd_setting_that_locks_out_never_gets_its_place(
    run: Run,
    ssh_root: Path,
    content: str,
    said: str,
) -> None:
    path = "/etc/ssh/sshd_config.d/05-own.conf"
    steps: list[Step] = [checked(path, content)]
    result = run(as_target(render_apply(plan_of(run, ssh_root, steps), str(ssh_root))))
    assert (result.returncode == 0) == (not said), result.stdout + result.stderr
    assert said in result.stdout
    there = sorted(file.name for file in (ssh_root / "etc/ssh/sshd_config.d").iterdir())
    assert there == ["10-metal.conf"] if said else ["05-own.conf", "10-metal.conf"]


@pytest.mark.skipif(not Path("/usr/sbin/sshd").exists(), reason="no sshd on this computer")
def test_hardening_gets_its_place_where_there_are_keys_and_only_there(
    run: Run, ssh_root: Path, tmp_path: Path, live: Facts
) -> None:
    machine = wish(tmp_path / "own", "[sshd]\nhardened = true\n")
    name = "file /etc/ssh/sshd_config.d/20-metal-hardened.conf"
    steps = [
        replace(step, then="") for step in system(machine, installed(machine, live), NOW) if step.name == name
    ]
    keys = ssh_root / "home/ml/.ssh/authorized_keys"
    keys.write_text("no key\n")
    result = run(as_target(render_apply(plan_of(run, ssh_root, steps), str(ssh_root))))
    assert result.returncode != 0
    assert "ml has no keys to log in with" in result.stdout
    keys.write_text(f"{KEY}\n")
    assert in_place(run, ssh_root, steps) == 0
    assert not plan_of(run, ssh_root, steps)


# A systemctl over two files: what is enabled, what is active.
STANDIN = r"""
systemctl() {
  local words=() word
  for word in "$@"; do case $word in --root=*|--property|--value|Type) ;; *) words+=("$word") ;; esac; done
  set -- "${words[@]}"
  touch /tmp/active
  case $1 in
    is-enabled) cat "/tmp/enabled-$2" 2> /dev/null || { echo disabled; return 1; } ;;
    is-active) grep -qx "$2" /tmp/active && echo active || { echo inactive; return 3; } ;;
    cat) [[ $2 != missing.service ]] ;;
    show) [[ $2 == once.service ]] && echo oneshot || echo simple ;;
    enable) echo enabled > "/tmp/enabled-$2" ;;
    disable|unmask) rm -f "/tmp/enabled-$2" ;;
    mask) echo masked > "/tmp/enabled-$2" ;;
    start) [[ $2 == once.service ]] || echo "$2" >> /tmp/active ;;
    stop) sed -i "/^$2$/d" /tmp/active ;;
  esac
}
"""


@pytest.mark.parametrize("first", ["enabled", "disabled", "masked"])
@pytest.mark.parametrize("then", ["enabled", "disabled", "masked"])
@pytest.mark.parametrize("unit", ["a.service", "once.service"])
def test_units_go_from_every_state_to_every_other(tmp_path: Path, first: str, then: str, unit: str) -> None:
    """systemctl is a stand-in here (no systemd runs where tests do); the bash around it is real."""

    def bash(script: str) -> subprocess.CompletedProcess[str]:
        text = f"root=\n{STANDIN}{script}".replace("/tmp/", f"{tmp_path}/")
        return subprocess.run(["bash", "-euo", "pipefail", "-c", text], capture_output=True, text=True)

    for state in (first, then):
        step = UnitState(unit, state, why="")
        result = bash(step.script)
        assert result.returncode == 0, result.stdout + result.stderr
        assert step.is_done(bash(f"set +e\n{step.probe}").stdout), state
    missing = bash(UnitState("missing.service", "enabled", why="").script)
    assert "there is no unit missing.service" in missing.stdout


@pytest.mark.skipif(not shutil.which("systemctl"), reason="no systemd on this computer")
@pytest.mark.parametrize("first", ["enabled", "disabled", "masked"])
@pytest.mark.parametrize("then", ["enabled", "disabled", "masked"])
def test_the_real_systemctl_agrees_on_a_root_that_is_not_running(
    tmp_path: Path, first: str, then: str
) -> None:
    folder = tmp_path / "usr/lib/systemd/system"
    folder.mkdir(parents=True)
    (folder / "a.timer").write_text("[Timer]\nOnBootSec=1\n[Install]\nWantedBy=timers.target\n")
    (folder / "a.service").write_text("[Service]\nExecStart=/usr/bin/true\n")

    def bash(script: str) -> subprocess.CompletedProcess[str]:
        words = ["bash", "-euo", "pipefail", "-c", f"root={tmp_path}\n{script}"]
        return subprocess.run(words, capture_output=True, text=True)

    for state in (first, then):
        step = UnitState("a.timer", state, why="")
        result = bash(step.script)
        assert result.returncode == 0, result.stdout + result.stderr
        assert step.is_done(bash(f"set +e\n{step.probe}").stdout), state
    cannot = bash(UnitState("a.service", "enabled", why="").script)
    assert "a.service is static, and cannot be enabled" in cannot.stdout


def test_a_checked_file_is_probed_like_any_file() -> None:
    plain, tried = File("/etc/x", "a", why=""), CheckedFile("/etc/x", "a", why="", check="true", user="ml")
    assert (plain.probe, plain.expect, plain.name) == (tried.probe, tried.expect, tried.name)
    assert re.search(r"metal-new.*\n.*refused", tried.script, re.DOTALL)


# --- drift --------------------------------------------------------------------------------------------------

MANAGED = "".join(
    f'[files."/etc/own/file{n}"]\ntext = "one\\ntwo {n}\\n"\nmode = "640"\n[folders."/srv/folder{n}"]\nmode = "750"\n'
    f'[lines.line{n}]\nfile = "/etc/lines{n}"\nline = "wanted"\nmatch = "^(un)?wanted$"\n[users.user{n}]\ngroups = ["wheel"]\n'
    for n in range(10)
) + "[links]\n" + "".join(f'"/etc/own/link{n}" = "/srv/folder{n}"\n' for n in range(10))  # fmt: skip
# kind of Step → what may happen to it, as bash over $path
DAMAGE = {
    "file": ["echo other > $path", "chmod 600 $path", "chown 0:998 $path", "rm $path", "mv $path x; ln -s ../x $path", "echo >> $path; echo a >> $path"],
    "directory": ["chmod 700 $path", "chown 1:0 $path", "rmdir $path", "rmdir $path; touch $path; rm $path"],
    "link": ["ln -sfn /elsewhere $path", "rm $path", "rm $path; touch $path"],
    "line": ["echo unwanted >> $path", "rm $path", "echo wanted >> $path", "echo other > $path"],
    "user": ["sed -i '/^'$name':/s,/bin/bash,/bin/false,' etc/passwd", "rm -r home/$name", "sed -i -E '/^wheel:/s/,?'$name'\\>//' etc/group", "sed -i '/^'$name':/d' etc/passwd etc/group etc/shadow"],
}  # fmt: skip


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_changes_is_shown_and_mended(
    run: Run, root: Path, tmp_path: Path, machine: Machine, live: Facts, seed: int
) -> None:
    """Fifty things, each changed in a way drawn by chance: the plan lists these and no other, and mends them."""
    chance = random.Random(seed)
    (root / "srv").mkdir()
    steps = [
        step
        for step in added(wish(tmp_path / "own", MANAGED), machine, live, "installed")
        if not step.packages
    ]
    assert len(steps) == 50
    first = apply(run, root, plan_of(run, root, steps))
    assert first.returncode == 0, first.stdout + first.stderr
    assert not plan_of(run, root, steps)
    harmed = chance.sample(steps, 25)
    for step in harmed:
        kind, _, rest = step.name.partition(" ")
        path = rest.rpartition(" of ")[2]
        done = chance.choice(DAMAGE[kind])
        script = f"path={path.lstrip('/')} name={rest.split()[0]}\n{done}"
        subprocess.run(["bash", "-euc", script], cwd=root, check=True)
    plan = plan_of(run, root, steps)
    assert {planned.step.name for planned in plan.pending} == {step.name for step in harmed}
    mended = apply(run, root, plan)
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert not plan_of(run, root, steps)


def test_the_concern_in_the_readme_is_one(mocker: MockerFixture, machine: Machine, live: Facts) -> None:
    """A person copies it beside the others, with the imports that those have, and puts its name into the list."""
    readme = (PACKAGED_DEFAULTS.parent.parent / "README.md").read_text()
    (example,) = re.findall(r"```python\n(def \w+\(machine: Machine, facts: Facts\)[^`]*)```", readme)
    names: dict[str, Any] = {}
    exec(
        "from collections.abc import Iterator\nfrom provision.facts import Facts\nfrom provision.machine import Machine\n"
        f"from provision.steps import *\n{example}",
        names,
    )
    concern = names[re.match(r"def (\w+)", example)[1]]  # type: ignore[index]
    cellar = replace(machine, name="cellar1")
    plain = system(cellar, live, NOW)
    mocker.patch("provision.system.CONCERNS", (*CONCERNS, concern))
    assert {step.name for step in system(cellar, live, NOW)} - {step.name for step in plain}
