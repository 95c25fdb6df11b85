"""Finding a machine again after its reboot, by the key we made and a new boot id."""

import threading
import time
from collections.abc import Iterator

import pytest

from provision.errors import ProvisionError
from provision.host import Host, connect, reconnect_after_reboot
from provision.pins import parse_key, pin
from tests.sshd import Sshd, keygen


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
