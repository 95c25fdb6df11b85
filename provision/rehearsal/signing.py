"""The key that signs the repository, and the keyring package that makes pacman trust it.

So a rehearsed machine checks signatures as a real one does: only the key is another.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from provision.rehearsal.rootfs import in_root

NAME = "Rehearsal <rehearsal@localhost>"

GENERATE = f"""
mkdir -m 700 /mnt/gnupg
gpg="gpg --homedir /mnt/gnupg --batch --quiet"
$gpg --passphrase '' --quick-generate-key '{NAME}' ed25519 sign never
$gpg --export > /mnt/public.gpg
$gpg --with-colons --list-keys | awk -F: '$1 == "fpr" {{ print $10; exit }}' > /mnt/fingerprint
"""
SIGN = 'for file; do gpg --homedir /srv/gnupg --batch --quiet --detach-sign "$file"; done'

# Arch's own scriptlet does the same: a system without a keyring yet is populated when it makes one.
INSTALL = """\
post_install() {
  if pacman-key --list-keys > /dev/null 2>&1; then
    pacman-key --populate archlinux
  fi
}
post_upgrade() {
  post_install
}
"""


def build_signing(stage: Path, root: Path, log: Path) -> None:
    """`gnupg/` with the private key, `public.gpg`, `fingerprint`."""
    in_root(root, ["bash", "-euo", "pipefail", "-c", GENERATE], log, binds={stage: "/mnt"})


def keyring_files(signing: Path) -> dict[str, tuple[bytes, int]]:
    """The content of archlinux-keyring: pacman-key's format is one file of keys, one of those to trust."""
    fingerprint = (signing / "fingerprint").read_text().strip()
    folder = "usr/share/pacman/keyrings"
    return {
        f"{folder}/archlinux.gpg": ((signing / "public.gpg").read_bytes(), 0o644),
        f"{folder}/archlinux-trusted": (f"{fingerprint}:4:\n".encode(), 0o644),
        f"{folder}/archlinux-revoked": (b"", 0o644),
    }


def sign(signing: Path, repository: Path, names: Sequence[PurePosixPath], root: Path, log: Path) -> None:
    """Write `NAME.sig` beside each of the repository's files."""
    places = [str(PurePosixPath("/mnt") / name) for name in names]
    in_root(root, ["bash", "-euc", SIGN, "sign", *places], log, binds={repository: "/mnt", signing: "/srv"})


def install_keyring(live: Path, repository: Path, log: Path) -> None:
    """The keyring as an installed package of the live system, as the ISO has it."""
    (package,) = (repository / "core/os/x86_64").glob("archlinux-keyring-*.pkg.tar.zst")
    (live / "tmp" / package.name).write_bytes(package.read_bytes())
    (live / "tmp/pacman.conf").write_text(
        "[options]\nArchitecture = auto\n"
    )  # no CheckSpace: a chroot has no mounts
    command = ["pacman", "--config", "/tmp/pacman.conf", "--upgrade", "--nodeps", "--nodeps", "--noconfirm"]
    in_root(live, [*command, f"/tmp/{package.name}"], log)
    for name in ("pacman.conf", package.name):
        (live / "tmp" / name).unlink()
