"""What the tests of runs share: a machine that is installed, and a trainer that trains nothing.

The trainer has the command line, the files and the manners of the real one (it saves on SIGTERM, goes on from its
newest checkpoint, its rows are a function of the step), but needs no torch: a start takes 50 ms, not seconds.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from provision.apply import gather_facts
from provision.host import Host, connect
from provision.preflight import wanted_environment
from tests.sshd import Sshd

ROOT = Path(__file__).resolve().parents[2]

# Crashes with the status in ~/crash at the step that is named there: "STEP STATUS", or "STEP STATUS once". Sleeps ~/pace seconds a step.
TRAINER = """
import hashlib, json, os, signal, sys, time
from pathlib import Path

words = sys.argv[1:]
if words[0] == "prepare":
    out = Path(words[words.index("--out") + 1])
    print("preparing", words[1], flush=True)
    deadline = time.monotonic() + 20
    while (Path.home() / "hold").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    if words[1] == "nosuch":
        sys.exit("error: there is no data set nosuch")
    out.mkdir(parents=True)
    (out / "train.bin").write_text("tokens")
    sys.exit(0)
out = Path(words[words.index("--out") + 1]) if "--out" in words else Path(words[1])
if words[0] == "sample":
    print(words[words.index("--prompt") + 1] + " and so on", *words[words.index("--tokens"):])
    sys.exit(0)
if words[0] == "report":
    (out / "report.html").write_text("<html>report of " + out.name)
    sys.exit(0)
settings = dict(word.split("=", 1) for word in words if "=" in word)
steps = int(settings.get("train.steps", 10))
source = settings.get("data.source", "demo")
if source != "demo" and not Path(source).exists():
    sys.exit("error: there is no data " + source)
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
folder = out / "checkpoints"
folder.mkdir(exist_ok=True)
complete = sorted(folder.glob("step-*/manifest.json"))
state = json.loads((complete[-1].parent / "state.json").read_text()) if complete else {"step": 0, "bytes": 0}
step = state["step"]
(out / "config.toml").write_text(f"[model]\\nn_ctx = 8\\n[train]\\nsteps = {steps}\\n")
metrics = (out / "metrics.jsonl").open("ab")
metrics.truncate(state["bytes"])
metrics.seek(0, os.SEEK_END)
print("model    none, from step", step, flush=True)
begin = Path.home() / "begin"
time.sleep(float(begin.read_text()) if begin.exists() else 0)
if told:
    sys.exit(0)


def save():
    final = folder / f"step-{step:08d}"
    if final.exists():
        return
    staged = folder / f".{final.name}.partial"
    staged.mkdir(exist_ok=True)
    metrics.flush()
    state = json.dumps({"step": step, "steps": steps, "bytes": metrics.tell()})
    (staged / "state.json").write_text(state)
    (staged / "model.safetensors").write_bytes(bytes(1000))
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in staged.iterdir()
    }
    (staged / "manifest.json").write_text(json.dumps({"format": 1, "step": step, "files": files}))
    staged.rename(final)
    for name in ("latest", "best"):
        (folder / name).write_text(final.name + "\\n")
    for old in sorted(folder.glob("step-*"))[:-3]:
        (old / "manifest.json").unlink()
        for path in old.iterdir():
            path.unlink()
        old.rmdir()


while step < steps:
    crash = Path.home() / "crash"
    at, status, *once = crash.read_text().split() if crash.exists() else (-1, 0)
    if step == int(at):
        if once:
            crash.unlink()
        print("the trainer fails at step", step, flush=True)
        sys.stdout.flush()
        os._exit(int(status)) if int(status) < 128 else os.kill(os.getpid(), int(status) - 128)
    pace = Path.home() / "pace"
    time.sleep(float(pace.read_text()) if pace.exists() else 0.01)
    step += 1
    row = {"kind": "step", "step": step, "loss": 1 / step, "tokens": 16 * step, "tokens_per_s": 100.0}
    metrics.write(json.dumps(row).encode() + b"\\n")
    metrics.flush()
    if told:
        save()
        print("stopped at step", step, "saved", flush=True)
        sys.exit(0)
    if step % 5 == 0:
        save()
        print("step", step, flush=True)
save()
print("trained", steps, "steps", flush=True)
"""


def trainer() -> dict[str, bytes]:
    """A package for `jobs.package_files`."""
    return {"workload/__init__.py": b"", "workload/__main__.py": TRAINER.encode()}


def typed(folder: Path, machines: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`fab -H …` as a program, in `folder`, which sends the trainer that trains nothing."""
    package = folder / "package"
    for name, data in trainer().items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_bytes(data)
    (folder / "sitecustomize.py").write_text(
        "from pathlib import Path\nimport provision.source\n"
        f"root = Path({str(package)!r})\n"
        "files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob('*.py')}\n"
        "provision.source.package_files = lambda package='workload': files\n"
    )
    environment = {
        **os.environ,
        "METAL_MACHINES": str(machines),
        "XDG_STATE_HOME": str(folder / "state"),
        "COLUMNS": "200",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))),
    }
    environment.pop("SSH_AUTH_SOCK", None)
    fab = [str(Path(sys.executable).with_name("fab")), "--search-root", str(ROOT)]

    def run(hosts: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*fab, "-H", hosts, *words],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


@contextmanager
def installed(sshd: Sshd, port: int = 0, name: str = "box") -> Iterator[Host]:
    """A session to a machine that has what provision leaves behind, as far as a run looks at it."""
    sshd.pin(name=name)
    sshd.path("/etc/metal-to-model").write_text(f"{name}\n")
    machine = sshd.machine(port=port, name=name)
    with connect(machine, sshd.pins) as session:
        folder = wanted_environment(machine, gather_facts(session))
        sshd.inside("ln", "-sfnT", "/opt/metal/envs/here", folder)
        sshd.inside("ln", "-sfnT", folder, "/opt/metal/env")
        session.traffic.execs = session.traffic.bytes_sent = session.traffic.bytes_received = 0
        yield session
