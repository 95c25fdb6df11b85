"""The checks of every installed machine: that it boots again, from where it should, and that its disks are well.

Paths are elsewhere only in tests.
"""

from shlex import join, quote

from provision.checks import Check, run_program
from provision.machine import Machine
from provision.system.layout import layout
from provision.system.live import CLOCK_TOLERANCE_S
from provision.system.python import ENVIRONMENT

MEND = "fab provision mends it"
LEARNS = "Python environment"
# Free: on the ESP what a kernel's update writes beside the old one is in its size.
LEAST_MIB = {"/": 1024, "/boot": 32}


def system_checks(machine: Machine) -> list[Check]:
    esp = layout(machine).esp
    found = [root_file_system(machine), boot_entries(machine.system.kernels, esp.uuid), fstab(), disks()]
    return [*found, kernel_modules(), failed_units(), free_space(), clock()]


def root_file_system(machine: Machine) -> Check:
    roots = " ".join(sorted(layout(machine).roots))
    return Check(
        "root file system",
        "findmnt --noheadings --output SOURCE,FSTYPE,OPTIONS /\n"
        'on=$(lsblk --inverse --noheadings --raw --output PARTUUID "$(findmnt --nofsroot --noheadings --output SOURCE /)")\n'
        f'for root in {roots}; do ! grep -qix "$root" <<< "$on" || exit 0; done\necho "on none of: {roots}"; exit 1',
        "It runs from another disk: check the firmware's boot order.",
    )


def boot_entries(kernels: tuple[str, ...], esp_uuid: str, boot: str = "/boot", modules: str = "") -> Check:
    """What the firmware, systemd-boot and its menu name is there, and every kernel on the ESP has its modules."""
    modules = modules or "/usr/lib/modules"
    script = f"""wrong=
bad() {{ echo "$1;"; wrong=yes; }}
version_of() {{  # of a bzImage: https://docs.kernel.org/arch/x86/boot.html, kernel_version at 0x20e
  local at
  at=$(od --address-radix=n --skip-bytes=526 --read-bytes=2 --format=u2 "$1" | xargs)
  dd if="$1" bs=1 skip="$((at + 512))" count=80 status=none | tr '\\0' '\\n' | head -n 1 | cut -d' ' -f1
}}
cd {quote(boot)} || exit
default=$(sed -n 's/^default *//p' loader/loader.conf 2> /dev/null)
[[ $default && -s loader/entries/$default ]] || bad "loader.conf boots '${{default:-nothing}}', which is no entry"
for kernel in {join(kernels)}; do
  [[ -s loader/entries/arch-$kernel.conf ]] || bad "there is no entry for $kernel"
  [[ -s vmlinuz-$kernel ]] || continue
  version=$(version_of "vmlinuz-$kernel")
  [[ $version && -d {quote(modules)}/$version/kernel ]] || bad "vmlinuz-$kernel is ${{version:-no kernel}}, which has no modules"
done
for entry in loader/entries/*.conf; do
  [[ -e $entry ]] || continue
  while read -r key value; do
    case $key in linux|initrd|efi) [[ -s .$value ]] || bad "${{entry##*/}} names $value, which is empty or missing" ;; esac
  done < "$entry"
done
for file in EFI/systemd/systemd-bootx64.efi EFI/BOOT/BOOTX64.EFI; do
  [[ -s $file ]] || bad "systemd-boot is missing: $file"
done
firmware=$(efibootmgr --verbose 2>&1) || bad "efibootmgr: ${{firmware##*$'\\n'}}"
grep -qi 'Linux Boot Manager.*{esp_uuid}' <<< "$firmware" || bad "the firmware has no entry for this disk"
[[ ! $wrong ]] || exit 1
echo "$default, and $(ls loader/entries | wc -l) in all\""""
    return Check(
        "boot entries",
        script,
        f"It may not boot again. {MEND}.",
        (
            (
                "has no modules",
                "Kernel and modules are of different versions. On the machine: sudo pacman -Syu, which puts both in; "
                "is /boot mounted?",
            ),
            (
                "initramfs.* empty or missing",
                "On the machine: sudo mkinitcpio --allpresets; df /boot says whether it is full.",
            ),
            (
                "efibootmgr: .*not supported",
                "It was not booted by UEFI, or the kernel was upgraded without a reboot.",
            ),
            ("the firmware has no entry", f"Firmwares forget entries when their battery is empty. {MEND}."),
        ),
    )


def fstab(path: str = "/etc/fstab") -> Check:
    """It is right, and what it names is mounted or, if it is swap, in use."""
    script = f"""wrong=
said=$(findmnt --verify --tab-file {quote(path)} 2>&1) || {{ wrong=yes; awk '/parse error at/ {{ print $0 ";" }}
/^[^ ]/ {{ place = $0 }} /\\[E\\]/ {{ sub(/^ *\\[E\\] */, ""); print place ": " $0 ";" }}' <<< "$said"; }}
place() {{ case $1 in
  UUID=*) echo "/dev/disk/by-uuid/${{1#*=}}" ;; PARTUUID=*) echo "/dev/disk/by-partuuid/${{1#*=}}" ;;
  LABEL=*) echo "/dev/disk/by-label/${{1#*=}}" ;; *) echo "$1" ;;
esac; }}
swaps=$(swapon --noheadings --raw --show=NAME | while read -r used; do readlink -f "$used"; done)
count=0
while read -r source folder kind options _; do
  [[ $source && $source != \\#* && ,$options, != *,noauto,* ]] || continue
  printf -v folder %b "$folder"  # blanks are written \\040
  count=$((count + 1))
  if [[ $kind == swap ]]; then
    grep -qxF "$(readlink -f "$(place "$source")")" <<< "$swaps" || {{ echo "swap $source is not in use;"; wrong=yes; }}
  elif [[ $folder == /* ]]; then
    mountpoint --quiet "$folder" || {{ echo "$folder is not mounted ($source);"; wrong=yes; }}
  fi
done < {quote(path)}
[[ ! $wrong ]] || exit 1
echo "$count entries, all in use"\
"""
    return Check(
        "fstab",
        script,
        f"On the machine, findmnt --verify says more; {MEND}.",
        (
            (
                "parse error at",
                "A line cannot be read; whatever stands below it is still mounted, a reboot may end in emergency mode. "
                + MEND
                + ".",
            ),
            (
                r"unreachable.* source|unreachable on boot required source",
                "A disk or partition that it names is not there: is it plugged in? lsblk --output NAME,PARTUUID,UUID",
            ),
            (r"unreachable.* target", f"A folder to mount on is missing: {MEND}."),
            (
                "is not mounted",
                "On the machine: sudo mount --all --verbose says why; journalctl --dmesg --boot names a disk that fails.",
            ),
            ("is not in use", "On the machine: sudo swapon --all --verbose says why."),
        ),
    )


def disks() -> Check:
    """The kernel's complaints, and what btrfs counted: errors since the file system was made, disks that are gone."""
    script = r"""wrong=
kernel=$(journalctl --dmesg --boot --no-pager --quiet --output=cat 2> /dev/null | grep -E \
  'I/O error, dev (sd|nvme|vd)|critical (target|medium) error|EXT4-fs error|BTRFS (error|critical)|nvme.*(timeout, reset|controller is down)|ata[0-9.]+: failed command|[Rr]emounting filesystem read-only')
[[ ! $kernel ]] || { tail -n 3 <<< "$kernel"; wrong=yes; }
if [[ $(findmnt --noheadings --output FSTYPE /) == btrfs ]]; then
  btrfs device stats --check / > /dev/null 2>&1 || { btrfs device stats / | awk '$2 != 0'; wrong=yes; }
  ! btrfs filesystem show / 2>&1 | grep -i missing || wrong=yes
fi
while read -r folder options; do
  case ,$options, in *,ro,*) echo "$folder is read-only;"; wrong=yes ;; esac
done < <(findmnt --noheadings --raw --types ext4,btrfs,xfs,vfat --output TARGET,OPTIONS)
[[ ! $wrong ]] || exit 1
echo 'no errors since the boot'"""
    return Check(
        "disks",
        script,
        "Save what you need: fab fetch-checkpoints. Then on the machine: sudo smartctl --all DISK (package smartmontools).",
        (
            (
                r"(?i)\bmissing\b",
                "A disk of the mirror is gone: nothing is twice any more. Fetch the checkpoints, replace it, install anew.",
            ),
            (
                "controller is down|timeout, reset",
                "An NVMe disk stops answering: its seat and heat, its firmware; or the kernel parameter "
                "nvme_core.default_ps_max_latency_us=0 (system.cmdline), as its sleep is at fault on some boards.",
            ),
            (
                "failed command",
                "The cable or the port of a SATA disk, before the disk itself.",
            ),
            (
                r"corruption_errs|EXT4-fs error|BTRFS",
                "What is on a disk is damaged: memory (memtest86+) or the disk itself. Fetch the checkpoints first.",
            ),
            (
                "read-only",
                "A file system turned read-only after an error: journalctl --dmesg --boot names it.",
            ),
        ),
    )


def kernel_modules() -> Check:
    return Check(
        "kernel modules",
        "uname -r; [[ -d /usr/lib/modules/$(uname -r)/kernel ]]",
        "An update removed the running kernel's modules: reboot.",
    )


def failed_units() -> Check:
    return Check(
        "failed units",
        """seen=$(systemctl list-units --failed --plain --no-legend | awk '{print $1}')
for unit in $seen; do
  last=$(journalctl --boot --unit "$unit" --no-pager --quiet --output=cat 2> /dev/null | grep . | grep -v '^Failed to start' | tail -n 1)
  echo "$unit${last:+ (${last:0:200})};"
done
[[ ! $seen ]] || exit 1
echo none""",
        "On the machine: systemctl status UNIT; journalctl --boot --unit UNIT. Once it is mended: sudo systemctl reset-failed",
        (
            (r"No space left on device", "A disk is full: see free space; then sudo systemctl restart UNIT."),
            (
                r"systemd-modules-load",
                "A kernel module that /etc/modules-load.d names is not there: after an update, reboot.",
            ),
            (
                r"\S+\.mount\b|fsck@",
                "A file system was not mounted: see fstab and disks.",
            ),
            (
                "metal-run-",
                "A training run failed: fab runs shows it, fab logs says why, fab resume lets it go on.",
            ),
        ),
    )


def free_space(least: dict[str, int] | None = None) -> Check:
    """`least`: folder → MiB that its file system must have left."""
    wanted = " ".join(f"{quote(folder)} {mib}" for folder, mib in (least or LEAST_MIB).items())
    return Check(
        "free space",
        f"""wrong= told=
set -- {wanted}
while (($#)); do
  read -r left nodes there <<< "$(df --block-size=1K --output=avail,iavail,itotal "$1" | tail -n 1)"
  left=$((left / 1024))
  told+="$1 $left MiB; "
  if ((left < $2)); then wrong+="$1 has $left MiB left, and needs $2; "; fi
  if [[ $there == [1-9]* ]] && ((nodes < 1000)); then wrong+="$1 has room for $nodes more files; "; fi
  shift 2
done
echo "${{wrong:-$told}}"
[[ ! $wrong ]]""",
        "On the machine: sudo du --one-file-system --human-readable --max-depth=2 / | sort --human-numeric-sort | tail. "
        "fab runs and fab remove take runs away; sudo paccache --remove old packages.",
        (
            (
                "/boot has",
                "On the machine: ls -l /boot. Kernels that system.kernels does not name can go: sudo pacman --remove.",
            ),
            (
                "more files",
                "Many small files, of a data set perhaps: sudo du --inodes --max-depth=2 / | sort -n | tail",
            ),
        ),
    )


def clock() -> Check:
    """Only says what it is; `judge_clock` compares it with this computer's."""
    return Check(
        "clock",
        """echo "figure clock_s $(date +%s)"
[[ $(timedatectl show --property NTPSynchronized --value 2> /dev/null) == yes ]] && echo synchronised || echo 'not synchronised by NTP'""",
        "On the machine: sudo timedatectl set-ntp true; timedatectl timesync-status says whether a server answers. "
        "Where NTP is blocked: sudo date --set='…'; sudo hwclock --systohc",
    )


def learns(has_gpu: bool) -> Check:
    return Check(
        LEARNS,
        run_program("learn", "gpu" if has_gpu else "cpu", warnings="error::UserWarning"),
        f"To make the environment anew, on the machine: sudo rm {ENVIRONMENT}; then fab provision.",
        (
            (
                "was not done after",
                "The machine is busy or hangs: see disks, and ask again when nothing else is at work on it.",
            ),
            ("No such file|not found", f"There is no {ENVIRONMENT}: fab provision makes it."),
            (
                "torch does not see the GPU",
                "The driver does not answer, or this torch is one for processors: see cards, and fab plan.",
            ),
        ),
        limit_s=1200,  # importing torch on an emulated processor of a busy computer took more than ten minutes
    )


def clock_is_right(clock_s: float, sent_s: float, received_s: float) -> bool:
    """`sent_s`, `received_s`: this computer's clock, before it was asked and after it answered."""
    return sent_s - CLOCK_TOLERANCE_S <= clock_s <= received_s + CLOCK_TOLERANCE_S
