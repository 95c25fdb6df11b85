"""Whether the machines of a run are all still there, noticed in a minute and not after the timeout of their group.

A machine without power or network sends nothing, and those that wait for its gradients wait as long as they would for a
slow evaluation: parallel.TIMEOUT_S. So one process of each other machine holds a connection to rank 0 on which nothing
is said until the end; the kernels ask each other whether they are there (keepalive, tcp(7)).
"""

import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from workload.parallel import TIMEOUT_S, World

IDLE_S, EVERY_S, PROBES = 20, 5, 8  # a minute of silence, as switches that start anew take
GRACE_S = 30  # in which the process may end by itself, with the error that it finds, and finish a checkpoint
BYE = b"."

Lost = Callable[[], object]


def keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", IDLE_S), ("TCP_KEEPINTVL", EVERY_S), ("TCP_KEEPCNT", PROBES)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@contextmanager
def lifeline(world: World, address: str, lost: Lost) -> Iterator[None]:
    """Inside, `lost` is called, from another thread, when another machine is gone and this process has not ended since.

    address: of rank 0, as the other machines reach it. All ranks must call it, in a group that `parallel.joined` made.
    """
    if world.machines == 1:
        yield
        return
    server = socket.create_server(("", 0)) if world.is_first else None
    port, token = world.first((server.getsockname()[1], secrets.token_bytes(16)) if server else (0, b""))
    if server:
        connections = accept(server, token, world.machines - 1)
    elif world.local_rank == 0:
        connections = [socket.create_connection((address, port), timeout=TIMEOUT_S)]
        connections[0].sendall(token)
    else:
        connections = []
    world.any(False)
    over = threading.Event()
    for connection in connections:
        connection.settimeout(None)
        keep_alive(connection)
        threading.Thread(target=watch, args=(connection, over, lost), daemon=True).start()
    try:
        yield
        over.set()
        for connection in connections:
            with suppress(OSError):
                connection.sendall(BYE)
    finally:
        over.set()
        hang_up(connections)


def accept(server: socket.socket, token: bytes, count: int) -> list[socket.socket]:
    """Connections of those who know the token."""
    connections: list[socket.socket] = []
    server.settimeout(TIMEOUT_S)
    with server:
        while len(connections) < count:
            connection, _ = server.accept()
            connection.settimeout(5)
            try:
                said = connection.recv(len(token), socket.MSG_WAITALL)
            except OSError:
                said = b""
            if secrets.compare_digest(said, token):
                connections.append(connection)
            else:
                connection.close()
    return connections


def watch(connection: socket.socket, over: threading.Event, lost: Lost, grace_s: float = GRACE_S) -> None:
    """Until the other end says goodbye, or this one has ended. Else it is lost."""
    try:
        said, why = connection.recv(1), "it has ended"
    except OSError as error:
        said, why = b"", str(error)
    if said != BYE and not over.wait(grace_s):
        print(
            f"error: another machine of this run does not answer any more: {why}", file=sys.stderr, flush=True
        )
        lost()


def hang_up(connections: Sequence[socket.socket]) -> None:
    """Also where a thread is blocked in one."""
    for connection in connections:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        connection.close()
