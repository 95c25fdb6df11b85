"""From firmware to init: initramfs, systemd-boot, the kernel's command line."""

from collections.abc import Iterator

from provision.facts import Facts
from provision.machine import Machine
from provision.steps import File, Script, Step, Unit
from provision.system.crypt import REBUILD
from provision.system.layout import kernel_options, layout
from provision.system.mirror import BTRFS_RULE, RULE

# Written out rather than left to the package's default: no `kms`, which would load nouveau before the NVIDIA
# driver; `microcode` embeds the processor's update, so no initrd line of its own is needed.
HOOKS = "base systemd autodetect microcode modconf keyboard sd-vconsole block filesystems fsck"
# `keyboard` before `autodetect`: keyboards of any kind, and not only the one that is plugged in now.
LUKS_HOOKS = (
    "base systemd keyboard autodetect microcode modconf sd-vconsole block sd-encrypt filesystems fsck"
)
# The busybox kind, for which there is an sshd: https://wiki.archlinux.org/title/Dm-crypt/Specialties
SSH_HOOKS = "base udev keyboard autodetect microcode modconf keymap block netconf dropbear encryptssh filesystems fsck"


def hooks(machine: Machine) -> str:
    if machine.disk.unlock == "ssh":
        return SSH_HOOKS
    return LUKS_HOOKS if machine.disk.encryption == "luks" else HOOKS


def initramfs(machine: Machine, facts: Facts) -> Iterator[Step]:
    yield File(
        "/etc/vconsole.conf",
        f"KEYMAP={machine.system.keymap}\n",
        why="keyboard of the text console",
        then=REBUILD,
    )
    if machine.disk.mirror:
        yield File(
            BTRFS_RULE, RULE, why="the root may be mounted without the disk that is gone", then=REBUILD
        )
    files = f"FILES+=({BTRFS_RULE})\n" if machine.disk.mirror else ""
    yield File(
        "/etc/mkinitcpio.conf.d/10-metal.conf",
        f"HOOKS=({hooks(machine)})\n{files}",
        why="how the initramfs finds the root",
        then=REBUILD,
    )


def boot(machine: Machine, facts: Facts) -> Iterator[Step]:
    esp, kernels = layout(machine).esp, machine.system.kernels
    options = " ".join(filter(None, [kernel_options(machine, len(facts.nics)), machine.system.cmdline]))
    yield Script(
        "boot loader",
        why="systemd-boot with an entry in the firmware, and as the fallback path EFI/BOOT/BOOTX64.EFI",
        probe='cd "$root"/boot/EFI && [[ -s systemd/systemd-bootx64.efi && -s BOOT/BOOTX64.EFI ]] &&'
        f" efibootmgr --verbose | grep -qi 'Linux Boot Manager.*{esp.uuid}' && echo yes",
        # From outside the chroot: inside, systemd >= 257 takes itself for a container and skips the EFI variables.
        script='bootctl --esp-path="$root"/boot install',
    )
    images = " && ".join(
        f'-s "$root"/boot/vmlinuz-{kernel} && -s "$root"/boot/initramfs-{kernel}.img' for kernel in kernels
    )
    yield Script(
        "kernel on the ESP",
        why="what the boot entry names; pacman says nothing when a full ESP kept it from getting there",
        probe=f"[[ {images} ]] && echo yes",
        script='for modules in "$root"/usr/lib/modules/*/; do\n  [[ -s $modules/pkgbase ]] || continue\n'
        '  cp "$modules/vmlinuz" "$root/boot/vmlinuz-$(<"$modules/pkgbase")"\ndone\n' + REBUILD,
    )
    # FAT keeps no modes; fmask=0077 shows every file as 0700.
    yield File(
        "/boot/loader/loader.conf",
        f"default arch-{kernels[0]}.conf\ntimeout 3\neditor no\n",
        mode=0o700,
        why="what boots",
    )
    for kernel in kernels:
        yield entry(f"arch-{kernel}", f"Arch Linux ({kernel})", kernel, options)
    if machine.disk.mirror:
        alone = f"{kernel_options(machine, len(facts.nics), degraded=True)} {machine.system.cmdline}".rstrip()
        yield entry("degraded", "Arch Linux (a disk of the mirror is gone)", kernels[0], alone)
    yield Unit("systemd-boot-update.service", start=False, why="a newer systemd-boot reaches the ESP")


def entry(name: str, title: str, kernel: str, options: str) -> Step:
    """A line of systemd-boot's menu. FAT keeps no modes; fmask=0077 shows every file as 0700."""
    return File(
        f"/boot/loader/entries/{name}.conf",
        f"title {title}\nlinux /vmlinuz-{kernel}\ninitrd /initramfs-{kernel}.img\noptions {options}\n",
        mode=0o700,
        why="kernel, initramfs and root to boot",
    )
