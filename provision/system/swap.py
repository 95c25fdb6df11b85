"""Swap: compressed memory, or room on the disk."""

from collections.abc import Iterator

from provision.facts import Facts
from provision.machine import Machine
from provision.steps import File, Packages, Script, Step
from provision.system.disk import swap_mib
from provision.system.layout import SWAP_FILE

ZRAM_MOST_MIB = 8192


def swap(machine: Machine, facts: Facts) -> Iterator[Step]:
    disk = machine.disk
    if disk.swap == "zram":
        size = str(disk.swap_gib * 1024) if disk.swap_gib else f"min(ram / 2, {ZRAM_MOST_MIB})"
        yield Packages("zram-generator", why="swap in compressed memory")
        yield File(
            "/etc/systemd/zram-generator.conf",
            f"[zram0]\nzram-size = {size}\ncompression-algorithm = zstd\n",
            why="how much of it",
            then="[[ $root ]] || { systemctl daemon-reload; systemctl restart systemd-zram-setup@zram0.service; }",
        )
    if disk.swap == "file":
        size_mib = swap_mib(machine, facts)
        new = f'"$root"{SWAP_FILE}.new'
        make = (
            f"btrfs filesystem mkswapfile --size {size_mib}m {new}"
            if disk.filesystem == "btrfs"
            else f"umask 077\nfallocate --length {size_mib}MiB {new}\nmkswap -q {new}"
        )
        is_swap = f'[[ $(blkid --probe --match-tag TYPE --output value "$root"{SWAP_FILE}) == swap ]]'
        yield Script(
            f"swap file of {size_mib} MiB",
            why="as disk.swap says",
            probe=f'{is_swap} && {{ [[ $root ]] || grep -q "^{SWAP_FILE} " /proc/swaps; }} && echo yes',
            script=f"""mkdir -p "$root"{SWAP_FILE.rpartition("/")[0]}
if ! {is_swap}; then
rm -f {new}
{make}
sync
mv {new} "$root"{SWAP_FILE}
fi
[[ $root ]] || swapon {SWAP_FILE}""",
        )
