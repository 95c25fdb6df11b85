"""One run over two machines: real torchrun and gloo between two network namespaces, each with a private sshd.

Those tests that are about units and not about training use the trainer that trains nothing (trainer.py); systemd is
tests/standin/systemctl in all of them.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from pytest_mock import MockerFixture

from provision import crew, jobs, runs, status
from provision.crew import Member, demand_alike, process_arguments
from provision.errors import ConnectionLost, ProvisionError
from provision.host import Host
from provision.meet import Address, Listening, Node, Way, choose_nodes
from provision.preflight import look
from provision.runs import Folder
from tests.sshd import wait_for
from tests.transport.network import NAMES, Pair, pair
from tests.transport.trainer import trainer, typed
from workload.config import load_config
from workload.device import count_cores
from workload.metrics import TIMING

TINY = [
    *("model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.n_ctx=32", "data.tokenizer=bytes"),
    *(
        "train.batch=4",
        "train.micro_batch=2",
        "train.warmup=1",
        "train.log_every=10",
        "train.eval_every=100000",
    ),
    *("train.eval_sequences=2", "train.save_every=10", "train.sample_tokens=0", "train.max_seconds=0"),
    "train.steps=100000",
]
RUNS = "/run/home/ml/metal/runs"
DEADLINE_S = 120  # for a start of torchrun on a machine that has much else to do


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(runs, "RESTART_S", 0)
    with pair(tmp_path) as made:
        yield made


@pytest.fixture
def idle(two: Pair, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """The machines, with the trainer that trains nothing."""
    monkeypatch.setattr(jobs, "package_files", trainer)
    return two


def train(two: Pair, settings: list[str], lines: list[str], **options: Any) -> str:
    lead = two.hosts["anna"]
    return jobs.train(
        lead,
        lead.wanted.machine,
        settings=settings,
        beside=["berta"],
        reach=two.reach,
        on_line=lines.append,
        say=lines.append,
        **options,
    )


def stop(host: Host, two: Pair, lines: list[str], **options: Any) -> None:
    machine = host.wanted.machine
    jobs.stop(host, machine, reach=two.reach, on_line=lines.append, say=lines.append, **options)


def read(two: Pair, name: str, path: str) -> str:
    found = two.servers[name].path(f"{RUNS}/{path}")
    return found.read_text() if found.exists() else ""


def losses(text: str) -> list[dict[str, Any]]:
    """The rows of steps, whole ones, without what depends on the time of day."""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{k: v for k, v in row.items() if k not in TIMING} for row in found if row["kind"] == "step"]


def systemctl(two: Pair, name: str, *words: str) -> str:
    return two.servers[name].inside("/run/bin/systemctl", *words).stdout.strip()


def trainers(two: Pair, name: str) -> list[str]:
    """Process ids, as the machine sees them, of the ranks on it."""
    pids = two.servers[name].inside("pgrep", "-f", "workload train").stdout.split()
    return [
        pid
        for pid in pids
        if two.servers[name].inside("grep", "-qz", "^LOCAL_RANK=", f"/proc/{pid}/environ").returncode == 0
    ]


@contextmanager
def undisturbed(out: Path) -> Iterator[None]:
    """The same two ranks on this machine, inside."""
    command = ["-m", "workload", "train", "--nproc-per-node", "2", "--device", "cpu", "--out", str(out)]
    command += ["--threads", str(count_cores())]  # as many as each has there: they decide the order of sums
    with (tmp := out.with_suffix(".log")).open("w") as log:
        process = subprocess.Popen([sys.executable, *command, "--set", *TINY], stdout=log, stderr=log)
    try:
        yield
    finally:
        process.kill()  # torchrun has its parent's end for a signal
        process.wait()
        assert "Traceback" not in tmp.read_text()


# Training


def test_a_lost_trainer_costs_what_follows_the_last_checkpoint_and_changes_no_row(
    two: Pair, tmp_path: Path
) -> None:
    """berta's is killed, then the power of anna, the leader, fails; at last a person stops it on berta.

    The rows are those of the same two ranks on one machine that nobody disturbs.
    """
    out = tmp_path / "undisturbed"
    with undisturbed(out):
        lines: list[str] = []
        run = train(two, TINY, lines, detach=True)
        assert f"{run} has started on anna, on " in lines[-2]
        assert "; on berta, on " in lines[-2]
        assert "led by anna" in lines[-2]

        def rows(count: int) -> bool:
            return len(losses(read(two, "anna", f"{run}/metrics.jsonl"))) >= count

        wait_for(lambda: rows(25), "steps", DEADLINE_S)
        (pid,) = trainers(two, "berta")
        two.servers["berta"].inside("kill", "-KILL", pid)
        wait_for(
            lambda: "going on from step" in read(two, "anna", f"{run}/log"), "them to meet again", DEADLINE_S
        )
        assert "metal: another machine of this run was lost or stopped" in read(two, "anna", f"{run}/log")
        assert "metal: ended with status 1; starting again" in read(two, "berta", f"{run}/log")
        (line,) = [
            line for line in read(two, "anna", f"{run}/log").splitlines() if "going on from step" in line
        ]
        assert int(line.split()[-1]) >= 20, "the newest checkpoint"

        seen = len(losses(read(two, "anna", f"{run}/metrics.jsonl")))
        wait_for(lambda: rows(max(seen, 30) + 15), "steps after it", DEADLINE_S)
        systemctl(two, "anna", "boot")
        wait_for(
            lambda: read(two, "anna", f"{run}/log").count("going on from step") == 2,
            "them to meet again",
            DEADLINE_S,
        )
        seen = len(losses(read(two, "anna", f"{run}/metrics.jsonl")))
        wait_for(lambda: rows(seen + 5), "steps after it", DEADLINE_S)

        stop(two.hosts["berta"], two, lines)
        assert "stopped at step" in read(two, "anna", f"{run}/log")
        for name in two.hosts:
            wait_for(lambda: read(two, name, f"{run}/status") == "0\n", f"the end on {name}")  # noqa: B023
        found = losses(read(two, "anna", f"{run}/metrics.jsonl"))
        wait_for(
            lambda: len(losses((out / "metrics.jsonl").read_text())) >= len(found),
            "the other run",
            DEADLINE_S,
        )
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    assert found == losses((out / "metrics.jsonl").read_text())[: len(found)]
    state = json.loads(read(two, "anna", f"{run}/checkpoints/step-{len(found):08d}/state.json"))
    assert state["step"] == len(found), "it was saved when it was stopped"
    assert not two.servers["berta"].path(f"{RUNS}/{run}/checkpoints").exists(), "only the leader saves"


# What must hold before


def nothing_is_started(two: Pair) -> bool:
    return not any(two.servers[name].path(RUNS).exists() for name in two.hosts)


def test_where_one_refuses_nothing_is_started_anywhere(idle: Pair) -> None:
    two, lines = idle, list[str]()
    two.ip("berta", "link", "set", "cable", "down")
    with pytest.raises(ProvisionError, match="do not all reach each other") as caught:
        train(two, [], lines)
    assert "berta does not reach anna (" in caught.value.message
    assert f"10.82.{two.number}.1: port 29400: Network is unreachable" in caught.value.message
    assert "172.31.0.1: another machine answers" in caught.value.message, (
        "itself, by an address that both have"
    )
    assert "[firewall] peers" in caught.value.hint
    two.ip("berta", "link", "set", "cable", "up")
    with pytest.raises(ProvisionError, match="cannot be shared evenly by 2 processes") as caught:
        train(two, ["train.batch=9", "train.micro_batch=3"], lines)
    assert caught.value.hint == "--set train.batch=8 --set train.micro_batch=0"
    environment = two.servers["berta"].inside("readlink", "/opt/metal/env").stdout.strip()
    two.servers["berta"].inside("ln", "-sfnT", "/opt/metal/envs/other", "/opt/metal/env")
    with pytest.raises(ProvisionError, match="berta has no Python environment"):
        train(two, [], lines)
    two.servers["berta"].inside("ln", "-sfnT", environment, "/opt/metal/env")
    assert nothing_is_started(two)
    berta = two.hosts["berta"]
    own = jobs.train(
        berta, berta.wanted.machine, settings=["train.steps=100000"], detach=True, say=lines.append
    )
    with pytest.raises(ProvisionError, match=f"berta is already training: {own}"):
        train(two, [], lines)
    assert not two.servers["anna"].path(RUNS).exists()


def test_a_unit_that_cannot_start_takes_the_others_back(idle: Pair) -> None:
    """Where /etc of one machine is full or read-only, as found in the last moment."""
    two, lines = idle, list[str]()
    two.servers["anna"].inside("chattr", "+i", "/etc/systemd/system")
    broken = two.servers["anna"].path("/run/bin/systemctl")
    broken.write_text(broken.read_text().replace("  start) root; start ;;", "  start) exit 1 ;;"))
    with pytest.raises(ProvisionError, match="Nothing is at work"):
        train(two, [], lines)
    assert not list(two.servers["berta"].path(RUNS).iterdir())
    assert not list(two.servers["berta"].path("/etc/systemd/system").glob("metal-run-*"))


def test_a_machine_that_gives_no_answer_when_a_start_is_taken_back_is_named_and_why(
    mocker: MockerFixture,
) -> None:
    """The connection goes just between the two, which only a mock can time."""
    anna, berta = hosts = [mocker.Mock() for _ in NAMES]
    anna.name, berta.name = NAMES

    def stop(host: Host, *_: object, **__: object) -> None:
        if host is berta:
            raise ConnectionLost("berta does not answer.")

    mocker.patch("provision.crew.start_run", side_effect=ProvisionError("the disk is full"))
    mocker.patch("provision.crew.stop_run", side_effect=stop)
    nodes = [Node(name, 2, rank, "10.0.0.1:29400", "eth0") for rank, name in enumerate(NAMES)]
    with pytest.raises(ProvisionError) as caught:
        crew.start_all(hosts, Folder(PurePosixPath("/home/ml/metal")), "r", nodes)
    assert caught.value.message.splitlines() == [
        "the disk is full",
        "It is not known whether it began on berta: berta does not answer.",
    ]


# The verbs


def test_every_verb_knows_who_leads(idle: Pair) -> None:
    two, lines = idle, list[str]()
    anna, berta = two.hosts["anna"], two.hosts["berta"]
    run = train(two, ["train.steps=100000"], lines, detach=True)
    for name in two.hosts:
        assert read(two, name, f"{run}/hosts") == "anna berta\n"
    assert read(two, "anna", f"{run}/script") == read(two, "berta", f"{run}/script")
    assert "rank=1\n" in read(two, "berta", f"{run}/node")
    assert train(two, ["train.steps=100000"], lines, detach=True) == run
    assert lines[-1] == f"{run} is at work already"
    with pytest.raises(ProvisionError, match="anna is already training"):
        jobs.train(anna, anna.wanted.machine, settings=["train.steps=100000"], detach=True, say=lines.append)
    states = {}
    for name, host in two.hosts.items():
        values = status.variables(user="ml", name="metal", cards=status.CARDS)
        (row,) = status.parse_status(host.look(values + status.TABLE).stdout, name).rows
        states[name] = row.state.partition(",")[2]
    assert states == {"anna": " with berta", "berta": " led by anna"}
    with pytest.raises(ProvisionError, match="lies on anna, which leads it") as caught:
        jobs.sample(berta, berta.wanted.machine, "say")
    assert caught.value.hint == f"fab -H anna sample --run {run}"
    stop(anna, two, lines)
    for name in two.hosts:
        assert read(two, name, f"{run}/status") == "0\n", name
    with pytest.raises(ProvisionError, match="which leads it"):
        jobs.resume(berta, berta.wanted.machine, say=lines.append)
    jobs.resume(berta, berta.wanted.machine, beside=["anna"], say=lines.append)
    assert lines[-1] == f"{run} is led by anna, which begins it here, too."
    jobs.resume(anna, anna.wanted.machine, reach=two.reach, detach=True, say=lines.append)
    assert lines[-1] == f"{run} goes on, on anna, berta"
    wait_for(lambda: read(two, "berta", f"{run}/log").count("model    none") == 2, "it to go on")
    stop(berta, two, lines, now=True)
    for name in two.hosts:
        assert read(two, name, f"{run}/status") == "137\n", name
    jobs.remove(anna, anna.wanted.machine, run, yes=True, ask=input, say=lines.append)
    assert lines[-1] == f"Its part on berta is still there: fab -H berta remove --run {run}"


def test_a_machine_that_gives_no_answer_is_no_reason_to_end_a_run_at_work(
    idle: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`resume` of what is at work, while the way from here to berta breaks off: to the run that is nothing."""
    two, lines = idle, list[str]()
    anna, start_run = two.hosts["anna"], crew.start_run
    run = train(two, ["train.steps=100000"], lines, detach=True)

    def start(host: Host, *given: Any, **options: Any) -> str:
        if host.name == "berta":
            raise ConnectionLost("berta closed the connection.")
        return start_run(host, *given, **options)

    monkeypatch.setattr(crew, "start_run", start)
    with pytest.raises(ConnectionLost):
        jobs.resume(anna, anna.wanted.machine, reach=two.reach, detach=True, say=lines.append)
    for name in two.hosts:
        assert systemctl(two, name, "is-active", f"metal-run-{run}") == "active"
        assert read(two, name, f"{run}/status") == ""
    stop(anna, two, lines, now=True)


def test_as_it_is_typed(two: Pair, tmp_path: Path) -> None:
    """fab as a program: one run is begun, each machine says what is its own."""
    fab = typed(tmp_path, two.write_machines(tmp_path / "machines"))
    done = fab("anna,berta", "train", "--name", "both", "--set", "train.steps=100000", "--detach")
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = {path.name for name in NAMES for path in two.servers[name].path(RUNS).iterdir()}
    assert f"{run} has started on anna, on the processor" in done.stdout
    assert done.stdout.count("has started") == 1
    done = fab("anna,berta", "runs")
    for name, said in (("anna", "training, with berta"), ("berta", ", led by anna")):
        assert [
            line for line in done.stdout.splitlines() if line.startswith(f"{name:5} |") and said in line
        ], done.stdout
    done = fab("anna", "stop")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{run} has ended, saved. fab -H anna resume --run {run} lets it go on." in done.stdout
    for name in NAMES:
        assert read(two, name, f"{run}/status") == "0\n", name
    done = fab("anna,berta", "resume", "--detach")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on, on anna, berta" in done.stdout
    assert f"{run} is led by anna, which begins it here, too." in done.stdout
    done = fab("anna,berta", "stop", "--now")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in NAMES:
        assert systemctl(two, name, "is-active", f"metal-run-{run}") == "inactive", name


def test_what_fails_for_good_on_one_machine_ends_on_all(idle: Pair) -> None:
    """berta has no such data, anna would wait for it: who follows sees the reason, with the name of the machine."""
    two, lines = idle, list[str]()
    two.servers["anna"].path("/run/home/ml/data").mkdir()
    with pytest.raises(ProvisionError) as caught:
        train(two, ["train.steps=100000", "data.source=/run/home/ml/data"], lines)
    assert "berta | error: there is no data /run/home/ml/data" in lines
    assert "berta ended with status 1:\n  error: there is no data /run/home/ml/data" in caught.value.message
    (run,) = (path.name for path in two.servers["anna"].path(RUNS).iterdir())
    wait_for(
        lambda: systemctl(two, "anna", "is-active", f"metal-run-{run}") == "inactive", "anna's part to end"
    )


def test_who_ended_because_of_another_machine_is_started_again_until_there_is_no_progress(idle: Pair) -> None:
    two, lines = idle, list[str]()
    two.servers["berta"].path("/run/home/ml/crash").write_text("2 75")
    run = train(two, ["train.steps=100000"], lines, detach=True)
    wait_for(lambda: read(two, "berta", f"{run}/status") == "75\n", "berta to give up", 60)
    log = read(two, "berta", f"{run}/log")
    assert log.count("the trainer fails at step 2") == runs.TRIES
    assert "metal: another machine of this run was lost or stopped; starting again in 0 s" in log
    stop(two.hosts["anna"], two, lines)


# By values


def test_processes_and_what_the_machines_must_have_in_common(idle: Pair) -> None:
    """The cards are made up, as there are none here."""
    two = idle
    members = [
        Member(host, replace(host.wanted.machine), look(host, host.wanted.machine, "none", ""))
        for host in two.hosts.values()
    ]
    assert process_arguments(members) == []
    config = load_config("demo", [])
    demand_alike(members, config)
    gpu = members[0].seen.facts
    assert process_arguments(members[:1]) == []
    one = members[1]
    other = replace(one, seen=replace(one.seen, environment="/opt/metal/envs/another"))
    with pytest.raises(ProvisionError, match="the Python environment of berta is not that of anna"):
        demand_alike([members[0], other], config)
    from provision.facts import GpuSeen

    cards = replace(
        members[0].seen, facts=replace(gpu, gpus=(GpuSeen("01:00.0", 0x2684),)), cards=("0, RTX", "1, RTX")
    )
    with_gpus = replace(members[0], seen=cards)
    assert process_arguments([with_gpus]) == ["--nproc-per-node", "gpu"]
    with pytest.raises(ProvisionError, match="anna trains on a GPU and berta on its processor"):
        demand_alike([with_gpus, one], config)
    with pytest.raises(ProvisionError, match="by 2 processes"):
        demand_alike([with_gpus], load_config("demo", ["train.batch=9", "train.micro_batch=1"]))


def test_the_fastest_network_that_all_are_in_is_taken() -> None:
    def listening(name: str, number: int) -> Listening:
        addresses = (
            Address(f"192.168.1.{number}", "lan", 1000),
            Address(f"10.0.0.{number}", "fast", 100_000),
        )
        return Listening(name, "token", 1, (29400 + number, 40000), addresses)

    machines = [listening(name, number) for number, name in enumerate("abc", 1)]
    number = {"a": 1, "b": 2, "c": 3}

    def way(source: str, target: str, net: str, why: str = "ok") -> Way:
        return Way(source, target, f"{net}{number[target]}", f"{net}{number[source]}", why)

    pairs = [(a, b) for a in "abc" for b in "abc" if a != b]
    both = [way(a, b, net) for a, b in pairs for net in ("192.168.1.", "10.0.0.")]
    nodes = choose_nodes(machines, both)
    assert [(node.rank, node.count, node.interface) for node in nodes] == [(i, 3, "fast") for i in range(3)]
    assert {node.endpoint for node in nodes} == {"10.0.0.1:29401"}
    slow = [
        replace(w, why="timed out") if w.ip.startswith("10.") and "c" in (w.source, w.target) else w
        for w in both
    ]
    assert {(node.endpoint, node.interface) for node in choose_nodes(machines, slow)} == {
        ("192.168.1.1:29401", "lan")
    }
    shut = [replace(w, why="timed out") if (w.source, w.target) == ("c", "b") else w for w in both]
    with pytest.raises(
        ProvisionError, match=r"c does not reach b \(192.168.1.2: timed out; 10.0.0.2: timed out\)"
    ):
        choose_nodes(machines, shut)
