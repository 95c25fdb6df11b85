"""Getting in, and every way in which it fails: one readable error each. Against OpenSSH's own server."""

import socket
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from provision.errors import ProvisionError, Refused, UnknownKey, Unreachable
from provision.host import Host, connect
from provision.machine import Machine
from provision.pins import fingerprint_of, load_pins, parse_key, pin
from tests.sshd import Proxy, Sshd, free_port, keygen


@pytest.fixture(autouse=True)
def no_keys_of_the_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without keys, so that what a test offers is all that is offered."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return home


def at(machine: Machine, *, address: str = "127.0.0.1", port: int) -> Machine:
    return replace(machine, ssh=replace(machine.ssh, address=address, port=port))


def failure(*args: object, **options: object) -> ProvisionError:
    """The error of a connect that must not succeed."""
    with pytest.raises(ProvisionError) as caught:
        connect(*args, **options).close()  # type: ignore[arg-type]
    assert caught.value.message
    assert "Traceback" not in str(caught.value)
    return caught.value


# Which key, which system, which user


def test_the_pinned_key_of_the_installed_system_calls_for_its_user(sshd: Sshd) -> None:
    sshd.pin()
    with connect(sshd.machine(), sshd.pins) as host:
        assert (host.system, host.user) == ("installed", "ml")
        assert host.run("id -un", as_root=False).stdout == "ml\n"
        assert host.run("id -un").stdout == "root\n"


def test_the_pinned_key_of_the_iso_calls_for_root(sshd: Sshd) -> None:
    sshd.pin(live=True)
    with connect(sshd.machine(), sshd.pins) as host:
        assert (host.system, host.user) == ("live", "root")


def test_a_given_fingerprint_is_checked_and_pinned(sshd: Sshd) -> None:
    with connect(sshd.machine(), sshd.pins, fingerprint=sshd.fingerprint) as host:
        assert host.system == "live"
    assert load_pins(sshd.pins) == {"box.live": sshd.host_key}
    connect(sshd.machine(), sshd.pins).close()


def test_a_wrong_fingerprint_pins_nothing(sshd: Sshd) -> None:
    other = "SHA256:" + "A" * 43
    error = failure(sshd.machine(), sshd.pins, fingerprint=other, confirm=lambda text: True)
    assert isinstance(error, UnknownKey)
    assert sshd.fingerprint in error.message
    assert other in error.message
    assert load_pins(sshd.pins) == {}


def test_an_unknown_key_is_refused_before_any_login(sshd: Sshd) -> None:
    error = failure(sshd.machine(), sshd.pins, password="secret")
    assert isinstance(error, UnknownKey)
    assert f"--fingerprint {sshd.fingerprint}" in error.hint
    assert "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub" in error.hint
    assert "authenticat" not in (sshd.folder / "sshd.log").read_text()


@pytest.mark.parametrize("answer", [True, False])
def test_a_person_is_shown_the_fingerprint(sshd: Sshd, answer: bool) -> None:
    asked: list[str] = []

    def confirm(text: str) -> bool:
        asked.append(text)
        return answer

    if answer:
        connect(sshd.machine(), sshd.pins, confirm=confirm).close()
        connect(sshd.machine(), sshd.pins, confirm=confirm).close()
        assert load_pins(sshd.pins) == {"box.live": sshd.host_key}
    else:
        assert isinstance(failure(sshd.machine(), sshd.pins, confirm=confirm), UnknownKey)
        assert load_pins(sshd.pins) == {}
    assert len(asked) == 1, "once pinned, nobody is asked"
    assert sshd.fingerprint in asked[0]


def test_a_changed_key_is_refused_with_both_fingerprints(sshd: Sshd) -> None:
    sshd.pin()
    old = sshd.fingerprint
    sshd.swap_host_key()
    error = failure(sshd.machine(), sshd.pins)
    assert isinstance(error, UnknownKey)
    assert old in error.message
    assert sshd.fingerprint in error.message
    assert old != sshd.fingerprint


def test_a_pinned_key_is_found_at_any_address(sshd: Sshd, proxy: Proxy) -> None:
    sshd.pin()
    connect(sshd.machine(port=proxy.port), sshd.pins).close()
    assert proxy.accepted == 1, "one TCP connection, whichever user it turns out to be"


def test_of_several_host_keys_the_pinned_type_is_asked_for(sshd: Sshd) -> None:
    keygen(sshd.folder / "rsa_key", "rsa")
    config = sshd.folder / "sshd_config"
    sshd.extra_config = f"HostKey {sshd.folder}/rsa_key\n"
    sshd.restart()
    assert "rsa_key" in config.read_text()
    rsa = (sshd.folder / "rsa_key.pub").read_text()
    with connect(sshd.machine(), sshd.pins, fingerprint=sshd.fingerprint):
        pass
    pin(sshd.pins, "box.live", rsa)
    connect(sshd.machine(), sshd.pins).close()
    assert load_pins(sshd.pins)["box.live"] == parse_key(rsa), "the ed25519 key would not have matched"


# What is offered


def test_a_password_opens_the_iso(tmp_path: Path) -> None:
    server = Sshd(tmp_path / "sshd", password="correct horse")
    try:
        server.pin(live=True)
        machine = server.machine(identity=False)
        with connect(machine, server.pins, password="correct horse") as host:
            assert host.login.by == "the password"
            assert "correct" not in repr(vars(host))
        error = failure(machine, server.pins, password="wrong")
        assert isinstance(error, Refused)
        assert "does not let root in. Offered: the password" in error.message
        assert "passwd" in error.hint
        assert "wrong" not in str(error)
    finally:
        server.close()


def test_without_key_and_password_it_says_what_to_do_on_the_console(sshd: Sshd) -> None:
    sshd.pin(live=True)
    error = failure(sshd.machine(identity=False), sshd.pins)
    assert isinstance(error, Refused)
    assert "no key was found and no password given" in error.message
    assert "  passwd\n" in error.hint


def test_a_key_that_is_not_accepted_is_named(sshd: Sshd, tmp_path: Path) -> None:
    sshd.pin()
    stranger = str(keygen(tmp_path / "stranger"))
    error = failure(sshd.machine(identity=False), sshd.pins, key_files=[stranger])
    assert isinstance(error, Refused)
    assert f"does not let ml in. Offered: {stranger}" in error.message
    assert "authorized_keys" in error.hint


def test_named_keys_come_before_the_six_that_sshd_grants(sshd: Sshd, tmp_path: Path) -> None:
    sshd.pin()
    strangers = [str(keygen(tmp_path / f"stranger{number}")) for number in range(7)]
    connect(sshd.machine(), sshd.pins, key_files=strangers).close()
    error = failure(sshd.machine(identity=False), sshd.pins, key_files=strangers)
    assert "hung up" in error.message


def test_a_missing_or_locked_key_file_is_named(sshd: Sshd, tmp_path: Path) -> None:
    sshd.pin()
    missing = str(tmp_path / "nowhere")
    assert f"no private key {missing}" in failure(sshd.machine(), sshd.pins, key_files=[missing]).message
    locked = tmp_path / "locked"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "passphrase", "-f", locked], check=True)
    error = failure(sshd.machine(identity=False), sshd.pins, key_files=[str(locked)])
    assert "ssh-add" in error.message


def test_the_persons_ssh_config_and_default_key_serve(sshd: Sshd, no_keys_of_the_person: Path) -> None:
    sshd.pin()
    config = no_keys_of_the_person / ".ssh" / "config"
    config.write_text(
        f"Host box\n  HostName 127.0.0.1\n  Port {sshd.port}\n  IdentityFile {sshd.identity}\n  User nobody\n"
    )
    nameless = at(sshd.machine(identity=False), address="", port=22)
    with connect(nameless, sshd.pins) as host:
        assert (host.address, host.port, host.user) == ("127.0.0.1", sshd.port, "ml")
    config.write_text(f"Host box\n  HostName 127.0.0.1\n  Port {sshd.port}\n")
    (no_keys_of_the_person / ".ssh" / "id_ed25519").write_bytes(sshd.identity.read_bytes())
    connect(nameless, sshd.pins).close()


def test_a_jump_host_is_checked_by_the_persons_known_hosts(sshd: Sshd, no_keys_of_the_person: Path) -> None:
    sshd.pin()
    ssh = no_keys_of_the_person / ".ssh"
    (ssh / "config").write_text(
        f"Host box\n  HostName 127.0.0.1\n  Port {sshd.port}\n  ProxyJump root@localhost:{sshd.port}\n"
        f"Host *\n  IdentityFile {sshd.identity}\n"
    )
    nameless = at(sshd.machine(identity=False), address="", port=22)
    error = failure(nameless, sshd.pins)
    assert "not found in known_hosts" in error.message
    (ssh / "known_hosts").write_text(f"[localhost]:{sshd.port} {sshd.host_key}\n")
    connect(nameless, sshd.pins).close()
    (ssh / "config").write_text("Host box\n  ProxyJump a,b\n")
    assert "wrong order" in failure(nameless, sshd.pins).message


# Nobody there


def test_nothing_listens(sshd: Sshd) -> None:
    error = failure(at(sshd.machine(), port=free_port()), sshd.pins)
    assert isinstance(error, Unreachable)
    assert "Connection refused" in error.message
    assert "systemctl start sshd" in error.hint


def test_the_name_is_not_known(sshd: Sshd) -> None:
    error = failure(at(sshd.machine(), address="box.invalid", port=22), sshd.pins)
    assert isinstance(error, Unreachable)
    assert "name of box (box.invalid) is not known" in error.message


def test_a_host_that_does_not_answer(sshd: Sshd) -> None:
    """A listener whose queue is full drops what comes, as a host that is switched off does."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        error = failure(at(sshd.machine(), port=port), sshd.pins, timeout_s=0.5)
        for filler in fillers:
            filler.close()
    assert isinstance(error, Unreachable)
    assert "did not answer within 0.5 s" in error.message


def serve_once(behave: Callable[[socket.socket], object]) -> int:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener:
            sock, _ = listener.accept()
            with sock:
                behave(sock)

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    "behave",
    [
        pytest.param(lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9), id="a web server"),
        pytest.param(lambda sock: None, id="hangs up at once"),
        pytest.param(lambda sock: sock.recv(1000) and sock.recv(1000), id="says nothing"),
    ],
)
def test_something_that_is_not_an_ssh_server(sshd: Sshd, behave: Callable[[socket.socket], object]) -> None:
    error = failure(at(sshd.machine(), port=serve_once(behave)), sshd.pins, timeout_s=1)
    assert isinstance(error, Unreachable)
    assert "not as an SSH server does" in error.message
    assert "ssh.port" in error.hint


def test_a_host_that_vanishes_during_the_handshake(sshd: Sshd, proxy: Proxy) -> None:
    sshd.pin()
    proxy.swallow()
    error = failure(sshd.machine(port=proxy.port), sshd.pins, timeout_s=1)
    assert isinstance(error, Unreachable)


def test_the_connection_is_set_not_to_wait_for_full_packets(sshd: Sshd) -> None:
    sshd.pin()
    with connect(sshd.machine(), sshd.pins) as host:
        assert host.link.transport.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_a_lost_connection_is_not_dialled_to_another_system(sshd: Sshd) -> None:
    """A script meant for the ISO must not run on the installed system because the host restarted in between."""
    sshd.pin(live=True)
    with connect(sshd.machine(), sshd.pins) as host:
        sshd.pins.unlink()
        sshd.pin()
        sshd.restart()
        host.link.transport.join(5)
        with pytest.raises(Refused, match="installed system; expected the live"):
            host.run("true")


def test_a_failed_connect_leaves_no_thread(sshd: Sshd) -> None:
    before = set(threading.enumerate())
    failure(sshd.machine(), sshd.pins)
    failure(sshd.machine(identity=False), sshd.pins, fingerprint=sshd.fingerprint)
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive(), thread.name


def test_fingerprints_are_those_of_openssh(sshd: Sshd) -> None:
    shown = subprocess.run(
        ["ssh-keygen", "-lf", sshd.folder / "host_key.pub"], capture_output=True, text=True, check=True
    ).stdout
    assert fingerprint_of(sshd.host_key) == shown.split()[1]


def test_a_host_may_be_used_as_a_context(sshd: Sshd) -> None:
    sshd.pin()
    with connect(sshd.machine(), sshd.pins) as host:
        assert isinstance(host, Host)
    assert not host.link.alive
