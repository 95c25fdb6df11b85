"""Finding a machine again after its reboot, by the key we made and a new boot id."""

import ipaddress
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from provision.errors import ProvisionError
from provision.find import Search, reconnect_after_reboot
from provision.host import Host, connect
from provision.nearby import neighbours, subnet, sweep
from provision.pins import parse_key, pin
from tests.sshd import Proxy, Sshd, keygen


@pytest.fixture
def live(sshd: Sshd) -> Iterator[Host]:
    """A session on the ISO, whose boot id is boot-1."""
    sshd.pin(live=True)
    with connect(sshd.machine(), sshd.pins) as host:
        assert host.boot_id() == "boot-1"
        yield host


def later(*acts: object, pause_s: float = 0.7) -> None:
    """Do one thing after the other in the background, with a pause before each."""

    def work() -> None:
        for act in acts:
            time.sleep(pause_s)
            act()  # type: ignore[operator]

    threading.Thread(target=work, daemon=True).start()


def install_key(sshd: Sshd) -> object:
    """Pin a new key as the installed system's; what makes the server present it, at its next start."""
    made = keygen(sshd.folder / "installed_key")
    pin(sshd.pins, "box", parse_key(made.with_suffix(".pub").read_text()))

    def take() -> None:
        for suffix in ("", ".pub"):
            (sshd.folder / f"host_key{suffix}").write_bytes(
                (sshd.folder / f"installed_key{suffix}").read_bytes()
            )

    return take


def find(sshd: Sshd, waits: list[str], deadline_s: float = 30) -> Host:
    return reconnect_after_reboot(
        sshd.machine(), sshd.pins, "boot-1", deadline_s=deadline_s, on_wait=waits.append, poll_s=0.1
    )


def test_the_old_system_that_still_answers_is_not_taken_for_the_new(live: Host, sshd: Sshd) -> None:
    take = install_key(sshd)
    later(sshd.stop_listening, lambda: sshd.set_boot_id("boot-2"), take, sshd.start)
    waits: list[str] = []
    with find(sshd, waits) as host:
        assert (host.system, host.user, host.boot_id()) == ("installed", "ml", "boot-2")
    told = " / ".join(waits)
    assert re.search(r"has not gone down yet|is going down", told), told  # by how quick the look at it was
    assert "Connection refused" in told


def test_an_installed_system_that_restarts_is_found_by_its_boot_id(sshd: Sshd) -> None:
    sshd.pin()
    later(sshd.stop_listening, lambda: sshd.set_boot_id("boot-2"), sshd.start)
    with find(sshd, []) as host:
        assert host.boot_id() == "boot-2"


def test_back_on_the_iso_is_said_at_once(live: Host, sshd: Sshd) -> None:
    """A medium that keeps its keys: known by NAME.live and a new boot id."""
    install_key(sshd)
    later(sshd.stop_listening, lambda: sshd.set_boot_id("boot-2"), sshd.start)
    with pytest.raises(ProvisionError, match="is on the ISO again") as caught:
        find(sshd, [])
    assert "boot order" in caught.value.hint


def test_back_on_an_iso_with_new_keys_is_said_at_once(live: Host, sshd: Sshd) -> None:
    install_key(sshd)
    later(
        sshd.stop_listening,
        lambda: sshd.set_boot_id("boot-2"),
        lambda: keygen(sshd.folder / "host_key"),
        sshd.start,
    )
    with pytest.raises(ProvisionError, match="Expected the key of the installed system") as caught:
        find(sshd, [])
    assert "boot order" in caught.value.hint
    assert sshd.fingerprint in caught.value.message


def test_the_wait_has_a_deadline_and_says_what_it_saw(live: Host, sshd: Sshd) -> None:
    install_key(sshd)
    with pytest.raises(ProvisionError, match="last seen: box has not gone down yet"):
        find(sshd, [], deadline_s=1)
    sshd.stop_listening()
    with pytest.raises(ProvisionError, match=r"last seen: .*Connection refused"):
        find(sshd, [], deadline_s=1)


def test_a_machine_that_moved_is_found_by_its_key_and_nobody_else_is(sshd: Sshd, tmp_path: Path) -> None:
    """At the old address nobody answers; at the first other one somebody with another key; then it is there."""
    sshd.pin()
    sshd.set_boot_id("boot-2")
    stranger = Sshd(tmp_path / "stranger")
    try:
        moved = replace(sshd.machine(), ssh=replace(sshd.machine().ssh, address="127.0.0.9"))
        relay = Proxy(sshd.port, address="127.0.0.3", port=sshd.port)
        impostor = Proxy(stranger.port, address="127.0.0.2", port=sshd.port)
        with reconnect_after_reboot(
            moved,
            sshd.pins,
            "boot-1",
            deadline_s=30,
            search=Search(lambda: ["no-such-host.invalid", "127.0.0.2", "127.0.0.3"], elsewhere_after_s=0),
            poll_s=0.1,
        ) as host:
            assert (host.address, host.boot_id()) == ("127.0.0.3", "boot-2")
        assert impostor.accepted == 1
        relay.close()
        impostor.close()
    finally:
        stranger.close()


def test_neighbours_of_linux_and_of_macos() -> None:
    table = """192.168.1.1 dev eth0 lladdr 00:11:22:33:44:55 REACHABLE
192.168.1.7 dev eth0 lladdr a8:a1:59:00:0b:01 STALE
fe80::1 dev eth0 lladdr a8:a1:59:00:0b:01 router STALE
192.168.1.9 dev eth0 FAILED
? (10.0.0.4) at a8:a1:59:0:b:1 on en0 ifscope [ethernet]
"""
    assert neighbours(table, ["A8:A1:59:00:0B:01"]) == ["192.168.1.7", "10.0.0.4"]
    assert neighbours(table, []) == []


# What / is on


def put_root(sshd: Sshd, partuuid: str) -> None:
    """The machine's / lies on this partition; in a container none does."""
    answers = {
        "findmnt": "echo /dev/sdz2",
        "lsblk": f'case "$*" in *PARTUUID*) printf "%s\\n\\n" {partuuid};; *) echo "disk /dev/sdz OTHER1";; esac',
    }
    for name, answer in answers.items():
        path = sshd.path(f"/run/bin/{name}")
        path.write_text(f"#!/bin/bash\n{answer}\n")
        path.chmod(0o755)


def find_on(sshd: Sshd, roots: list[str]) -> Host:
    return reconnect_after_reboot(
        sshd.machine(), sshd.pins, "boot-1", deadline_s=30, roots=frozenset(roots), poll_s=0.1
    )


def test_found_means_that_it_runs_from_its_disk(sshd: Sshd) -> None:
    sshd.pin()
    sshd.set_boot_id("boot-2")
    put_root(sshd, "0A0B-02")
    with find_on(sshd, ["ffff-02", "0a0b-02"]) as host:
        assert host.system == "installed"


def test_an_installation_on_another_disk_is_not_taken_for_it(sshd: Sshd) -> None:
    """A disk that was cloned has the same host key."""
    sshd.pin()
    sshd.set_boot_id("boot-2")
    put_root(sshd, "0a0b-02")
    with pytest.raises(ProvisionError) as caught:
        find_on(sshd, ["ffff-02"])
    assert "/ is on /dev/sdz2 (/dev/sdz OTHER1), and not on the disk with serial none" in caught.value.message
    assert "boot order" in caught.value.hint


# The subnet


def test_the_subnet_is_that_of_the_interface(sshd: Sshd) -> None:
    linux = """2: eth0: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500
    inet 192.168.7.20/23 brd 192.168.7.255 scope global dynamic eth0
    inet 10.0.0.5/8 brd 10.255.255.255 scope global eth1
"""
    macos = "\tinet 192.168.7.20 netmask 0xfffffe00 broadcast 192.168.7.255\n"
    for text in (linux, macos):
        assert str(subnet("192.168.6.9", text)) == "192.168.6.0/23"
    assert str(subnet("10.1.2.3", linux)) == "10.1.0.0/22", "at most 1024 addresses"
    assert str(subnet("172.16.5.5", linux)) == "172.16.5.0/24", "behind a router"
    assert subnet("fe80::1", linux) is None
    assert subnet("", linux) is None


@pytest.fixture
def moved(sshd: Sshd, tmp_path: Path) -> Iterator[Proxy]:
    """The machine, installed and restarted, at 127.0.0.9; at 127.0.0.10 a server that is not it."""
    sshd.pin()
    sshd.set_boot_id("boot-2")
    stranger = Sshd(tmp_path / "stranger")
    silent = socket.create_server(("127.0.0.11", sshd.port))  # accepts, and says nothing
    impostor = Proxy(stranger.port, address="127.0.0.10", port=sshd.port)
    relay = Proxy(sshd.port, address="127.0.0.9", port=sshd.port)
    relay.impostor = stranger  # type: ignore[attr-defined]
    yield relay
    for server in (relay, impostor, silent, stranger):
        server.close()


NETWORK = ipaddress.IPv4Network("127.0.0.8/29")


def search_moved(
    sshd: Sshd, *answers: str, unasked: bool = False, deadline_s: float = 3
) -> tuple[Host, list[str]]:
    asked: list[str] = []
    left = list(answers)

    def ask(question: str, within_s: float | None = None, /) -> str:
        asked.append(question)
        assert within_s, "a question does not wait for ever"
        return left.pop(0) if left else ""

    gone = replace(sshd.machine(), ssh=replace(sshd.machine().ssh, address="127.0.0.14"))
    search = Search(network=NETWORK, unasked=unasked, ask=ask, elsewhere_after_s=0, sweep_after_s=0)
    try:
        host = reconnect_after_reboot(
            gone, sshd.pins, "boot-1", deadline_s=deadline_s, search=search, poll_s=0.1
        )
    except ProvisionError as error:
        error.asked = asked  # type: ignore[attr-defined]
        raise
    return host, asked


def test_a_sweep_finds_it_and_logs_in_nowhere_else(sshd: Sshd, moved: Proxy) -> None:
    assert sweep(NETWORK, sshd.port, {sshd.host_key}) == ["127.0.0.9"]
    assert sweep(NETWORK, sshd.port, {"ssh-ed25519 AAAA"}) == []
    stranger = moved.impostor  # type: ignore[attr-defined]
    log = (stranger.folder / "sshd.log").read_text()
    assert "authenticat" not in log.lower().replace("preauth", "")


def test_the_subnet_is_swept_when_a_person_says_yes(sshd: Sshd, moved: Proxy) -> None:
    host, asked = search_moved(sshd, "yes")
    with host:
        assert host.address == "127.0.0.9"
    assert asked == [
        "Look at the 8 addresses of 127.0.0.8/29 for the host key of box, without logging in? [yes/no] "
    ]


def test_the_subnet_is_swept_unasked_where_that_was_said(sshd: Sshd, moved: Proxy) -> None:
    host, asked = search_moved(sshd, unasked=True)
    with host:
        assert (host.address, asked) == ("127.0.0.9", [])


def test_after_a_no_the_address_is_asked_for(sshd: Sshd, moved: Proxy) -> None:
    host, asked = search_moved(sshd, "no", "not an address!", "127.0.0.10", "127.0.0.9")
    with host:
        assert host.address == "127.0.0.9"
    assert len(asked) == 4
    assert "Its address, as its console shows it" in asked[1]
    assert "a host name or an IP address" in asked[2]
    assert "presents the host key" in asked[3], "somebody else's address is said to be that"


def test_where_nobody_answers_nothing_is_swept(sshd: Sshd, moved: Proxy) -> None:
    with pytest.raises(ProvisionError) as caught:
        search_moved(sshd, deadline_s=0.5)
    assert moved.accepted == 0
    assert "--sweep" in caught.value.hint
    assert "--address NEW" in caught.value.hint
    assert "all of 127.0.0.8/29" in caught.value.hint


def test_another_iso_that_has_its_key_is_found_at_another_address(sshd: Sshd, moved: Proxy) -> None:
    """With a seed the ISO keeps its key: that it came up again, elsewhere, is seen at once."""
    sshd.pins.unlink()
    sshd.pin(live=True)
    install_key(sshd)
    with pytest.raises(ProvisionError, match="is on the ISO again"):
        search_moved(sshd, "yes")


def test_an_address_that_is_right_and_too_early_is_waited_at(sshd: Sshd, moved: Proxy) -> None:
    """The person is quicker than the machine; and the deadline was over."""
    sshd.set_boot_id("boot-1")
    later(lambda: sshd.set_boot_id("boot-2"), pause_s=2)
    host, asked = search_moved(sshd, "no", "", "127.0.0.9", deadline_s=0.5)
    with host:
        assert host.address == "127.0.0.9"
    assert len(asked) == 3
