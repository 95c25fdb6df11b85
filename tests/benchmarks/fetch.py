"""Deploy and fetch: what they cost where nothing changed, a large fetch next to scp and Fabric, and fetches killed.

    python -m tests.benchmarks.fetch                                                      (a minute; prints)
    python -m tests.benchmarks.fetch --megabytes 500 --kills 20 --rounds 5 --out tests/benchmarks/RESULTS.md

Against the private sshd of tests/sshd.py (needs root, and scp). Every time is that of a whole process, from its start
to its end, with no connection left from the one before. Bytes are those of the TCP connections, counted by a relay.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fabric import Connection

from provision.fetch import fetch_checkpoints, matches, parse_manifest
from provision.host import connect
from provision.machine import load_machine
from provision.preflight import look
from provision.source import content_hash, package_files
from tests.benchmarks.results import write_part
from tests.sshd import Proxy, Sshd

ROOT = Path(__file__).resolve().parents[2]
RUN = "r-1"
RUNS = "/run/home/ml/metal/runs"


@dataclass
class Bench:
    """The machine, a home for what is fetched, and how to reach it at a port."""

    server: Sshd
    folder: Path
    port: int

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def ours(self, what: str) -> list[str]:
        """A process that does it as the tasks do: connect, then one call."""
        self.server.machine(port=self.port)
        return [sys.executable, "-m", "tests.benchmarks.fetch", "--client", what, str(self.folder)]

    def options(self) -> list[str]:
        known = self.folder / "known_hosts"
        known.write_text(f"[127.0.0.1]:{self.port} {self.server.host_key}\n")
        values = {"IdentityFile": self.server.identity, "UserKnownHostsFile": known, "BatchMode": "yes"}
        return [word for key, value in values.items() for word in ("-o", f"{key}={value}")]

    def rsync(self, source: str, target: str) -> list[str]:
        shell = f"ssh -p {self.port} -l ml {' '.join(self.options())}"
        return ["rsync", "-a", "-e", shell, source, target]

    def scp(self) -> list[str]:
        source = f"ml@127.0.0.1:{RUNS}/{RUN}"
        return ["scp", "-q", "-r", "-P", str(self.port), *self.options(), source, str(self.home)]


def client(what: str, folder: Path) -> None:
    """The other end of `Bench.ours`. Prints what it cost, as JSON."""
    machines = folder / "sshd" / "machines"
    machine, key = load_machine("box", machines), str(folder / "sshd" / "identity")
    if what == "get":  # Fabric's own way: a file at a time over SFTP
        with Connection("127.0.0.1", "ml", machine.ssh.port, connect_kwargs={"key_filename": key}) as plain:
            names = plain.run(f"cd {RUNS} && find {RUN} -type f", hide=True).stdout.split()
            for name in names:
                target = folder / "home" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                plain.get(f"{RUNS}/{name}", str(target))
        return
    with connect(machine, machines / "known_hosts", key_files=[key]) as host:
        if what == "deploy":
            source = content_hash(package_files())
            seen = look(host, machine, source, "")
            if not seen.has_source:
                host.send_tree(package_files(), seen.runs.folder.source(source), as_root=False)
        else:
            fetch_checkpoints(host, machine, folder / "home", say=lambda text: None)
        print(json.dumps({"execs": host.traffic.execs, "received": host.traffic.bytes_received}))


def run(argv: Sequence[str]) -> str:
    return subprocess.run(
        argv, cwd=ROOT, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ).stdout


def timed(argv: Sequence[str]) -> tuple[float, str]:
    began = time.monotonic()
    said = run(argv)
    return time.monotonic() - began, said


def save_checkpoint(server: Sshd, size: int) -> None:
    """A run with one checkpoint whose weights are a third of `size` bytes and whose moments the rest."""
    folder = server.path(f"{RUNS}/{RUN}/checkpoints/step-00000100")
    folder.mkdir(parents=True)
    files = {}
    for name, part in (("model.safetensors", size // 3), ("optimizer.safetensors", size - size // 3)):
        digest = hashlib.sha256()
        with (folder / name).open("wb") as file:
            for start in range(0, part, 1 << 22):
                data = random.randbytes(min(1 << 22, part - start))
                digest.update(data)
                file.write(data)
        files[name] = {"bytes": part, "sha256": digest.hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": 100, "files": files}))
    (folder.parent / "latest").write_text("step-00000100\n")
    (folder.parent.parent / "metrics.jsonl").write_text('{"kind": "step"}\n' * 1000)
    subprocess.run(["chown", "-R", "4242:4242", server.path("/run/home/ml")], check=True)


@dataclass
class Cost:
    """What one command cost, round by round."""

    seconds: list[float] = field(default_factory=list)
    wire_bytes: list[int] = field(default_factory=list)
    execs: int = 1

    def line(self, name: str) -> str:
        kilobytes = f"{statistics.median(self.wire_bytes) / 1000:,.1f}"
        return f"| {name} | {self.execs} | {kilobytes} | {spread(self.seconds)} |"


def measure_no_change(bench: Bench, proxy: Proxy, rounds: int) -> dict[str, Cost]:
    """Deploy and fetch with nothing to do through the relay, next to plain rsync of the same folders."""
    package = f"{ROOT}/workload/"
    commands: dict[str, Callable[[], list[str]]] = {
        "deploy": lambda: bench.ours("deploy"),
        "rsync of the package": lambda: [
            *bench.rsync(package, "127.0.0.1:metal/rsync/"),
            "--exclude=__pycache__",
        ],
        "fetch-checkpoints": lambda: bench.ours("fetch"),
        "rsync of the runs": lambda: bench.rsync(f"127.0.0.1:{RUNS}/", str(bench.folder / "plain")),
    }
    run(["mkdir", "-p", str(bench.folder / "plain")])
    bench.server.inside("install", "-d", "-o", "ml", "-g", "ml", "/run/home/ml/metal/rsync")
    costs = {name: Cost() for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            argv = command()
            before = proxy.relayed_bytes
            seconds, said = timed(argv)
            if not turn:
                continue  # the first one has everything to do
            cost = costs[name]
            cost.seconds.append(seconds)
            cost.wire_bytes.append(proxy.relayed_bytes - before)
            if said.startswith("{"):
                cost.execs = json.loads(said)["execs"]
    return costs


def measure_large(bench: Bench, rounds: int) -> dict[str, Cost]:
    """The whole checkpoint, in turns, each into an empty home. Ours has read every byte again and compared its hash."""
    costs = {name: Cost() for name in ("fetch-checkpoints", "scp", "Fabric's get")}
    commands = {
        "fetch-checkpoints": lambda: bench.ours("fetch"),
        "scp": bench.scp,
        "Fabric's get": lambda: bench.ours("get"),
    }
    for _ in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(bench.home, ignore_errors=True)
            bench.home.mkdir()
            costs[name].seconds.append(timed(command())[0])
    return costs


@dataclass(frozen=True)
class Killed:
    """A fetch that was killed when `staged_bytes` had come, and the one that went on with them."""

    staged_bytes: int
    resumed_bytes: int  # received by the second
    wrong: int  # files below a final name that are not what their manifest says, or checkpoints without one


def kill_and_go_on(bench: Bench, size: int, seed: int) -> Killed:
    shutil.rmtree(bench.home, ignore_errors=True)
    bench.home.mkdir()
    at = random.Random(seed).randrange(size)
    fetching = subprocess.Popen(
        bench.ours("fetch"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while fetching.poll() is None and staged(bench.home) < at:
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):  # it was quicker
        os.killpg(fetching.pid, signal.SIGKILL)
    fetching.wait()
    arrived = staged(bench.home)
    wrong = count_wrong(bench.home)
    received = json.loads(run(bench.ours("fetch")))["received"]
    complete = (bench.home / RUN / "checkpoints/step-00000100/manifest.json").exists()
    return Killed(arrived, received, wrong + count_wrong(bench.home) + (not complete))


def staged(home: Path) -> int:
    total = 0
    for path in (home / ".staging").rglob("*"):
        try:
            total += path.stat().st_size * path.is_file()
        except FileNotFoundError:
            continue  # renamed meanwhile
    return total


def count_wrong(home: Path) -> int:
    """Of what lies under final names: every checkpoint must have its manifest, and be what that says."""
    wrong = 0
    for folder in home.glob("*/checkpoints/step-*"):
        try:
            pieces = parse_manifest((folder / "manifest.json").read_bytes())
        except (OSError, ValueError):
            wrong += 1
            continue
        wrong += sum(not matches(folder / name, piece) for name, piece in pieces.items())
    return wrong


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def render(
    command: str,
    delay_ms: int,
    megabytes: int,
    rounds: int,
    none: dict[str, Cost],
    large: dict[str, Cost],
    kills: Sequence[Killed],
    loads: Sequence[str],
) -> str:
    ours = large["fetch-checkpoints"].seconds
    lines = [
        "# Deploy and fetch",
        "",
        f"Written by `{command}`; not by hand.",
        "",
        "A whole process each, from its start to its end, against the private sshd; median (lowest to highest) of "
        f"{rounds} interleaved rounds.",
        "",
        f"## Nothing changed, {delay_ms} ms of round trip",
        "",
        "| | execs | kB on the wire | seconds |",
        "|---|---|---|---|",
        *(cost.line(name) for name, cost in none.items()),
        "",
        "Deploy includes every check of the machine before a run. Ours are Python with Fabric, whose start is part of it.",
        "",
        f"## {megabytes} MB, 0 ms",
        "",
        "| | seconds | times ours |",
        "|---|---|---|",
    ]
    for name, cost in large.items():
        ratios = [theirs / mine for theirs, mine in zip(cost.seconds, ours, strict=True)]
        lines.append(f"| {name} | {spread(cost.seconds)} | {spread(ratios)} |")
    lines += ["", f"## Killed at {len(kills)} random points of {megabytes} MB", ""]
    if kills:
        size = megabytes * 1_000_000
        again = [max(0, kill.resumed_bytes - (size - kill.staged_bytes)) / size for kill in kills]
        lines += [
            f"Wrong on disk after the kill, or after the next fetch: {sum(kill.wrong for kill in kills)} files.",
            f"Arrived before the kill: {spread([100 * kill.staged_bytes / size for kill in kills], 0)} % of it; moved "
            f"again by the next fetch beyond what was missing: {spread([100 * part for part in again], 1)} %.",
        ]
    lines += [
        "",
        f"State of the machine: {os.cpu_count()} processors, load (1 minute) before and after {', '.join(loads)}; "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--delay", type=int, default=40, help="round trip in ms, where nothing changed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file to write the part to")
    parser.add_argument("--client", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        return client(options.client[0], Path(options.client[1]))
    names = ("megabytes", "kills", "rounds", "delay", "seed")
    words = " ".join(f"--{name} {getattr(options, name)}" for name in names)
    loads = [f"{os.getloadavg()[0]:.1f}"]
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as name:
        folder = Path(name)
        server = Sshd(folder / "sshd")
        server.pin()
        proxy = Proxy(server.port, delay_s=options.delay / 2000)
        size = options.megabytes * 1_000_000
        try:
            save_checkpoint(server, size)
            bench = Bench(server, folder, server.port)
            bench.home.mkdir()
            large = measure_large(bench, options.rounds)
            kills = [kill_and_go_on(bench, size, options.seed + index) for index in range(options.kills)]
            none = measure_no_change(Bench(server, folder, proxy.port), proxy, options.rounds)
        finally:
            proxy.close()
            server.close()
    loads.append(f"{os.getloadavg()[0]:.1f}")
    command = f"python -m tests.benchmarks.fetch {words}"
    text = render(command, options.delay, options.megabytes, options.rounds, none, large, kills, loads)
    if options.out:
        write_part(text, options.out)
    print(text)


if __name__ == "__main__":
    main()
