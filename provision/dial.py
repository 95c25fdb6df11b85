"""Reaching a machine: one TCP connection, its host key judged, then a login as whom the key calls for.

Who logs in (root on the ISO, the machine's user on the installed system) depends on which key the host
presents. paramiko asks a policy about the key and an authentication strategy about the login; Doorway is both,
so that it takes a single handshake.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import paramiko
from fabric import Connection

from provision.errors import Locked, ProvisionError, Refused, Unreachable
from provision.link import hang_up, no_delay
from provision.machine import Machine
from provision.pins import (
    SystemName,
    judge,
    live_alias,
    load_pins,
    parse_key,
    pin,
    question,
    unknown_key,
    unlock_alias,
)

DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
KEY_ALGORITHMS = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256")}  # RFC 8332: one key type, two signatures

Confirm = Callable[[str], bool]
Attempt = tuple[str, Callable[[paramiko.Transport], list[str]]]


@dataclass(frozen=True)
class Wanted:
    """How to reach a machine and what may be offered to it. `only`: accept no other of its systems."""

    machine: Machine
    pins: Path
    fingerprint: str = ""
    password: str = ""
    key_files: Sequence[str] = ()
    confirm: Confirm | None = None
    timeout_s: float = 15
    only: SystemName | None = None

    def __repr__(self) -> str:
        return f"Wanted({self.machine.name})"  # the password is nobody's business

    @property
    def host(self) -> str:
        return self.machine.ssh.address or self.machine.name

    @property
    def identities(self) -> list[str]:
        named = [self.machine.ssh.identity] if self.machine.ssh.identity else []
        return [os.path.expanduser(path) for path in [*named, *self.key_files]]


@dataclass(frozen=True)
class Dialled:
    """An open connection: as whom, to which system, and what the login came about `by` (key, password)."""

    connection: Connection
    user: str
    system: SystemName
    by: str
    key_file: str


def prefer_kinds(transport: paramiko.Transport, kinds: Iterable[str]) -> None:
    """Ask for host keys of these types first."""
    first = [algorithm for kind in kinds for algorithm in KEY_ALGORITHMS.get(kind, (kind,))]
    security = transport.get_security_options()
    usable = [algorithm for algorithm in dict.fromkeys(first) if algorithm in security.key_types]
    security.key_types = [*usable, *(kind for kind in security.key_types if kind not in usable)]


class Doorway:
    """Judges the host key, then logs in. `missing_host_key` and `authenticate` are what paramiko calls."""

    def __init__(self, wanted: Wanted, where: str, config_keys: Sequence[str]) -> None:
        self.wanted = wanted
        self.where = where
        self.config_keys = config_keys
        self.known = load_pins(wanted.pins)
        self.system: SystemName = "installed"
        self.user = ""
        self.by = ""
        self.key_file = ""
        self.tried: list[str] = []

    def transport(self, sock: object, **options: object) -> paramiko.Transport:
        """A transport that asks first for keys of the type that is pinned, as a host has several."""
        no_delay(sock)
        transport = paramiko.Transport(sock, **options)
        name = self.wanted.machine.name
        aliases = (name, unlock_alias(name), live_alias(name))
        prefer_kinds(transport, [self.known[alias].split()[0] for alias in aliases if alias in self.known])
        return transport

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        """paramiko's client is given no keys of its own, so it asks here about every one."""
        wanted, name = self.wanted, self.wanted.machine.name
        presented = f"{key.get_name()} {key.get_base64()}"
        system = judge(self.known, name, presented, wanted.fingerprint)
        if system == "unlock" and wanted.only != "unlock":
            raise Locked(f"{self.where} waits for the passphrase of its disk.", f"fab -H {name} unlock")
        may_ask = not wanted.fingerprint and wanted.only in (None, "live")
        if system is None and may_ask and wanted.confirm:
            if not wanted.confirm(question(self.known, name, self.where, presented)):
                raise unknown_key(self.known, name, self.where, presented, "")
            system = "live"
        if system is None:
            raise unknown_key(self.known, name, self.where, presented, wanted.fingerprint)
        if system == "live" and presented != self.known.get(live_alias(name)):
            pin(wanted.pins, live_alias(name), presented)
        if wanted.only and system != wanted.only:
            raise Refused(
                f"{name} is now in its {system} system; expected the {wanted.only} one.",
                f"fab -H {name} plan",
            )
        self.system = system
        self.user = wanted.machine.user.name if system == "installed" else "root"

    def attempts(self) -> Iterator[Attempt]:
        """What is offered, in order. Named keys first: sshd hangs up after six failures (MaxAuthTries)."""
        for path in self.wanted.identities:
            yield from self._key_file(path)
        if password := self.wanted.password:
            yield "the password", lambda transport: transport.auth_password(self.user, password)
        agent = paramiko.Agent()
        try:
            for key in agent.get_keys():
                yield f"agent key {key.comment or key.get_name()}", self._by_key(key)
        finally:
            agent.close()
        for path in dict.fromkeys(map(os.path.expanduser, [*self.config_keys, *DEFAULT_KEYS])):
            if path not in self.wanted.identities:
                yield from self._key_file(path)

    def _key_file(self, path: str) -> Iterator[Attempt]:
        if not Path(path).is_file():
            return
        try:
            key = paramiko.PKey.from_path(path)
        except (paramiko.PasswordRequiredException, TypeError):  # cryptography's, which paramiko lets through
            self.tried.append(f"{path} (locked by a passphrase, and no agent holds it: ssh-add {path})")
        except (OSError, ValueError, paramiko.SSHException, paramiko.UnknownKeyType) as error:
            self.tried.append(f"{path} (cannot be read: {error})")
        else:
            yield path, self._by_key(key)

    def _by_key(self, key: paramiko.PKey) -> Callable[[paramiko.Transport], list[str]]:
        return lambda transport: transport.auth_publickey(self.user, key)

    def authenticate(self, transport: paramiko.Transport) -> list[str]:
        for what, attempt in self.attempts():
            try:
                more = attempt(transport)
            except paramiko.BadAuthenticationType as error:
                self.tried.append(f"{what} (the host takes only: {', '.join(error.allowed_types)})")
            except (OSError, EOFError, paramiko.SSHException) as error:
                self.tried.append(what)
                if not transport.is_active():
                    self.tried.append("then the host hung up")
                    raise self.not_let_in() from error
            else:
                if not more:
                    self.by, self.key_file = what, what if os.path.isfile(what) else ""
                    return []
                self.tried.append(f"{what} (accepted, but it wants more: {', '.join(more)})")
        raise self.not_let_in()

    def not_let_in(self) -> Refused:
        name = self.wanted.machine.name
        tried = "; ".join(self.tried) or "nothing: no key was found and no password given"
        if self.system == "live":
            hint = (
                "The ISO's root has no password, and sshd takes no empty one. On the machine's console type:\n"
                f"  passwd\nand then here:\n  fab -H {name} --prompt-for-login-password provision"
            )
        else:
            hint = "The keys that may log in are user.authorized_keys in the machine's file, as it was installed."
        return Refused(f"{self.where} does not let {self.user} in. Offered: {tried}.", hint)


def own_keys(connection: Connection, identities: Sequence[str]) -> set[str]:
    """The public keys (`TYPE BASE64`) that this computer can log in with, as far as they can be read."""
    agent = paramiko.Agent()
    try:
        found = {f"{key.get_name()} {key.get_base64()}" for key in agent.get_keys()}
    finally:
        agent.close()
    for path in map(
        os.path.expanduser, [*identities, *connection.ssh_config.get("identityfile", []), *DEFAULT_KEYS]
    ):
        with suppress(OSError, ValueError, TypeError, paramiko.SSHException, paramiko.UnknownKeyType):
            public = Path(f"{path}.pub")
            if public.is_file():
                found.add(parse_key(public.read_text()))
            elif Path(path).is_file():
                key = paramiko.PKey.from_path(path)
                found.add(f"{key.get_name()} {key.get_base64()}")
    return found


def dial(wanted: Wanted) -> Dialled:
    """Open the connection. Raises Unreachable, Refused, UnknownKey or ProvisionError, and leaves nothing open."""
    logging.getLogger("paramiko").addHandler(
        logging.NullHandler()
    )  # else its threads' tracebacks go to stderr
    ssh = wanted.machine.ssh
    for path in wanted.identities:
        if not Path(path).is_file():
            raise ProvisionError(
                f"There is no private key {path}.", "See ssh.identity in the machine's file."
            )
    by_config = ssh.port == 22 and not ssh.address  # ~/.ssh/config may know the port of a name
    connection = Connection(host=wanted.host, port=None if by_config else ssh.port)
    where = f"{connection.host}:{connection.port}" if connection.port != 22 else connection.host
    where = where if where == wanted.machine.name else f"{wanted.machine.name} ({where})"
    door = Doorway(wanted, where, connection.ssh_config.get("identityfile", []))
    connection.config.authentication.strategy_class = lambda **_: door
    connection.client.set_missing_host_key_policy(door)
    # Set here and not in the constructor, which cuts it to whole seconds and clashes with `fab -t`.
    connection.connect_timeout = wanted.timeout_s
    connection.connect_kwargs = {
        "transport_factory": door.transport,
        "banner_timeout": wanted.timeout_s,
        "auth_timeout": max(wanted.timeout_s, 30),  # sshd delays the answer to a wrong password
        "channel_timeout": wanted.timeout_s,
    }
    secure_gateways(connection, wanted.timeout_s)
    try:
        connection.open()
    except ProvisionError:
        hang_up(connection)
        raise
    except (OSError, EOFError, paramiko.SSHException) as error:
        hang_up(connection)
        raise explain(error, where, wanted.timeout_s, door) from error
    return Dialled(connection, door.user, door.system, door.by, door.key_file)


def secure_gateways(connection: Connection, timeout_s: float) -> None:
    """A ProxyJump is a Connection too, and would accept every key: check it by ~/.ssh/known_hosts."""
    jump = connection.ssh_config.get("proxyjump", "")
    if "," in jump:
        raise ProvisionError(
            f"ProxyJump {jump}: Fabric dials several hops in the wrong order.",
            "In ~/.ssh/config write it as: ProxyCommand ssh -J FIRST -W %h:%p LAST",
        )
    gateway = connection.gateway
    if isinstance(gateway, Connection):
        gateway.client.load_system_host_keys()
        gateway.client.set_missing_host_key_policy(paramiko.RejectPolicy())
        gateway.connect_timeout = timeout_s


def explain(error: Exception, where: str, timeout_s: float, door: Doorway) -> ProvisionError:
    """One readable error for each way in which a connection does not come about."""
    look = "Is it switched on, on the network, and is ssh.address in the machine's file (or --address) right?"
    text = str(error)
    if door.user:
        return Unreachable(f"{where} hung up during the login ({text or type(error).__name__}).")
    if isinstance(error, socket.gaierror):
        return Unreachable(f"The name of {where} is not known ({error.strerror}).", look)
    if isinstance(error, paramiko.ssh_exception.NoValidConnectionsError):
        reasons = "; ".join(sorted({e.strerror or str(e) for e in error.errors.values()}))
        refused = any(isinstance(e, ConnectionRefusedError) for e in error.errors.values())
        closed = "Nothing listens on that port. On the ISO's console: systemctl start sshd"
        return Unreachable(f"{where}: {reasons}.", closed if refused else look)
    if isinstance(error, TimeoutError):
        return Unreachable(f"{where} did not answer within {timeout_s:g} s.", look)
    if text == "No existing session":  # paramiko's words for a handshake that took longer than the timeout
        text = f"no greeting within {timeout_s:g} s"
    if "banner" in text or "greeting" in text or isinstance(error, ConnectionResetError | EOFError):
        return Unreachable(
            f"{where} answers, but not as an SSH server does ({text or type(error).__name__}).",
            "Is ssh.port right? A host that is just booting or shutting down does this too: try again.",
        )
    return Unreachable(f"{where}: no SSH connection came about ({text or type(error).__name__}).", look)
