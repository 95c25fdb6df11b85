"""Finding a machine again after its reboot, by the key we made and a new boot id."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from provision.errors import ProvisionError
from provision.find import Search, reconnect_after_reboot
from provision.host import Host, connect
from provision.nearby import neighbours
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
    assert "has not gone down yet" in waits[0]
    assert any("Connection refused" in wait for wait in waits)


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
