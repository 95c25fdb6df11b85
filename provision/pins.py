"""The host keys we trust: a `known_hosts` file whose lines are keyed by alias, not by address.

`gpu1 ssh-ed25519 AAAA…` is the key of the system installed on machine gpu1; `gpu1.live ssh-ed25519 …` that of
the ISO it was booted from; `gpu1.unlock ssh-ed25519 …` that of the installed system's initramfs, where it waits for
the passphrase of its disk. So a changed address does not matter, and OpenSSH reads the same file through
`HostKeyAlias`. There is one key an alias; hashed names and markers (`@revoked`) are not used.
"""

import base64
import binascii
import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from provision.errors import ProvisionError, UnknownKey

SystemName = Literal["live", "installed", "unlock"]

ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
FINGERPRINT = re.compile(r"(?:SHA256:)?([A-Za-z0-9+/]{43})=?")
ON_THE_CONSOLE = "ssh-keygen -lf /etc/ssh/ssh_host_{}_key.pub"


def live_alias(name: str) -> str:
    return f"{name}.live"


def unlock_alias(name: str) -> str:
    return f"{name}.unlock"


def parse_key(line: str) -> str:
    """`TYPE BASE64` of a public key line (a comment behind it is dropped). ValueError where it is none."""
    kind, _, rest = line.strip().partition(" ")
    blob = rest.split()[0] if rest.split() else ""
    try:
        data = base64.b64decode(blob, validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64: {blob[:20]}") from error
    # RFC 4253, 6.6: the blob begins with the length and the name of its own type.
    if data[4 : 4 + int.from_bytes(data[:4], "big")] != kind.encode() or not kind:
        raise ValueError(f"not a public key line: {line.strip()[:60]}")
    return f"{kind} {blob}"


def fingerprint_of(key: str) -> str:
    """`SHA256:…` of a `TYPE BASE64` line, as `ssh-keygen -l` prints it."""
    digest = hashlib.sha256(base64.b64decode(key.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def parse_fingerprint(text: str) -> str:
    """`SHA256:…` out of what a person pasted: with or without the prefix, or a line of `ssh-keygen -l`."""
    for word in text.split():
        if match := FINGERPRINT.fullmatch(word):
            return f"SHA256:{match[1]}"
    raise ProvisionError(
        f"'{text}' is not a SHA256 fingerprint; expected SHA256: and 43 characters.",
        f"On the machine's own console: {ON_THE_CONSOLE.format('ed25519')}",
    )


def load_pins(pins: Path) -> dict[str, str]:
    """alias → `TYPE BASE64`. A file that does not exist holds no pins; an unreadable line is an error."""
    if not pins.exists():
        return {}
    found: dict[str, str] = {}
    for number, line in enumerate(pins.read_text().splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        alias, _, key = line.strip().partition(" ")
        try:
            found[alias] = parse_key(key)
        except ValueError as error:
            raise ProvisionError(
                f"{pins}:{number}: {error}", "Each line is: NAME TYPE BASE64, as in OpenSSH's known_hosts."
            ) from error
    return found


def pin(pins: Path, alias: str, key_line: str) -> None:
    """Trust this key under this alias from now on, instead of the one before. Atomic; other lines stay."""
    if not ALIAS.fullmatch(alias):
        raise ProvisionError(f"'{alias}' cannot name a host key; expected letters, digits, '.', '_' and '-'.")
    key = parse_key(key_line)
    pins.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(pins.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # several machines may be provisioned at once
        lines = pins.read_text().splitlines() if pins.exists() else []
        kept = [line for line in lines if line.strip().partition(" ")[0] != alias]
        write_atomically(pins, "".join(f"{line}\n" for line in [*kept, f"{alias} {key}"]))
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def judge(known: Mapping[str, str], name: str, presented: str, fingerprint: str) -> SystemName | None:
    """Which of a machine's systems presents this key, or None where nobody vouches for it.

    `fingerprint` is what a person read on the ISO's console, "" where nobody did.
    """
    if presented == known.get(name):
        return "installed"
    if presented == known.get(unlock_alias(name)):
        return "unlock"
    if presented == known.get(live_alias(name)):
        return "live"
    if fingerprint and parse_fingerprint(fingerprint) == fingerprint_of(presented):
        return "live"
    return None


def describe_key(presented: str) -> str:
    return f"{fingerprint_of(presented)} ({presented.split()[0]})"


def unknown_key(
    known: Mapping[str, str], name: str, where: str, presented: str, fingerprint: str
) -> UnknownKey:
    """The error for a key that `judge` does not know: what is there, what was expected, what to type."""
    seen = f"{where} presents the host key {describe_key(presented)}"
    aliases = [alias for alias in (name, unlock_alias(name), live_alias(name)) if alias in known]
    pinned = [f"  pinned as {alias}: {describe_key(known[alias])}" for alias in aliases]
    given = [f"  given: {parse_fingerprint(fingerprint)}"] if fingerprint else []
    kind = presented.split()[0].removeprefix("ssh-").split("-")[0]
    compare = f"compare with the machine's own console: {ON_THE_CONSOLE.format(kind)}"
    again = f"fab -H {name} provision --fingerprint {fingerprint_of(presented)}"
    if not pinned and not given:
        return UnknownKey(
            f"{seen}, and no key of {name} is known yet.",
            f"If it is the install ISO, {compare}\nthen: {again}",
        )
    return UnknownKey(
        "\n".join([f"{seen}, which is not the expected one:", *pinned, *given]),
        f"Every boot of the ISO makes new keys, unless it finds the image of `fab seed`. If {name} was booted from it again,\n{compare}\nthen: {again}\n"
        "If it was not, another machine answers at this address, or somebody is in between: do not go on.",
    )


def question(known: Mapping[str, str], name: str, where: str, presented: str) -> str:
    """What a person is asked at the first contact with an ISO."""
    kind = presented.split()[0].removeprefix("ssh-").split("-")[0]
    lines = [f"{where} presents the host key {describe_key(presented)}."]
    if name in known:
        lines.append(f"The system installed on {name} has another one: {describe_key(known[name])}.")
    if live_alias(name) in known:
        lines.append(f"The ISO of {name} had another one before: {describe_key(known[live_alias(name)])}.")
    lines.append(f"On the machine's own console, this shows it: {ON_THE_CONSOLE.format(kind)}")
    lines.append(f"Is this {name}, booted from the install ISO?")
    return "\n".join(lines)
