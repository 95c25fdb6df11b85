"""A mirrored machine: its second EFI system partition is kept as the first, so that it boots without the first disk.

Not by itself: udev waits for every disk of the root. systemd-boot's menu has an entry for when one is gone.
"""

from collections.abc import Iterator

from provision.facts import Facts
from provision.machine import Machine
from provision.steps import File, Packages, Script, Step, Unit
from provision.system.layout import DEGRADED, ESP_OPTIONS, layout

SYNC = "/usr/local/lib/metal-to-model/sync-esp"
LABEL = "Linux Boot Manager (mirror)"
# Takes the place of systemd's rule of that name, which says of a btrfs that lacks a disk that it is not there.
BTRFS_RULE = "/etc/udev/rules.d/64-btrfs.rules"
RULE = f"""\
SUBSYSTEM!="block", GOTO="done"
ACTION=="remove", GOTO="done"
ENV{{ID_FS_TYPE}}!="btrfs", GOTO="done"
ENV{{SYSTEMD_READY}}=="0", GOTO="done"
IMPORT{{builtin}}="btrfs ready $devnode"
IMPORT{{cmdline}}="{DEGRADED}"
ENV{{{DEGRADED}}}=="1", GOTO="done"
ENV{{ID_BTRFS_READY}}=="0", ENV{{SYSTEMD_READY}}="0"
ENV{{ID_BTRFS_READY}}=="1", RUN+="/usr/bin/udevadm trigger --subsystem-match=block --property-match=ID_BTRFS_READY=0"
LABEL="done"
"""
OWN = "--exclude=random-seed"  # one for each ESP


def mirror(machine: Machine, facts: Facts) -> Iterator[Step]:
    """After everything else that writes to /boot."""
    if not machine.disk.mirror:
        return
    second = layout(machine).of("esp")[1]
    yield Packages("rsync", why="keeps the EFI system partitions the same")
    yield File(
        SYNC,
        f"""#!/bin/bash
# Makes the second EFI system partition as the first. ROOT: of the system, where it is not /.
set -euo pipefail
root=${{1:-}}
second=$(mktemp -d /run/sync-esp.XXXXXX)
mount -o {ESP_OPTIONS} {second.path} "$second"
trap 'umount "$second"; rmdir "$second"' EXIT
for try in 1 2 3 4 5; do  # what is written meanwhile wakes nobody
  rsync --recursive --times --modify-window=2 --delete-after {OWN} "$root/boot/" "$second/"
  if diff --recursive --brief {OWN} "$root/boot" "$second" > /dev/null; then break; fi
done
sync --file-system "$second"
""",
        mode=0o755,
        why="copies what boots to the second disk",
    )
    yield File(
        "/etc/systemd/system/metal-sync-esp.service",
        f"[Unit]\nDescription=Second EFI system partition as the first\nRequiresMountsFor=/boot\n"
        "StartLimitIntervalSec=0\n\n"  # an update of several kernels changes /boot often
        f"[Service]\nType=oneshot\nExecStartPre=/usr/bin/sleep 2\nExecStart={SYNC}\n\n[Install]\nWantedBy=multi-user.target\n",
        why="at each boot",
    )
    yield File(
        "/etc/systemd/system/metal-sync-esp.path",
        "[Unit]\nDescription=Changes of /boot\n\n[Path]\nPathChanged=/boot\nPathChanged=/boot/loader/entries\n"
        "PathChanged=/boot/EFI/systemd\n\n[Install]\nWantedBy=multi-user.target\n",
        why="and after each change, such as a kernel's update",
    )
    yield Unit("metal-sync-esp.service", start=False, why="at each boot")
    yield Unit("metal-sync-esp.path", why="after each change")
    yield Script(
        "mirror of the ESP",
        why=f"the firmware finds the same on the disk with serial {second.serial}",
        # In a mount namespace of its own: nothing stays mounted, nothing is written. Not beside a copy at work.
        probe=f"[[ -b {second.path} ]] && unshare --mount bash -c '"
        f"for try in 1 2 3; do mount -o ro,{ESP_OPTIONS} {second.path} /srv && break; sleep 1; done; mountpoint -q /srv &&"
        f' diff --recursive --brief {OWN} "$1"/boot /srv\' mirror "$root" && echo yes',
        script=f'"$root"{SYNC} "$root"',
    )
    yield Script(
        "boot entry of the mirror",
        why="where the first disk is gone, the firmware goes on with the second",
        probe=f"efibootmgr --verbose | grep -i {second.uuid} | grep -qF '{LABEL}' && echo yes",
        script=f"""order=$(efibootmgr | sed -n 's/^BootOrder: //p')
part=$(readlink -f {second.path})
disk=$(lsblk --noheadings --paths --nodeps --output PKNAME "$part")
number=$(cat "/sys/class/block/${{part##*/}}/partition")
efibootmgr --quiet --create --disk "$disk" --part "$number" --label '{LABEL}' --loader '\\EFI\\systemd\\systemd-bootx64.efi'
new=$(efibootmgr --verbose | grep -i {second.uuid} | head -n 1 | sed -n 's/^Boot\\([0-9A-F]*\\).*/\\1/p')
efibootmgr --quiet --bootorder "${{order:+$order,}}$new"  # behind the others: --create puts it first""",
    )
