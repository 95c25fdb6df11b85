"""Environments that are really made, by uv, of wheels with a line of code each; what is called torch is such a one, too.

A cut is SIGKILL to the whole process group: before each command of the script, and in the middle of each call of uv.
`sync` is a mock that does nothing: no power is cut here, and a real one waits for all that this computer writes.
"""

import hashlib
import http.server
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from provision.errors import ProvisionError
from provision.facts import Facts
from provision.machine import Machine, load_machine
from provision.own import EnvironmentWanted
from provision.steps import Step, prelude
from provision.system.python import PREFIX, own_environments, python
from tests.provision.conftest import KEY
from tests.provision.wheels import make_wheel, uv

__all__ = ["uv"]

INTERPRETER = str(Path(sys.executable).resolve())


@dataclass
class Box:
    """An installed machine whose /opt/metal is a folder here, and where uv is."""

    folder: Path
    uv: Path
    machine: Machine
    facts: Facts

    @property
    def metal(self) -> Path:
        return self.folder / "metal"

    @property
    def wheels(self) -> Path:
        return self.folder / "wheels"

    def wish(self, **changes: object) -> Machine:
        changes = {
            "interpreter": INTERPRETER, "offline": True, "find_links": self.wheels.as_uri(), "torch": "torch",
            "packages": ("demo",), **changes,
        }  # fmt: skip
        return replace(self.machine, python=replace(self.machine.python, **changes))  # type: ignore[arg-type]

    def step(self, machine: Machine, name: str = "python environment") -> Step:
        steps = [*python(machine, self.facts), *own_environments(machine, self.facts)]
        return next(step for step in steps if step.name == name)

    def bash(self, text: str, *, first: Path | None = None) -> subprocess.CompletedProcess[str]:
        """In a process group of its own; `first`: a folder before uv's on PATH."""
        path = [str(folder) for folder in (first, self.folder / "bin", self.uv) if folder]
        script = f"set -euo pipefail\n{prelude('')}{text}".replace(PREFIX, str(self.metal))
        process = subprocess.Popen(
            ["bash", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={"PATH": ":".join([*path, "/usr/bin", "/bin"]), "REAL_UV": str(self.uv / "uv")},
        )
        out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def make(self, machine: Machine, name: str = "python environment") -> subprocess.CompletedProcess[str]:
        return self.bash(self.step(machine, name).script)

    def is_done(self, machine: Machine, name: str = "python environment") -> bool:
        step = self.step(machine, name)
        done = self.bash(f"set +e\n{step.probe}").stdout
        return step.is_done(done.replace(str(self.metal), PREFIX))

    def versions(self, link: str = "env") -> str:
        """What is in the environment in use, said by its own Python, from every module of it."""
        code = (
            "import demo, torch, importlib, pkgutil\n"
            "for part in pkgutil.iter_modules(demo.__path__): importlib.import_module('demo.' + part.name)\n"
            "print(torch.VERSION, demo.VERSION)"
        )
        done = subprocess.run([self.metal / link / "bin/python", "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def content(self) -> dict[str, bytes]:
        """Every file of the environment in use, but what Python compiled by itself."""
        folder = (self.metal / "env").resolve()
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }


@pytest.fixture
def box(tmp_path: Path, uv: Path, machine: Machine, live: Facts) -> Box:
    box = Box(tmp_path, uv, machine, replace(live, system="installed", gpus=()))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sync").symlink_to("/bin/true")
    for version in ("1", "2"):
        make_wheel(box.wheels, "torch", version)
        make_wheel(box.wheels, "demo", version, modules=40)
    return box


def test_made_once_and_again_only_when_its_wishes_change(box: Box) -> None:
    first = box.wish(torch="torch==1", packages=("demo==1",))
    assert not box.is_done(first)
    made = box.make(first)
    assert made.returncode == 0, made.stderr
    assert box.versions() == "1 1"
    assert box.is_done(first)
    assert box.is_done(replace(first, python=replace(first.python, interpreter_mirror="https://example.org")))
    second = box.wish(torch="torch==2", packages=("demo==1",))
    assert not box.is_done(second)
    assert box.make(second).returncode == 0
    assert box.versions() == "2 1"
    names = {path.name.partition(".")[0] for path in (box.metal / "envs").iterdir()}
    assert names == {(box.metal / "env").readlink().name}, "the old one is gone"


@pytest.mark.parametrize(
    "broken", [{"packages": ("demo==99",)}, {"torch": "torch==99"}, {"lock": "demo==99\n"}]
)
def test_one_that_cannot_be_made_leaves_the_old_one_in_use(box: Box, broken: dict[str, object]) -> None:
    assert box.make(box.wish(torch="torch==1", packages=("demo==1",))).returncode == 0
    failed = box.make(box.wish(**{"torch": "torch==2", **broken}))
    assert failed.returncode != 0
    assert box.versions() == "1 1"


def test_what_was_chosen_is_chosen_again(box: Box) -> None:
    """The folder is lost, and a newer wheel has come out: the lock beside it says what was there."""
    (box.wheels / "demo-2-py3-none-any.whl").unlink()
    wished = box.wish()
    assert box.make(wished).returncode == 0
    assert box.versions() == "2 1"
    make_wheel(box.wheels, "demo", "3")
    before = box.content()
    (box.metal / "env").unlink()
    again = box.make(wished)
    assert again.returncode == 0, again.stderr
    assert box.versions() == "2 1"
    assert box.content() == before, "to the last byte"
    lock = box.step(wished).expect.replace(PREFIX, str(box.metal)) + ".lock"
    assert sorted(Path(lock).read_text().split()) == ["demo==1", "torch==2"]
    Path(lock).unlink()
    assert box.make(wished).returncode == 0
    assert box.versions() == "2 3"


def test_exactly_what_a_lock_says(box: Box) -> None:
    def pin(name: str, version: str) -> str:
        data = (box.wheels / f"{name}-{version}-py3-none-any.whl").read_bytes()
        return f"{name}=={version} --hash=sha256:{hashlib.sha256(data).hexdigest()}\n"

    locked = box.wish(lock=pin("torch", "1") + pin("demo", "2"))
    made = box.make(locked)
    assert made.returncode == 0, made.stderr
    assert box.versions() == "1 2"
    assert box.is_done(replace(locked, python=replace(locked.python, packages=("other",)))), (
        "the lock alone counts"
    )
    make_wheel(box.wheels, "demo", "2", modules=3)  # another file under the same name
    changed = replace(locked, python=replace(locked.python, lock=locked.python.lock + "# changed\n"))
    assert not box.is_done(changed)
    subprocess.run(["rm", "-rf", box.metal / "cache"], check=True)
    refused = box.make(changed)
    assert refused.returncode != 0
    assert "Hash mismatch" in refused.stderr
    assert box.versions() == "1 2"


def test_own_environments_stand_beside_and_what_is_in_use_is_not_pruned(box: Box) -> None:
    def wishing(version: str) -> Machine:
        wanted = {"note": EnvironmentWanted(requirements=("torch", f"demo=={version}")), "same": EnvironmentWanted(requirements=("torch", f"demo=={version}"))}  # fmt: skip
        return replace(box.wish(), environments=wanted)

    for name in ("python environment", "python environment note", "python environment same"):
        made = box.make(wishing("1"), name)
        assert made.returncode == 0, made.stderr
    assert box.versions() == "2 2"
    assert box.versions("environments/note") == box.versions("environments/same") == "2 1"
    old = (box.metal / "environments/note").resolve()
    assert old == (box.metal / "environments/same").resolve()
    library = old / "pyvenv.cfg"  # stands for a library, which lies in the memory of who uses it
    reader = subprocess.Popen(
        [sys.executable, "-c", f"import mmap, sys; f = open({str(library)!r}); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ);"
         "print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with reader:
        assert reader.stdout
        reader.stdout.readline()
        assert box.make(wishing("2"), "python environment note").returncode == 0
        assert old.exists(), "the other name leads to it"
        made = box.make(wishing("2"), "python environment same")
        assert "is in use" in made.stdout
        assert old.exists()
        assert reader.stdin
        reader.stdin.close()
    assert box.versions("environments/same") == "2 2"
    assert box.make(box.wish(torch="torch==1")).returncode == 0
    assert not old.exists()
    assert box.versions("environments/same") == "2 2"


# --- cut off ---------------------------------------------------------------------------------------------------------

# In the place of uv: the call with this number is killed after a while, with all that started it.
CUT_UV = """#!/bin/bash
calls="${0%/*}/calls"
echo >> "$calls"
if [[ $(wc -l < "$calls") == CALL ]]; then
  "$REAL_UV" "$@" & sleep DELAY; kill -KILL 0
fi
exec "$REAL_UV" "$@"
"""


def cut_points() -> Iterator[tuple[int, int, float]]:
    """(before which command, in which call of uv, after how long): the commands end where the script did not notice."""
    for call in range(1, 5):
        for delay in (0.005, 0.03):
            yield 0, call, delay
    for command in (*range(1, 30), *range(30, 300, 15)):  # the later ones clear away what attempts left
        yield command, 0, 0.0


def test_cut_anywhere_the_old_one_works(box: Box, tmp_path: Path) -> None:
    """Each attempt is for an environment that was not yet there, on what the attempts before it left behind."""
    assert box.make(box.wish(torch="torch==1", packages=("demo==1",))).returncode == 0
    works, cut = "1 1", 0
    for number, (command, call, delay) in enumerate(cut_points(), 10):
        make_wheel(box.wheels, "demo", str(number), modules=40)
        script = box.step(box.wish(torch="torch==2", packages=(f"demo=={number}",))).script
        first = tmp_path / f"cut-{number}"
        first.mkdir()
        if call:
            text = CUT_UV.replace("CALL", str(call)).replace("DELAY", str(delay))
            (first / "uv").write_text(text)
            (first / "uv").chmod(0o755)
        else:
            script = f"commands=0\ntrap '((++commands < {command})) || kill -KILL 0' DEBUG\n{script}"
        ended = box.bash(script, first=first)
        assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
        new = f"2 {number}"
        seen = box.versions()
        assert seen in (works, new), f"cut before command {command}, in call {call} of uv"
        works = seen
        if ended.returncode == 0:
            assert seen == new
            break
        cut += 1
    else:
        pytest.fail("it never came to its end")
    assert cut >= 20
    names = {path.name.partition(".")[0] for path in (box.metal / "envs").iterdir()}
    assert names == {(box.metal / "env").readlink().name}, "nothing is left of the attempts"


# --- where things come from ------------------------------------------------------------------------------------------


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """A server that has nothing: its URL, and what it was asked for."""
    paths = list[str]()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", paths
        server.shutdown()


def test_interpreters_come_from_the_mirror(box: Box, asked: tuple[str, list[str]]) -> None:
    """uv asks it for the interpreter. A download that works needs the file itself, which is not here."""
    url, paths = asked
    assert box.make(box.wish(torch="torch==1", packages=("demo==1",))).returncode == 0
    failed = box.make(box.wish(interpreter="3.12", interpreter_mirror=f"{url}/mirror"))
    assert failed.returncode != 0
    assert paths, failed.stderr
    assert all(path.startswith("/mirror/") and "cpython-3.12" in path for path in paths), paths
    assert box.versions() == "1 1"


def test_wheels_come_from_the_index_and_torch_from_its_own(box: Box, asked: tuple[str, list[str]]) -> None:
    url, paths = asked
    wished = box.wish(offline=False, find_links="", index=f"{url}/index", torch_index=f"{url}/torch")
    assert box.make(wished).returncode != 0
    assert paths == ["/torch/torch/"]
    paths.clear()
    assert (
        box.make(
            box.wish(offline=False, find_links="", index=f"{url}/index", torch_index="", lock="demo==1\n")
        ).returncode
        != 0
    )
    assert "/index/demo/" in paths
    script = box.step(box.wish(offline=False, torch_index="", index="https://example.org/simple")).script
    assert "--index-url https://download.pytorch.org/whl/cpu" in script, (
        "without cards the builds for processors"
    )


# --- the machine file ------------------------------------------------------------------------------------------------


def load(folder: Path, text: str) -> Machine:
    (folder / "box.toml").write_text(f'[disk]\nserial = "X"\n[user]\nauthorized_keys = ["{KEY}"]\n{text}')
    return load_machine("box", folder)


def test_locks_are_files_beside_the_machine_files(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/train.lock").write_text("torch==2.13.0\n")
    (tmp_path / "files/note.lock").write_text("jupyterlab==4.4.0\n")
    text = '[python]\nlock = "train.lock"\n[environments.note]\nlock = "note.lock"\ninterpreter = "3.13"\n'
    machine = load(tmp_path, text + '[environments.lab]\nrequirements = ["numpy"]\n')
    assert machine.python.lock == "torch==2.13.0\n"
    assert machine.environments["note"].lock == "jupyterlab==4.4.0\n"
    assert machine.environments["note"].interpreter == "3.13"
    assert machine.environments["lab"].requirements == ("numpy",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[python]\nlock = "no.lock"\n', r"box\.toml:6: python\.lock: .*files/no\.lock: No such file"),
        ('[python]\nlock = "empty.lock"\n', "it is empty"),
        ('[python]\nlock = "../x"\n', "files/ beside the machine files"),
        ("[environments.a]\n", "has neither requirements nor a lock"),
        ('[environments.a]\nrequirements = ["x"]\nlock = "a.lock"\n', "has both requirements and a lock"),
        ('[environments.a]\nrequirements = ["--index-url=x"]\n', "is not a requirement"),
        ('[environments.a]\ninterpreter = "new"\nrequirements = ["x"]\n', "a version such as 3.12"),
        ('[environments."../a"]\nrequirements = ["x"]\n', "is not a name"),
        ('[environments.a]\nlock = "gone.lock"\n', r"environments\.a: .*gone\.lock: No such file"),
    ],
)
def test_what_a_machine_file_cannot_ask_for(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/empty.lock").write_text("\n")
    (tmp_path / "files/a.lock").write_text("x==1\n")
    with pytest.raises(ProvisionError, match=message):
        load(tmp_path, text)
