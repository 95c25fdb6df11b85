"""The official install ISO: whether a file is one, and whether Arch signed it. The file is read, and nothing else.

The fingerprint below is what is trusted, not where the key comes from: it is that of "PGP fingerprint" at
https://archlinux.org/download/, and of Pierre Schmitz, who makes the releases, at
https://archlinux.org/people/developers/. The key itself comes with the package archlinux-keyring, which Debian, Ubuntu and
Arch have. It holds the keys of all who package for Arch: one of theirs is not enough.
"""

import re
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from provision.errors import ProvisionError
from provision.rehearsal import tools

RELEASE_KEY = "3E80CA1A8B89F69CBA57D98A76A5EF9054449A5C"
DOWNLOAD = "https://archlinux.org/download/"
ARCH = "https://archlinux.org/iso"  # has the signatures, so that no mirror has to be asked for one
MIRROR = "https://geo.mirror.pkgbuild.com/iso"
KERNEL = "arch/boot/x86_64/vmlinuz-linux"  # in the ISO 9660 part, as archiso's mkarchiso puts it there
CHECK_S = 600  # a gigabyte and a half from a slow disk

SECTOR_BYTES = 2048
DESCRIPTOR = 16  # sector of the primary volume descriptor; ECMA-119, 8.4
FOLDER = 2  # flag of a directory record; ECMA-119, 9.1.6


@dataclass(frozen=True)
class Iso:
    """A file that is what its signer made. `label`: of the volume, ARCH_202611. `signed_on`: 2026-11-01."""

    path: Path
    label: str
    signed_on: str


@dataclass(frozen=True)
class Place:
    """Where a file or folder lies in a volume."""

    first_byte: int
    size_bytes: int
    folder: bool


@dataclass(frozen=True)
class Volume:
    label: str
    size_bytes: int
    root: Place


def check_iso(path: Path, log: Path, *, signer: str = RELEASE_KEY, keyring: Path | None = None) -> Iso:
    """The ISO, once it is known whose it is. Installs what checks a signature, where that is missing.

    `keyring`, by default that of the package archlinux-keyring, is where the key of `signer` (40 hexadecimal digits)
    is. Raises ProvisionError where the file is no install ISO, is cut short, or does not bear that signature.
    """
    path = (
        path.expanduser().absolute()
    )  # not what a link leads to: the signature is beside the name that was given
    signature = path.with_name(path.name + ".sig")
    label = look_at(path)
    if not signature.is_file():
        raise ProvisionError(
            f"There is no {signature}: whether {path.name} is Arch's cannot be told without it.",
            download(path.name + ".sig", signature, ARCH)
            or f"It is beside the ISO, where that came from: {DOWNLOAD}",
        )
    if keyring is None:
        tools.install_missing(log, tools.for_signatures())
        keyring = Path(tools.arch_keyring())
    said = ask_gpgv(path, signature, keyring)
    return Iso(path, label, judge(said, path, signer))


def look_at(path: Path) -> str:
    """The label of an install ISO. ProvisionError where the file is none, or not all of it is there."""
    again = f"ISO and signature: {DOWNLOAD}"
    try:
        with path.open("rb") as file:
            volume = read_volume(file)
            there = path.stat().st_size
            if there < volume.size_bytes:
                raise ProvisionError(
                    f"{path} is cut short: it has {there} bytes of {volume.size_bytes}.",
                    download(path.name, path, MIRROR) or again,
                )
            find_file(file, volume, KERNEL)
    except OSError as error:
        raise ProvisionError(f"{path} cannot be read: {error.strerror}.", again) from error
    except ValueError as error:
        raise ProvisionError(f"{path} is not an install ISO of Arch: {error}.", again) from error
    return volume.label


def read_volume(file: BinaryIO) -> Volume:
    """The primary volume descriptor of an ISO 9660 image. ValueError where there is none."""
    file.seek(DESCRIPTOR * SECTOR_BYTES)
    text = file.read(SECTOR_BYTES)
    if len(text) < SECTOR_BYTES or text[:6] != b"\x01CD001":
        raise ValueError("it has no ISO 9660 volume")
    sectors = int.from_bytes(text[80:84], "little")
    return Volume(
        text[40:72].decode("ascii", "replace").strip(), sectors * SECTOR_BYTES, parse_place(text[156:190])
    )


def find_file(file: BinaryIO, volume: Volume, path: str) -> Place:
    """Where a file of the volume lies, by its path without regard to case. ValueError where it is not there.

    Read here and not by pycdlib, which makes the seed: of the images that boot from sticks too it refuses some
    (https://github.com/clalancette/pycdlib/issues/66 and 139).
    """
    place = volume.root
    for name in path.split("/"):
        inner = read_folder(file, place).get(plain(name)) if place.folder else None
        if inner is None:
            raise ValueError(f"there is no {path} in it")
        place = inner
    return place


def read_folder(file: BinaryIO, folder: Place) -> dict[str, Place]:
    """What is in a folder, by `plain` name. A record never crosses the end of a sector: zeros fill what is left."""
    file.seek(folder.first_byte)
    text = file.read(min(folder.size_bytes, 2**20))
    found = {}
    at = 0
    while at < len(text):
        length = text[at]
        if length == 0:
            at += SECTOR_BYTES - at % SECTOR_BYTES
            continue
        record = text[at : at + length]
        if length < 34 or len(record) < length:
            raise ValueError("a folder in it is broken")
        found[plain(record[33 : 33 + record[32]].decode("latin-1"))] = parse_place(record)
        at += length
    return found


def parse_place(record: bytes) -> Place:
    """A directory record; ECMA-119, 9.1: both byte orders of each number, of which the first is read."""
    first = int.from_bytes(record[2:6], "little") * SECTOR_BYTES
    return Place(first, int.from_bytes(record[10:14], "little"), bool(record[25] & FOLDER))


def plain(name: str) -> str:
    """VMLINUZ_LINUX for vmlinuz-linux and for VMLINUZ_LINUX.;1, as the standard wants it written."""
    return name.partition(";")[0].rstrip(".").replace("-", "_").upper()


def read_kernel(iso: Path) -> bytes:
    """The kernel that the ISO boots."""
    with iso.open("rb") as file:
        place = find_file(file, read_volume(file), KERNEL)
        file.seek(place.first_byte)
        return file.read(place.size_bytes)


def download(name: str, to: Path, source: str) -> str:
    """What fetches that file of a release, or goes on with it; "" where its name is none of a release's."""
    dated = re.fullmatch(r"archlinux-(?:(\d{4}\.\d\d\.\d\d)-)?x86_64\.iso(?:\.sig)?", name)
    if not dated:
        return ""
    return f"curl -C - -fLo {shlex.quote(str(to))} {source}/{dated[1] or 'latest'}/{name}"


def ask_gpgv(iso: Path, signature: Path, keyring: Path) -> str:
    """What gpgv says of it, for programs: GnuPG's doc/DETAILS. It reads that one keyring and none of the person's."""
    with tempfile.TemporaryDirectory() as home:
        argv = ["gpgv", "--homedir", home, "--keyring", str(keyring.resolve()), "--status-fd", "1"]
        try:
            done = subprocess.run(
                [*argv, str(signature), str(iso)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=CHECK_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ProvisionError(f"gpgv did not come to an end with {iso} within {CHECK_S} s.") from None
    return done.stdout


def judge(said: str, iso: Path, signer: str) -> str:
    """The day on which `signer` signed it, from gpgv's status lines; pure. ProvisionError where they did not.

    VALIDSIG alone is not enough, nor that gpgv ends with 0: of keys that are revoked or have expired both are said too.
    """
    seen = ""
    for one in re.split(r"(?m)^\[GNUPG:\] NEWSIG.*$", said)[1:]:
        lines = [line.removeprefix("[GNUPG:] ").split() for line in one.splitlines()]
        words = {line[0]: line[1:] for line in lines if line}
        valid = words.get("VALIDSIG", [])
        primary = valid[-1] if valid else ""  # of the key of whose subkeys one may have signed
        if "GOODSIG" in words and primary == signer:
            return valid[1]
        seen = seen or describe(words, primary, signer)
    raise ProvisionError(
        f"{iso} does not bear Arch's signature: {seen or f'{iso.name}.sig is no OpenPGP signature of a file'}.\n"
        f"Expected that of {signer}. Nothing was started.",
        f"Both anew, the signature from Arch and not from a mirror: {DOWNLOAD}",
    )


def describe(words: dict[str, list[str]], primary: str, signer: str) -> str:
    """What is wrong with one signature."""
    if "BADSIG" in words:
        return "it was signed, and is not what was signed: the download is broken, or somebody changed it"
    if "REVKEYSIG" in words:
        return f"{primary} signed it, a key that is revoked"
    if "EXPKEYSIG" in words:
        newer = "; the package archlinux-keyring may have it anew" if primary == signer else ""
        return f"{primary} signed it, a key that has expired{newer}"
    if "EXPSIG" in words:
        return "the signature has expired"
    if primary:
        return f"{primary} ({' '.join(words.get('GOODSIG', ['', 'of nobody'])[1:])}) signed it"
    unknown = words.get("NO_PUBKEY") or words.get("ERRSIG")
    return (
        f"it is signed with a key that is not known here, {unknown[0]}" if unknown else "gpgv cannot read it"
    )
