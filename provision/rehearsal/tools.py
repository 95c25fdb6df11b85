"""Programs that the host needs for a rehearsal, and how they are run and installed."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from provision.errors import ProvisionError


@dataclass(frozen=True)
class Tool:
    """A command, or an absolute path, and the package of Debian and of Arch that brings it."""

    command: str
    debian: str
    arch: str


MACHINE_TOOLS = (
    Tool("qemu-system-x86_64", "qemu-system-x86", "qemu-system-x86"),
    Tool("qemu-img", "qemu-utils", "qemu-img"),
    Tool("swtpm", "swtpm", "swtpm"),
    Tool("setpriv", "util-linux", "util-linux"),
)
TOOLS = (
    *MACHINE_TOOLS,
    Tool("gpg", "gpg", "gnupg"),  # for the tests of the official ISO, which make one, and keys
    Tool("xorriso", "xorriso", "libisoburn"),
    Tool("mksquashfs", "squashfs-tools", "squashfs-tools"),
    Tool("mcopy", "mtools", "mtools"),
    Tool("mkfs.fat", "dosfstools", "dosfstools"),
    Tool("sgdisk", "gdisk", "gptfdisk"),
    Tool("zstd", "zstd", "zstd"),
    Tool("ssh-keygen", "openssh-client", "openssh"),
    Tool("rsync", "rsync", "rsync"),
    Tool("/usr/sbin/sshd", "openssh-server", "openssh"),  # for the tests of the transport
    Tool("dropbear", "dropbear-bin", "dropbear"),  # for those too
    Tool("zsh", "zsh", "zsh"),  # and as a login shell there
    Tool("cryptsetup", "cryptsetup-bin", "cryptsetup"),
    Tool("nft", "nftables", "nftables"),  # for the tests of the person's base
    Tool("visudo", "sudo", "sudo"),
)
# What differs between the two distributions: where the firmware and Arch's keys lie, and who can make a Debian root.
DEBIAN_FIRMWARE = (Tool("/usr/share/OVMF/OVMF_CODE_4M.fd", "ovmf", ""),)
ARCH_FIRMWARE = (Tool("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "", "edk2-ovmf"),)
KEYRINGS = {
    "debian": "/usr/share/keyrings/archlinux.gpg",
    "arch": "/usr/share/pacman/keyrings/archlinux.gpg",
}
DEBIAN_ONLY = (
    Tool("mmdebstrap", "mmdebstrap", ""),
    Tool(
        "/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring", ""
    ),  # Ubuntu has another
    *DEBIAN_FIRMWARE,
)
ARCH_ONLY = (  # mmdebstrap is not in Arch's own repositories, debootstrap is
    Tool("debootstrap", "", "debootstrap"),
    Tool("/usr/share/keyrings/debian-archive-keyring.gpg", "", "debian-archive-keyring"),
    *ARCH_FIRMWARE,
)
FIRMWARE = (  # (code, template of the variables)
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
)
# sbin is not in the PATH of an ordinary user of Debian.
PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"


def find(command: str) -> str | None:
    """The path of a command, or the path itself where it exists."""
    if command.startswith("/"):
        return command if Path(command).exists() else None
    return shutil.which(command, path=PATH)


def distribution() -> str:
    """`debian`, `arch` or "" for a host that is neither."""
    if shutil.which("pacman") and Path("/etc/arch-release").exists():
        return "arch"
    return "debian" if shutil.which("apt-get") else ""


def for_all() -> tuple[Tool, ...]:
    """What a rehearsal with the stand-in medium needs, and what the tests do."""
    return (*TOOLS, *(ARCH_ONLY if distribution() == "arch" else DEBIAN_ONLY), *for_signatures())


def for_machines() -> tuple[Tool, ...]:
    """What a virtual machine needs whose medium is there already."""
    return MACHINE_TOOLS + (ARCH_FIRMWARE if distribution() == "arch" else DEBIAN_FIRMWARE)


def for_signatures() -> tuple[Tool, ...]:
    """What checks Arch's signature, and Arch's keys."""
    return (Tool("gpgv", "gpgv", "gnupg"), Tool(arch_keyring(), "archlinux-keyring", "archlinux-keyring"))


def arch_keyring() -> str:
    """Where the package archlinux-keyring of this distribution has Arch's keys."""
    return KEYRINGS["arch" if distribution() == "arch" else "debian"]


def missing_packages(wanted: Sequence[Tool]) -> list[str]:
    """Packages of this distribution whose commands are not there."""
    arch = distribution() == "arch"
    return sorted({tool.arch if arch else tool.debian for tool in wanted if not find(tool.command)})


def install_missing(log: Path, wanted: Sequence[Tool] = ()) -> list[str]:
    """Install what is missing, by default of all, through sudo where needed; the packages that were.

    Raises ProvisionError on a host that is neither Debian nor Arch, naming what it needs.
    """
    wanted = wanted or for_all()
    packages = missing_packages(wanted)
    if not packages:
        return []
    match distribution():
        case "debian":
            commands = [
                ["apt-get", "update", "-q"],
                ["apt-get", "install", "-y", "--no-install-recommends", *packages],
            ]
        case "arch":  # -Syu: a partial upgrade could break the host
            commands = [["pacman", "-Syu", "--needed", "--noconfirm", *packages]]
        case _:
            raise ProvisionError(
                "This host is neither Debian nor Arch, and lacks programs of these packages: "
                + ", ".join(packages),
                "Install them and run the same command again.",
            )
    for command in commands:
        run([*as_root(), "env", "DEBIAN_FRONTEND=noninteractive", *command], log=log)
    if still := missing_packages(wanted):
        raise ProvisionError(f"Installed, and yet not found: {', '.join(still)}", f"See {log}")
    return packages


def firmware() -> tuple[Path, Path]:
    """OVMF's code and the template of its variables."""
    for code, variables in FIRMWARE:
        if Path(code).exists():
            return Path(code), Path(variables)
    raise ProvisionError("No OVMF firmware found.", "Debian: apt install ovmf. Arch: pacman -S edk2-ovmf.")


def as_root() -> list[str]:
    """What to put before a command that needs root."""
    return [] if os.geteuid() == 0 else ["sudo"]


def bound(argv: Sequence[str]) -> list[str]:
    """The same command, ended by the kernel when the thread that started it ends."""
    return ["setpriv", "--pdeathsig", "KILL", "--", *argv]


def run(argv: Sequence[str | Path], *, log: Path, shown: str = "") -> None:
    """Run to the end with all output appended to `log`; `shown` stands there for a command that reads badly.

    Raises ProvisionError with the command and the last lines of its output where it fails.
    """
    command = [str(word) for word in argv]
    shown = shown or " ".join(command)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"$ {shown}\n".encode())
        output.flush()
        start = output.tell()
        status = subprocess.run(
            bound(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": PATH, "LC_ALL": "C"},
            check=False,
        ).returncode
    if status:
        raise ProvisionError(
            f"`{shown[:200]}` ended with status {status}:\n{last_lines(log, start=start)}",
            f"All of its output: {log}",
        )


def last_lines(log: Path, *, count: int = 15, start: int = 0) -> str:
    """The end of a log file from byte `start` on, indented."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read()[-100_000:].decode(errors="replace").replace("\r", "").splitlines()
    return "\n".join(f"  {line}" for line in lines[-count:])
