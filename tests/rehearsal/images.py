"""ISOs and signatures as Arch makes them, of files and keys that are made here: the real ones cannot be here."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from provision.rehearsal import tools
from provision.rehearsal.bed import Bed
from provision.rehearsal.medium import CMDLINE, FIRST_SECTOR, SECTOR_BYTES
from provision.rehearsal.rootfs import STANDIN

# As archiso's mkarchiso gives them to xorriso for `uefi.systemd-boot`: an EFI partition behind the volume, which El
# Torito names too.
MKISOFS = (
    "-iso-level 3 -full-iso9660-filenames -joliet -joliet-long -rational-rock -partition_offset 16 "
    "-append_partition 2 C12A7328-F81F-11D2-BA4B-00A0C93EC93B {efi} -appended_part_as_gpt "
    "-eltorito-alt-boot -e --interval:appended_partition_2:all:: -no-emul-boot -eltorito-catalog EFI/boot.cat"
)
KERNEL = "arch/boot/x86_64/vmlinuz-linux"
INITRAMFS = "arch/boot/x86_64/initramfs-linux.img"
ROOT = "arch/x86_64/airootfs.sfs"
LOADER = "EFI/BOOT/BOOTX64.EFI"
# The stand-in's initramfs looks for its medium on FAT. The last file of a name that the kernel unpacks counts.
FOR_FAT = '  wait_for "LABEL=$label"\n  modprobe -q vfat\n  mount -t vfat -o ro'
FOR_ISO = "  wait_for /dev/sr0\n  modprobe -q isofs\n  mount -t iso9660 -o ro"
OPTIONS = " ".join(
    word for word in CMDLINE.split() if not word.startswith("console=")
)  # as Arch's: none is named


def make_iso(path: Path, tree: Path, efi: Path, label: str = "ARCH_202611") -> Path:
    """An ISO of the files in `tree` that UEFI starts from the FAT image `efi`."""
    (tree / "EFI").mkdir(exist_ok=True)  # where mkarchiso has its boot catalog
    argv = ["xorriso", "-no_rc", "-report_about", "SORRY", "-as", "mkisofs", "-quiet"]
    argv += [word.format(efi=efi) for word in MKISOFS.split()]
    subprocess.run([*argv, "-volid", label, "-output", str(path), str(tree)], check=True, capture_output=True)
    return path


def make_fat(path: Path, files: dict[str, Path], spare_mib: int = 4) -> Path:
    """A FAT image with these files."""
    mib = sum(file.stat().st_size for file in files.values()) // 2**20 + spare_mib
    with path.open("wb") as image:
        image.truncate(mib * 2**20)
    log = path.with_suffix(".log")
    tools.run(["mkfs.fat", *(["-F32"] if mib > 36 else []), "-n", "ARCHISO_EFI", path], log=log)
    folders = sorted({str(folder) for name in files for folder in Path(name).parents if str(folder) != "."})
    tools.run(["mmd", "-i", path, *(f"::/{folder}" for folder in folders)], log=log)
    for name, file in files.items():
        tools.run(["mcopy", "-i", path, file, f"::/{name}"], log=log)
    return path


def make_bootable(path: Path, bed: Bed, work: Path) -> Path:
    """An ISO that boots, as Arch's is laid out, of what the stand-in medium boots.

    Kernel, initramfs and root are the stand-in's; systemd-boot starts them from El Torito's image, where mkarchiso
    has them too, and the root is found on the CD-ROM.
    """
    tree = work / "tree"
    for folder in ("arch/boot/x86_64", "arch/x86_64"):
        (tree / folder).mkdir(parents=True)
    volume = f"{bed.parts.medium / 'medium.img'}@@{FIRST_SECTOR * SECTOR_BYTES}"
    for name, place in ((KERNEL, tree / KERNEL), (INITRAMFS, tree / INITRAMFS), (ROOT, tree / ROOT)):
        tools.run(["mcopy", "-i", volume, f"::/{name}", place], log=work / "log")
    tools.run(["mcopy", "-i", volume, f"::/{LOADER}", work / "loader.efi"], log=work / "log")
    (tree / INITRAMFS).write_bytes(padded((tree / INITRAMFS).read_bytes()) + make_init())
    (work / "loader.conf").write_text("timeout 1\ndefault 01-archiso-linux.conf\n")
    (work / "entry.conf").write_text(
        f"title Arch Linux install medium\nlinux /{KERNEL}\ninitrd /{INITRAMFS}\noptions {OPTIONS}\n"
    )
    files = {
        LOADER: work / "loader.efi",
        "loader/loader.conf": work / "loader.conf",
        "loader/entries/01-archiso-linux.conf": work / "entry.conf",
        KERNEL: tree / KERNEL,
        INITRAMFS: tree / INITRAMFS,
    }
    return make_iso(path, tree, make_fat(work / "efi.img", files))


def make_init() -> bytes:
    """An archive of nothing but the stand-in's first process, made to look for its medium on ISO 9660."""
    text = (STANDIN / "init").read_text()
    assert text.count(FOR_FAT) == 1
    return cpio("init", text.replace(FOR_FAT, FOR_ISO).encode()) + cpio("TRAILER!!!", b"")


def cpio(name: str, data: bytes) -> bytes:
    """One program in cpio's format newc, as the kernel's Documentation/driver-api/early-userspace has it."""
    fields = (1, 0o100755, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return padded(head) + padded(data)


def padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


class Signers:
    """OpenPGP keys that are made for a test, in a keyring of their own. `close` ends GnuPG's helper."""

    def __init__(self) -> None:
        self.home = Path(
            tempfile.mkdtemp(prefix="gnupg")
        )  # short: the path of a socket may have 107 bytes only

    def gpg(self, *words: str, at: str = "") -> str:
        argv = ["gpg", "--homedir", str(self.home), "--batch", "--quiet", "--pinentry-mode", "loopback"]
        argv += ["--passphrase", "", *(["--faked-system-time", at] if at else [])]
        return subprocess.run([*argv, *words], check=True, capture_output=True, text=True).stdout

    def make(self, name: str, *, use: str = "sign", expires: str = "never", at: str = "") -> str:
        """A key of somebody called so; its fingerprint."""
        self.gpg("--quick-generate-key", f"{name} <{name}@example.org>", "ed25519", use, expires, at=at)
        return self.fingerprint(name)

    def fingerprint(self, name: str) -> str:
        lines = self.gpg("--with-colons", "--list-keys", f"{name}@example.org").splitlines()
        return next(line.split(":")[9] for line in lines if line.startswith("fpr:"))

    def sign(self, name: str, file: Path, *options: str, at: str = "") -> Path:
        """FILE.sig, by that person."""
        signature = file.with_name(file.name + ".sig")
        signature.unlink(missing_ok=True)
        how = options or ("--detach-sign",)
        self.gpg("--local-user", f"{name}@example.org", "--output", str(signature), *how, str(file), at=at)
        return signature

    def revoke(self, name: str) -> None:
        certificate = self.home / "openpgp-revocs.d" / f"{self.fingerprint(name)}.rev"
        certificate.write_text(certificate.read_text().replace(":-----BEGIN", "-----BEGIN"))  # GnuPG's guard
        self.gpg("--import", str(certificate))

    def export(self, path: Path, *names: str) -> Path:
        """A keyring of these people, or of all."""
        path.unlink(missing_ok=True)
        self.gpg("--output", str(path), "--export", *(f"{name}@example.org" for name in names))
        return path

    def close(self) -> None:
        subprocess.run(
            ["gpgconf", "--homedir", str(self.home), "--kill", "all"], check=False, capture_output=True
        )
        shutil.rmtree(self.home, ignore_errors=True)
