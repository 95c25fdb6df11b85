"""The seed of a machine: a small image from which cloud-init on the install ISO learns whom to let in, and as whom to
answer. So the first contact needs no password, no fingerprint and nothing typed on the console.

It is a NoCloud data source: a volume labelled CIDATA with `meta-data`, `user-data` and `network-config`
(https://docs.cloud-init.io/en/latest/reference/datasources/nocloud.html). The host key in it is made here; its public
half is pinned as NAME.live, its private half is in the image and nowhere else.
"""

import hashlib
import io
import json
import os
import re
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pycdlib
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fabric import Connection
from pycdlib.pycdlibexception import PyCdlibException

from provision.dial import own_keys
from provision.errors import ProvisionError
from provision.machine import Machine, is_key
from provision.pins import fingerprint_of, live_alias, load_pins, parse_key, pin

LABEL = "CIDATA"
PEM = re.compile(r"-----BEGIN OPENSSH PRIVATE KEY-----.*?-----END OPENSSH PRIVATE KEY-----", re.S)
LARGEST_BYTES = 2**20  # of an image of ours: what is larger is something else

# cloud-init would otherwise write its own: DHCP, but without the mDNS that the ISO's has, so nobody would find it.
NETWORK_CONFIG = "version: 1\nconfig: disabled\n"


@dataclass(frozen=True)
class HostKey:
    """An ed25519 key: `private` in OpenSSH's format, `public` as `TYPE BASE64`."""

    private: str = field(repr=False)
    public: str


@dataclass(frozen=True)
class Seeded:
    """What was made. `kept`: the host key is that of the image that was there before."""

    path: Path
    public: str
    kept: bool
    keys: int  # that are let in


def make_host_key() -> HostKey:
    return describe_key(Ed25519PrivateKey.generate())


def describe_key(key: Ed25519PrivateKey) -> HostKey:
    formats = serialization
    private = key.private_bytes(
        formats.Encoding.PEM, formats.PrivateFormat.OpenSSH, formats.NoEncryption()
    ).decode()
    public = key.public_key().public_bytes(formats.Encoding.OpenSSH, formats.PublicFormat.OpenSSH).decode()
    return HostKey(private, parse_key(public))


def render_seed(machine: Machine, keys: Sequence[str], host_key: HostKey) -> dict[str, str]:
    """The files of the image; pure. `keys` are the public key lines that may log in as root."""
    user_data = "\n".join(
        [
            "#cloud-config",
            f"# The install ISO on {machine.name}: lets in root by key, and shows a host key that is known.",
            "disable_root: false",
            "ssh_pwauth: false",
            "users:",
            "  - name: root",
            "    lock_passwd: false  # the console stays as it is",
            "    ssh_authorized_keys:",
            *(f"      - {quoted(key)}" for key in keys),
            "ssh_deletekeys: true  # those that the ISO made",
            "ssh_keys:",
            "  ed25519_private: |",
            textwrap.indent(host_key.private.rstrip("\n"), "    "),
            f"  ed25519_public: {quoted(f'{host_key.public} {machine.name}')}",
            # Before D-Bus is there, cloud-init's own hostnamectl fails; by this name mDNS finds the machine.
            f"bootcmd: [[sh, -c, 'echo {machine.system.hostname} > /proc/sys/kernel/hostname']]",
            "growpart: {mode: 'off'}  # no disk is touched before it was asked for",
            "resize_rootfs: false",
            "",
        ]
    )
    instance = f"{machine.name}-{hashlib.sha256(user_data.encode()).hexdigest()[:12]}"
    meta_data = f"instance-id: {quoted(instance)}\nlocal-hostname: {quoted(machine.system.hostname)}\n"
    return {"meta-data": meta_data, "user-data": user_data, "network-config": NETWORK_CONFIG}


def quoted(text: str) -> str:
    """A YAML string: JSON's are."""
    return json.dumps(text, ensure_ascii=False)


def render_image(files: Mapping[str, str]) -> bytes:
    """ISO 9660 with Joliet and Rock Ridge: whichever a system reads, the names are those."""
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, vol_ident=LABEL, joliet=3, rock_ridge="1.09")
    for name, text in files.items():
        data = text.encode()
        plain = f"/{name.upper().replace('-', '_')}.;1"
        iso.add_fp(
            io.BytesIO(data), len(data), plain, rr_name=name, joliet_path=f"/{name}", file_mode=0o100400
        )
    image = io.BytesIO()
    iso.write_fp(image)
    iso.close()
    return image.getvalue()


def read_image(path: Path) -> dict[str, str]:
    """The files of an image that `render_image` made; ProvisionError where it is none."""
    found = {}
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ValueError("too large")
        iso = pycdlib.PyCdlib()
        iso.open(str(path))
        try:
            if iso.pvd.volume_identifier.decode().strip() != LABEL:
                raise ValueError("another label")
            for child in iso.list_children(rr_path="/"):
                if child.is_file():
                    data = io.BytesIO()
                    name = child.rock_ridge.name().decode()
                    iso.get_file_from_iso_fp(data, rr_path=f"/{name}")
                    found[name] = data.getvalue().decode()
        finally:
            iso.close()
    except (OSError, ValueError, AttributeError, PyCdlibException) as error:
        raise ProvisionError(
            f"{path} exists and is not a seed: it was left as it is.", "Another name: --out FILE"
        ) from error
    return found


def kept_key(path: Path, pinned: str) -> HostKey | None:
    """The host key in the image that is there, if it is the one that is pinned: sticks made of it stay good."""
    found = PEM.search(read_image(path).get("user-data", ""))
    if not found:
        return None
    text = "\n".join(line.strip() for line in found[0].splitlines()) + "\n"
    with suppress(ValueError):
        key = serialization.load_ssh_private_key(text.encode(), None)
        if isinstance(key, Ed25519PrivateKey) and describe_key(key).public == pinned:
            return describe_key(key)
    return None


def save_seed(machine: Machine, keys: Sequence[str], pins: Path, path: Path) -> Seeded:
    """Write the image, for its owner's eyes only, and pin its host key.

    The pin is set before the image has its name: a run that is cut off between the two leaves an image that is
    refused, never one that is wrongly trusted.
    """
    if not keys:
        raise ProvisionError(
            "There is no public key to let in: neither in user.authorized_keys nor on this computer.",
            "Make one: ssh-keygen -t ed25519",
        )
    if path.exists() and not path.is_file():
        raise ProvisionError(
            f"{path} is not a file; expected one to write.", "The image is copied to a stick afterwards."
        )
    kept = kept_key(path, load_pins(pins).get(live_alias(machine.name), "")) if path.exists() else None
    host_key = kept or make_host_key()
    image = render_image(render_seed(machine, keys, host_key))
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    except OSError as error:
        raise ProvisionError(f"{path} cannot be written: {error.strerror}.", "Another: --out FILE") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(image)
            file.flush()
            os.fsync(file.fileno())
        pin(pins, live_alias(machine.name), host_key.public)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return Seeded(path, host_key.public, kept is not None, len(keys))


def load_keys(machine: Machine, identities: Sequence[str]) -> list[str]:
    """Whom the ISO lets in: user.authorized_keys, and what this computer can log in with."""
    listed = [line for line in machine.user.authorized_keys if is_key(line)]
    known = {parse_key(line) for line in listed}
    named = [machine.ssh.identity] if machine.ssh.identity else []
    ours = own_keys(Connection(machine.ssh.address or machine.name), [*named, *identities])
    return [*listed, *sorted(ours - known)]


def describe_seed(machine: Machine, seeded: Seeded, *, has_file: bool) -> str:
    """What a person is told: what it is, what it means for images made before, what to do with it."""
    name, path = machine.name, seeded.path
    before = (
        "the one of the image that was there: sticks made of that stay good"
        if seeded.kept
        else "new: an ISO that was booted with another seed, or without, is refused"
    )
    then = f"fab -H {name} provision" if has_file else f"fab -H {name} inspect"
    return f"""{path}: cloud-init's seed for the install ISO on {name}. {seeded.keys} public key(s) are let in as root.
Host key {fingerprint_of(seeded.public)}, pinned as {live_alias(name)}; {before}.
Its private half is in this image only: whoever reads the image can pass for {name}'s ISO. Delete it after the installation.

1. Beside the ISO, on a second USB stick, whose content is lost:  sudo dd if={path} of=/dev/sdX bs=1M conv=fsync
   or as a second virtual medium of the machine's remote console.
2. Boot the install ISO (UEFI, Secure Boot off). Nothing is typed.
3. {then}
   It answers as {machine.system.hostname}.local where mDNS is heard; elsewhere add --address ADDRESS."""
