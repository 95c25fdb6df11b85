"""The live medium: the root file system made to behave as the Arch ISO, on a disk that UEFI starts.

A GPT disk with one FAT32 EFI partition: systemd-boot, kernel, initramfs, squashfs. It is written by
mtools and sgdisk into a plain file, so the host needs no loop device and no driver for vfat.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from provision.rehearsal import tools
from provision.rehearsal.rootfs import ARCH_SERVER, STANDIN, in_root, kernel_version, remove, write
from provision.rehearsal.signing import install_keyring

LABEL = "ARCH_202611"
HOST_NAME = "archiso"
ROOT_PASSWORD = (
    "archiso"  # a person at the console would have typed one; the ISO itself has none and sshd refuses
)
SECTOR_BYTES = 512
FIRST_SECTOR = 2048  # partition at 1 MiB

# Emulated, mitigations and audit cost a fifth of the boot; the rest is what archiso itself passes.
CMDLINE = (
    f"archisobasedir=arch archisolabel={LABEL} console=ttyS0 quiet mitigations=off audit=0 "
    "random.trust_cpu=on systemd.show_status=0"
)
ENABLED = (
    "systemd-networkd",
    "systemd-resolved",
    "systemd-timesyncd",
    "pacman-init",
    "sshd",
    "cloud-init-local",  # these four run where cloud-init's generator finds a volume CIDATA
    "cloud-init",
    "cloud-config",
    "cloud-final",
)
MASKED = (  # seconds each in an emulated machine, and nothing that provision looks at
    "sshdgenkeys.service",  # the medium brings its host key, as cloud-init's ssh_keys would
    "systemd-networkd-wait-online.service",
    "systemd-hwdb-update.service",
    "systemd-pcrphase.service",
    "systemd-pcrphase-initrd.service",
    "systemd-pcrphase-sysinit.service",
    "ldconfig.service",
    "fstrim.timer",
    "systemd-firstboot.service",
)
SSHD = """\
# As on the ISO, and the one host key that the medium brings.
PermitRootLogin yes
PasswordAuthentication yes
HostKey /etc/ssh/ssh_host_ed25519_key
"""
# These two as in archiso's profile `releng`: whoever asks finds archiso.local.
NETWORK = """\
[Match]
Type=ether
Kind=!*

[Link]
RequiredForOnline=routable

[Network]
DHCP=yes
MulticastDNS=yes

[DHCPv4]
RouteMetric=100

[IPv6AcceptRA]
RouteMetric=100
"""
RESOLVED = """\
[Resolve]
MulticastDNS=yes
"""
# Debian's configuration made that of Arch. What a seed does not say about the network cloud-init makes up, as on the ISO.
CLOUD = """\
disable_root: true
system_info:
  distro: arch
  default_user:
    name: arch
    lock_passwd: true
    gecos: arch Cloud User
    groups: [wheel, users]
    sudo: ["ALL=(ALL) NOPASSWD:ALL"]
    shell: /bin/bash
  network: {renderers: [networkd]}
  ssh_svcname: sshd
cloud_config_modules: [ssh-import-id, locale, set-passwords, ntp, timezone, runcmd]
cloud_final_modules: [write-files-deferred, scripts-per-boot, scripts-per-instance, scripts-user, ssh-authkey-fingerprints,
  keys-to-console, final-message, power-state-change]
"""
# What an installed system can have and the ISO has not.
ABSENT = (
    "usr/bin/dropbear*",
    "usr/bin/dbclient",
    "usr/lib/dropbear",
    "usr/lib/systemd/system-generators/zram-generator",
    "usr/lib/systemd/system/systemd-zram-setup@.service",
    "usr/share/mkinitcpio-utils",
    "usr/bin/NetworkManager",
    "usr/bin/nm*",
    "usr/lib/systemd/system/NetworkManager*",
    "usr/bin/greetd",
    "usr/lib/systemd/system/greetd.service",
)
ENTRY = f"""\
title Arch Linux install medium (stand-in)
linux /arch/boot/x86_64/vmlinuz-linux
initrd /arch/boot/x86_64/initramfs-linux.img
options {CMDLINE}
"""


@dataclass(frozen=True)
class Keys:
    """Paths of the private keys of a bed; the public ones lie beside them as `.pub`."""

    identity: Path  # root of the live system and the user of the installed one accept it
    host: Path  # what sshd of the live system shows

    @property
    def identity_line(self) -> str:
        return public_line(self.identity)

    @property
    def host_line(self) -> str:
        return public_line(self.host)


def public_line(private: Path) -> str:
    return private.with_name(private.name + ".pub").read_text().strip()


def load_keys(folder: Path, log: Path) -> Keys:
    """The bed's key pairs, made at the first call."""
    keys = Keys(folder / "identity", folder / "live_host_key")
    folder.mkdir(parents=True, exist_ok=True)
    for path in (keys.identity, keys.host):
        if not path.exists():
            partial = path.with_name(path.name + ".partial")
            for leftover in (partial, partial.with_name(partial.name + ".pub")):
                leftover.unlink(missing_ok=True)
            tools.run(
                [
                    "ssh-keygen",
                    "-q",
                    "-t",
                    "ed25519",
                    "-N",
                    "",
                    "-C",
                    f"rehearsal {path.name}",
                    "-f",
                    partial,
                ],
                log=log,
            )
            partial.with_name(partial.name + ".pub").rename(path.with_name(path.name + ".pub"))
            partial.rename(path)  # the private key last: with it the pair is complete
    return keys


def build_medium(stage: Path, root: Path, repository: Path, keys: Keys, log: Path) -> None:
    """`medium.img`, the disk; and `live/`, removed again."""
    live = stage / "live"
    tools.run(["cp", "-a", "--reflink=auto", root, live], log=log)
    for pattern in ABSENT:
        remove(live, pattern)
    dress(live, keys, log)
    install_keyring(live, repository, log)
    version = kernel_version(live)
    write(live, "tmp/archiso.conf", "HOOKS=(base archiso block filesystems)\n")
    in_root(live, ["mkinitcpio", "-k", version, "-c", "/tmp/archiso.conf", "-g", "/tmp/initramfs.img"], log)
    (live / "tmp/archiso.conf").unlink()
    (live / "tmp/initramfs.img").rename(stage / "initramfs-linux.img")
    shutil.copy(live / "usr/lib/modules" / version / "vmlinuz", stage / "vmlinuz-linux")
    shutil.rmtree(live / "usr/lib/initcpio/prebuilt")
    for folder in (live / "usr/lib/modules").iterdir():
        if folder.name != version:
            shutil.rmtree(folder)
    squash = ["-comp", "zstd", "-Xcompression-level", "6", "-quiet", "-no-progress"]
    tools.run(["mksquashfs", live, stage / "airootfs.sfs", *squash], log=log)
    shutil.rmtree(live)
    write_disk(stage, root / "usr/lib/systemd/boot/efi/systemd-bootx64.efi", log)
    for name in ("airootfs.sfs", "initramfs-linux.img"):
        (stage / name).unlink()  # the kernel stays: the probe for KVM starts it


def dress(live: Path, keys: Keys, log: Path) -> None:
    """What the ISO has and an installed Arch has not."""
    write(live, "etc/hostname", HOST_NAME + "\n")
    write(live, "etc/machine-id", "0123456789abcdef0123456789abcdef\n")
    write(live, "etc/locale.conf", "LANG=C.UTF-8\n")
    write(live, "etc/fstab", "")
    write(live, "etc/pacman.d/mirrorlist", ARCH_SERVER + "\n")
    write(live, "etc/systemd/network/20-ethernet.network", NETWORK)
    write(live, "etc/systemd/resolved.conf.d/archiso.conf", RESOLVED)
    write(live, "etc/cloud/cloud.cfg.d/10-arch.cfg", CLOUD)
    write(live, "etc/ssh/sshd_config.d/10-archiso.conf", SSHD)
    write(live, "etc/ssh/ssh_host_ed25519_key", keys.host.read_text(), 0o600)
    write(live, "etc/ssh/ssh_host_ed25519_key.pub", keys.host_line + "\n")
    write(live, "root/.ssh/authorized_keys", keys.identity_line + "\n", 0o600)
    (live / "root/.ssh").chmod(0o700)
    write(live, "etc/systemd/system/pacman-init.service", (STANDIN / "pacman-init.service").read_text())
    (live / "etc/resolv.conf").symlink_to("/run/systemd/resolve/stub-resolv.conf")
    in_root(live, ["usermod", "--shell", "/usr/bin/zsh", "root"], log)
    in_root(live, ["bash", "-ec", f"echo root:{ROOT_PASSWORD} | chpasswd"], log)
    in_root(live, ["systemctl", "--quiet", "enable", *ENABLED], log)
    in_root(live, ["systemctl", "--quiet", "mask", *MASKED], log)
    in_root(live, ["systemctl", "--quiet", "set-default", "multi-user.target"], log)


def write_disk(stage: Path, loader: Path, log: Path) -> None:
    """The disk image: partition table, file system, files."""
    (stage / "loader.conf").write_text("timeout 0\ndefault arch.conf\n")
    (stage / "arch.conf").write_text(ENTRY)
    content = {
        "EFI/BOOT/BOOTX64.EFI": loader,
        "loader/loader.conf": stage / "loader.conf",
        "loader/entries/arch.conf": stage / "arch.conf",
        "arch/boot/x86_64/vmlinuz-linux": stage / "vmlinuz-linux",
        "arch/boot/x86_64/initramfs-linux.img": stage / "initramfs-linux.img",
        "arch/x86_64/airootfs.sfs": stage / "airootfs.sfs",
    }
    mib = sum(path.stat().st_size for path in content.values()) // 2**20 + 40
    image = stage / "medium.img"
    with image.open("wb") as file:
        file.truncate((mib + 4) * 2**20)
    tools.run(["sgdisk", f"-n1:{FIRST_SECTOR}:+{mib}M", "-t1:ef00", "-c1:ARCHISO_EFI", image], log=log)
    tools.run(
        ["mkfs.fat", "-F32", "-n", LABEL, "--offset", str(FIRST_SECTOR), image, str(mib * 1024)], log=log
    )
    volume = f"{image}@@{FIRST_SECTOR * SECTOR_BYTES}"
    folders = sorted({str(parent) for name in content for parent in Path(name).parents if str(parent) != "."})
    tools.run(["mmd", "-i", volume, *(f"::/{folder}" for folder in folders)], log=log)
    for name, path in content.items():
        tools.run(["mcopy", "-i", volume, path, f"::/{name}"], log=log)
    for name in ("loader.conf", "arch.conf"):
        (stage / name).unlink()
