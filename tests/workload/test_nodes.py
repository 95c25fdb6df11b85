"""A run on several machines, as far as one of them sees: its place, how it ends, what must be the same everywhere.

tests/transport/test_crew.py has the rest: real torchrun between two network namespaces.
"""

import os
import socket
import threading
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch.distributed as dist

from workload.errors import WorkloadError
from workload.launch import (
    ELSEWHERE,
    ENDED_WELL,
    FOLDER,
    LOST_OTHERS,
    STOPPED_ELSEWHERE,
    Nodes,
    OthersLost,
    checked_nodes,
    exit_status,
    launch,
    rank_of_launch,
)
from workload.lifeline import BYE, accept, keep_alive, watch
from workload.parallel import World, demand_same, name_tokens, read_world
from workload.prepare import find_shards

TWO = Nodes(2, 1, "10.0.0.1:29400")


def test_the_place_of_a_machine_is_torchruns() -> None:
    assert checked_nodes(1, 0, "").options() == ["--standalone"]
    options = checked_nodes(2, 1, "10.0.0.1:29400").options()
    assert options[:4] == ["--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=29400"]
    for count, rank, endpoint in (
        (2, 2, "a:1"),
        (2, -1, "a:1"),
        (0, 0, ""),
        (2, 0, "a"),
        (2, 0, ":1"),
        (2, 0, "a:99999"),
    ):
        with pytest.raises(WorkloadError):
            checked_nodes(count, rank, endpoint)


def test_torchrun_says_how_many_machines_there_are() -> None:
    environ = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "GROUP_WORLD_SIZE": "4"}
    assert read_world(environ).machines == 4
    assert read_world({"RANK": "3", "WORLD_SIZE": "8"}).machines == 1


@pytest.mark.parametrize(
    ("ended", "told", "nodes", "status"),
    [
        ([ENDED_WELL, ENDED_WELL], False, TWO, 0),
        ([ENDED_WELL], True, TWO, 0),
        ([STOPPED_ELSEWHERE, ENDED_WELL], False, TWO, ELSEWHERE),
        ([STOPPED_ELSEWHERE], True, TWO, 0),  # told, too, when it had saved already
        ([LOST_OTHERS], False, TWO, ELSEWHERE),
        ([LOST_OTHERS], True, TWO, 1),  # told to stop and could not save
        (["4711", LOST_OTHERS], False, TWO, 1),  # one of its own ranks died
        ([LOST_OTHERS, "4711"], False, Nodes(), 1),
        ([], False, TWO, ELSEWHERE),  # the others did not come
        ([], True, TWO, 143),
        ([], False, Nodes(), 1),
    ],
)
def test_who_is_to_blame_for_an_end(ended: list[str], told: bool, nodes: Nodes, status: int) -> None:
    assert exit_status(ended, 1, told=told, nodes=nodes) == status


def test_a_meeting_place_that_is_taken_is_said(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workload.launch.WAIT_S", 20)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        assert launch(["train"], "1", Nodes(2, 0, endpoint)) == ELSEWHERE
    said = capfd.readouterr().err
    assert said.splitlines()[-1].startswith(f"the machines did not come together at {endpoint}")


def test_a_rank_says_how_it_ended(tmp_path: Path) -> None:
    environ = {FOLDER: str(tmp_path), "RANK": "0"}
    with rank_of_launch(environ) as rank:
        assert (tmp_path / "0").read_text().isdecimal()
        rank.stopped_elsewhere = True
    assert (tmp_path / "0").read_text() == STOPPED_ELSEWHERE
    with pytest.raises(OthersLost), rank_of_launch(environ):
        raise OthersLost("gone")
    assert (tmp_path / "0").read_text() == LOST_OTHERS
    with pytest.raises(WorkloadError), rank_of_launch(environ):
        raise WorkloadError("its own")
    assert (tmp_path / "0").read_text().isdecimal()
    with rank_of_launch(environ):
        pass
    assert (tmp_path / "0").read_text() == ENDED_WELL


def test_other_tokens_have_another_name(tmp_path: Path) -> None:
    """Whether meta.json lists them, or, of somebody else's files, by what is in them."""
    names = set()
    for number, text in enumerate(("one text. " * 50, "another text. " * 50)):
        path = tmp_path / f"{number}.txt"
        path.write_text(text)
        shards = [
            find_shards(str(path), tmp_path / f"{number}-{again}", tokenizer="bytes", val_fraction=0.1)
            for again in "ab"
        ]
        assert name_tokens(shards[0]) == name_tokens(shards[1])
        names.add(name_tokens(shards[0]))
        (shards[0] / "meta.json").unlink()
        assert name_tokens(shards[0]) == name_tokens(shards[1]), "the same files, listed nowhere"
    assert len(names) == 2


def compare(rank: int, folder: Path, mine: str) -> None:
    """A rank of two, in a process of its own."""
    world = World(rank=rank, size=2, kind="ddp", machines=2)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        demand_same(world, {"tokens": mine, "torch": "2"})
        said = "the same"
    except WorkloadError as error:
        said = error.message
    (folder / str(rank)).write_text(said)
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_what_differs_is_named_on_all_machines(tmp_path: Path) -> None:
    for tokens, said in (
        (("one", "one"), "the same"),
        (("one", "other"), "the machines of this run differ: tokens other on"),
    ):
        folder = tmp_path / tokens[1]
        folder.mkdir()
        ranks = [
            get_context("fork").Process(target=compare, args=(rank, folder, tokens[rank])) for rank in (0, 1)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
        for rank in (0, 1):
            assert (folder / str(rank)).read_text().startswith(said)


def pair_of_connections() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        return one, server.accept()[0]


@pytest.mark.parametrize(("end", "lost"), [("bye", False), ("gone", True), ("over", False)])
def test_a_machine_that_is_gone_is_noticed_and_one_that_says_goodbye_is_not(end: str, lost: bool) -> None:
    one, other = pair_of_connections()
    over, seen = threading.Event(), threading.Event()
    watcher = threading.Thread(target=watch, args=(one, over, seen.set, 0.1 if lost else 60))
    watcher.start()
    if end == "bye":
        other.sendall(BYE)
    if end == "over":  # this process ends by itself, with an error of its own
        over.set()
    other.close()
    watcher.join(30)
    assert not watcher.is_alive()
    assert seen.is_set() is lost
    one.close()


def test_the_kernel_asks_whether_the_other_is_there() -> None:
    one, other = pair_of_connections()
    keep_alive(one)
    assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    idle, every, probes = (one.getsockopt(socket.IPPROTO_TCP, option) for option in options)
    assert idle + every * probes == 60
    one.close()
    other.close()


def test_only_who_knows_the_word_is_taken_for_a_machine() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    taken: list[socket.socket] = []
    thread = threading.Thread(target=lambda: taken.extend(accept(server, b"0123456789abcdef", 1)))
    thread.start()
    with (
        socket.create_connection(server.getsockname()) as stranger,
        socket.create_connection(server.getsockname()) as right,
    ):
        stranger.sendall(b"GET / HTTP/1.1\r\n")
        right.sendall(b"0123456789abcdef")
        thread.join(30)
        assert taken[0].getpeername() == right.getsockname()
        taken[0].close()
