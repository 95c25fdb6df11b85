"""60 resources on one machine: our Steps next to pyinfra and Ansible. Ratios travel, seconds do not.

    python -m tests.benchmarks.resources [--rounds 3] [--delays 0,40] [--out tests/benchmarks/RESULTS.md]

20 templated files, 10 directories, 10 line edits, 10 links, 10 guarded commands, against the private sshd of
tests/sshd.py (needs root), directly and through a relay that holds back every packet for half the round trip.
Each tool is a process of its own, from its start to its end, with no connection left from the run before.

A first pass is not timed. It counts by sshd's own log the commands that each run starts on the machine, and
compares the files there: all tools must have made the same, and a run without change must have touched nothing.
"""

import argparse
import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks.ours import BASE
from tests.benchmarks.results import PATH, write_part
from tests.sshd import Proxy, Sshd

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).with_name("peers")
ENVIRONMENT = ROOT / ".cache" / "benchmarks" / "venv"  # not ours: nothing of it is needed but here
REQUIREMENTS = ("pyinfra==3.10.*", "ansible-core==2.19.*")
TOOLS = ("ours", "pyinfra", "Ansible")
PHASES = ("first apply", "no change")
TARGETS = {("first apply", "pyinfra"): 10, ("first apply", "Ansible"): 25} | {
    ("no change", "pyinfra"): 12,
    ("no change", "Ansible"): 35,
}
TARGET_DELAY_MS = 40

SEED = f"""
rm -rf {BASE}
mkdir -p {BASE}/etc {BASE}/folders {BASE}/links {BASE}/done
for key in 0 1 2 3 4 5 6 7 8 9; do echo "key$key=old" >> {BASE}/lines.conf; done
"""

Key = tuple[str, int, str]  # tool, round trip in ms, phase


@dataclass
class Times:
    seconds: dict[Key, list[float]] = field(default_factory=dict)
    execs: dict[tuple[str, str], int] = field(default_factory=dict)  # (tool, phase)

    def ratios(self, tool: str, delay_ms: int, phase: str) -> list[float]:
        """How many times as long as ours, round by round."""
        ours = self.seconds["ours", delay_ms, phase]
        return [theirs / mine for theirs, mine in zip(self.seconds[tool, delay_ms, phase], ours, strict=True)]


def make_environment() -> None:
    """A virtual environment with the peers, made once."""
    ready = ENVIRONMENT / f"ready-{hashlib.sha256(' '.join(REQUIREMENTS).encode()).hexdigest()[:8]}"
    if ready.exists():
        return
    print(f"Making {ENVIRONMENT} with {' '.join(REQUIREMENTS)}", flush=True)
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    venv.create(ENVIRONMENT, with_pip=True)
    subprocess.run([ENVIRONMENT / "bin" / "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    ready.touch()


@dataclass(frozen=True)
class Bench:
    """The machine, and how each tool is told to reach it at a port."""

    server: Sshd
    folder: Path

    def commands(self, port: int) -> dict[str, list[str]]:
        """tool → argv. Writes what each reads: machine file, inventories, settings, known_hosts."""
        server, folder = self.server, self.folder / str(port)
        folder.mkdir(exist_ok=True)
        known = folder / "known_hosts"
        known.write_text(f"box.live {server.host_key}\n[127.0.0.1]:{port} {server.host_key}\n")
        (folder / "box.toml").write_text(
            f'[disk]\nserial = "none"\n[user]\nauthorized_keys = ["{server.public_key}"]\n'
            f'[ssh]\naddress = "127.0.0.1"\nport = {port}\nidentity = "{server.identity}"\n'
        )
        settings = {"ssh_port": port, "ssh_user": "root", "ssh_key": str(server.identity)}
        settings |= {"ssh_known_hosts_file": str(known), "ssh_strict_host_key_checking": "yes"}
        (folder / "inventory.py").write_text(f"machines = [('127.0.0.1', {settings!r})]\n")
        (folder / "inventory.ini").write_text(
            f"box ansible_host=127.0.0.1 ansible_port={port} ansible_user=root"
            f" ansible_ssh_private_key_file={server.identity}"
            f" ansible_python_interpreter={Path(sys.base_prefix) / 'bin' / 'python3'}\n"
        )
        (folder / "ansible.cfg").write_text(
            "[defaults]\n[ssh_connection]\npipelining = True\n"
            f"ssh_args = -o ControlMaster=auto -o ControlPersist=60s -o UserKnownHostsFile={known}\n"
            f"control_path_dir = {folder}/cp\n"
        )
        bin = ENVIRONMENT / "bin"
        return {
            "ours": [sys.executable, "-m", "tests.benchmarks.ours", str(folder)],
            "pyinfra": [f"{bin}/pyinfra", "-y", f"{folder}/inventory.py", f"{PEERS}/deploy.py"],
            "Ansible": [f"{bin}/ansible-playbook", "-i", f"{folder}/inventory.ini", f"{PEERS}/play.yml"],
        }

    def run(self, tool: str, port: int) -> float:
        """Seconds of one run, from the start of its process to its end."""
        argv = self.commands(port)[tool]
        self.server.drop_connections()  # Ansible leaves one open on purpose; nobody gets a warm one
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "HOME": str(self.folder / "home")}
        environment |= {"ANSIBLE_CONFIG": f"{self.folder}/{port}/ansible.cfg"}
        environment.pop("SSH_AUTH_SOCK", None)
        started = time.monotonic()
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        took_s = time.monotonic() - started
        if done.returncode:
            raise SystemExit(f"{tool} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return took_s

    def seed(self) -> None:
        self.inside(SEED)

    def tree(self, *, when: bool = False) -> str:
        """What is on the machine, and with `when` when it was last written."""
        stamp = " %T@" if when else ""
        return self.inside(
            f"cd {BASE} && find . -printf '%p %y %m %U:%G %l{stamp}\\n' | sort && find . -type f | sort | xargs sha256sum"
        )

    def inside(self, script: str) -> str:
        done = self.server.inside("bash", "-euc", script)
        if done.returncode:
            raise SystemExit(done.stderr)
        return done.stdout

    @contextmanager
    def counting(self) -> Iterator[Callable[[], int]]:
        """With sshd at a level at which it logs every session; how many were begun since."""
        server, log = self.server, self.folder / "counted.log"
        server.stop_listening()
        config = str(server.folder / "sshd_config")
        server.inside("/usr/sbin/sshd", "-f", config, "-E", str(log), "-o", "LogLevel=VERBOSE")
        time.sleep(0.5)
        yield lambda: log.read_text().count("Starting session:") if log.exists() else 0
        server.restart()


def count_execs(bench: Bench, times: Times) -> None:
    """One run of each, untimed. All must make the same of the machine, and nothing where all is done."""
    wanted = ""
    for tool in TOOLS:
        bench.seed()
        for phase in PHASES:
            before, stamped = 0, bench.tree(when=True)
            with bench.counting() as count:
                before = count()
                bench.run(tool, bench.server.port)
                times.execs[tool, phase] = count() - before
            if phase == "no change" and bench.tree(when=True) != stamped:
                raise SystemExit(f"{tool} changed something where there was nothing to change")
        wanted = wanted or bench.tree()
        if bench.tree() != wanted:
            raise SystemExit(f"{tool} made something else of it:\n{wanted}\n---\n{bench.tree()}")


def measure_round(bench: Bench, ports: Mapping[int, int], turn: int, times: Times) -> None:
    """Each tool once for each delay, in an order that turns with the rounds; `ports`: ms → port."""
    order = TOOLS[turn % len(TOOLS) :] + TOOLS[: turn % len(TOOLS)]
    for delay_ms, port in ports.items():
        for tool in order:
            bench.seed()
            for phase in PHASES:
                took_s = bench.run(tool, port)
                times.seconds.setdefault((tool, delay_ms, phase), []).append(took_s)
                what = f"round {turn + 1}, {delay_ms} ms, {tool}, {phase}"
                print(f"{what}: {took_s:.2f} s, load {load()}", flush=True)


def load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


# --- the report -------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"  # noqa: RUF001


def render(times: Times, rounds: int, delays: list[int], loads: list[str], command: str) -> str:
    """RESULTS.md: the ratios first, then the seconds they come from."""
    columns = [(phase, delay) for delay in delays for phase in PHASES]
    heads = [f"{phase}, {delay} ms" for phase, delay in columns]
    lines = [
        "# 60 resources, next to pyinfra and Ansible",
        "",
        f"Written by `{command}`; not by hand.",
        "",
        "20 templated files, 10 directories, 10 line edits, 10 links, 10 guarded commands; a whole process each, from",
        f"its start to its end, nothing warm. {rounds} interleaved rounds, ratios within a round: median (lowest–highest).",  # noqa: RUF001
        "Ours is connect, probe, and where something is pending apply and probe again. Ansible with pipelining and",
        "without facts. A pass before, not timed, saw that all make the same files and that no change touches nothing.",
        "",
        "## How many times as long as ours",
        "",
        f"| | {' | '.join(heads)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for tool in TOOLS[1:]:
        cells = [spread(times.ratios(tool, delay, phase), 1) for phase, delay in columns]
        lines.append(f"| {tool} | {' | '.join(cells)} |")
    lines += ["", *verdicts(times, delays)]
    lines += ["", "## Commands started on the machine", "", "| | first apply | no change |", "|---|---|---|"]
    lines += [
        f"| {tool} | {' | '.join(str(times.execs[tool, phase]) for phase in PHASES)} |" for tool in TOOLS
    ]
    lines += ["", "## Seconds", "", f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(columns)}"]
    for tool in TOOLS:
        cells = [spread(times.seconds[tool, delay, phase], 2) for phase, delay in columns]
        lines.append(f"| {tool} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {found}" for name, found in peer_versions().items())
    lines += [
        "",
        f"State of the machine: {os.cpu_count()} processors, load (1 minute) before and after each round {', '.join(loads)}, niceness"
        f" {os.nice(0)}; {platform.system()} {platform.release()}, Python {platform.python_version()},"
        f" fabric {version('fabric')}, paramiko {version('paramiko')}; peers: {versions}.",
    ]
    return "\n".join(lines) + "\n"


def verdicts(times: Times, delays: list[int]) -> list[str]:
    """Each target, and whether the median ratio meets it."""
    if TARGET_DELAY_MS not in delays:
        return [f"The targets are for {TARGET_DELAY_MS} ms, which was not measured."]
    lines = []
    for (phase, tool), wanted in TARGETS.items():
        found = statistics.median(times.ratios(tool, TARGET_DELAY_MS, phase))
        word = "met" if found >= wanted else "MISSED"
        lines.append(
            f"- {phase} at {TARGET_DELAY_MS} ms, at most 1/{wanted} of {tool}'s time: {word}, 1/{found:.1f}"
        )
    return lines


def peer_versions() -> dict[str, str]:
    code = "from importlib.metadata import version; print(version('pyinfra'), version('ansible-core'), version('paramiko'))"
    out = subprocess.run(
        [ENVIRONMENT / "bin" / "python", "-c", code], capture_output=True, text=True, check=True
    )
    return dict(zip(("pyinfra", "ansible-core", "paramiko"), out.stdout.split(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delays", default="0,40", help="round trips in ms")
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args()
    delays = [int(text) for text in options.delays.split(",")]
    command = f"python -m tests.benchmarks.resources --rounds {options.rounds} --delays {options.delays}"
    make_environment()
    times, loads = Times(), [load()]
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        (folder / "home").mkdir()
        server = Sshd(folder / "sshd")
        proxies = {ms: Proxy(server.port, delay_s=ms / 2000) for ms in delays if ms}
        try:
            bench = Bench(server, folder)
            count_execs(bench, times)
            ports = {ms: proxies[ms].port if ms else server.port for ms in delays}
            for turn in range(options.rounds):
                measure_round(bench, ports, turn, times)
                loads.append(load())
                write_part(render(times, turn + 1, delays, loads, command), options.out)
        finally:
            for proxy in proxies.values():
                proxy.close()
            server.close()
    print(options.out.read_text())


if __name__ == "__main__":
    main()
