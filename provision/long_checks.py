"""The checks that take minutes and the whole machine: its disk, training steps, full load. Run as the person who trains."""

from pathlib import PurePosixPath
from shlex import quote

from provision.checks import Check, run_program
from provision.gpu_checks import together

STEPS = 20
LOAD_S = 60
DISK_S = 10  # for each of writing and reading, at most

# Least MB/s read and written, by what a disk is: about half of what the slow ones of each kind do.
DISK_KIND = """place=$HOME
device=$(findmnt --nofsroot --noheadings --output SOURCE --target "$place")
case $(lsblk --inverse --noheadings --raw --output TYPE,ROTA,TRAN "$device" 2> /dev/null | sed -n 's/^disk //p' | sort | tail -n 1) in
  '0 nvme') kind='NVMe disk' least='700 200' ;;
  '0 sata') kind='SATA SSD' least='200 80' ;;
  '1 '*) kind='hard disk' least='50 40' ;;
  *) kind='disk of an unknown kind' least='0 0' ;;
esac
echo "$kind below $place:"
"""
LANES = """
for disk in /sys/class/nvme/*/device; do  # one in a slot with too few lanes is slow and not ill
  [[ -e $disk/max_link_width && $(< "$disk/current_link_width") -lt $(< "$disk/max_link_width") ]] || continue
  echo "$(< "$disk/current_link_width") of $(< "$disk/max_link_width") PCIe lanes"
done
exit 1"""


def long_checks(has_gpu: bool, source: PurePosixPath, load_s: int = LOAD_S) -> list[Check]:
    """`source`: the folder on the machine that holds the workload."""
    computing = [] if has_gpu else [processor(), processes_together()]
    return [disk_speed(), *computing, training_speed(source), load(load_s)]


def disk_speed() -> Check:
    return Check(
        "disk speed",
        f"{DISK_KIND}(\n{run_program('disk', chr(34) + '$place' + chr(34), str(DISK_S), '$least')}\n) && exit\n{LANES}",
        "On the machine: sudo smartctl --all DISK (package smartmontools) tells its health and heat; sudo fstrim --all "
        "helps one that was never told what is free (timers.fstrim = true).",
        (
            ("has no room", "See free space."),
            (
                "PCIe lanes",
                "The NVMe disk is in a slot with fewer lanes than it has: the board's manual says which has all.",
            ),
            ("Input/output error", "The disk cannot be read or written: see disks."),
            (
                "hard disk",
                "A hard disk feeds no GPU: put the data on an SSD. See disks for errors that make it slower still.",
            ),
        ),
    )


def processor() -> Check:
    """What `GPUs compute` is on a machine with cards."""
    return Check(
        "processor computes",
        run_program("compute", "cpu"),
        "A wrong product means faulty memory or an unstable overclock: memtest86+, and the firmware's defaults.",
        (
            ("compiler|g\\+\\+", "torch.compile found no compiler that works: fab provision installs gcc."),
            ("Illegal instruction", "This torch is built for newer processors."),
        ),
    )


def processes_together() -> Check:
    check = together(count="2")
    return Check(
        "processes together", check.script, "On the machine: ip address show lo; it must be up.", check.causes
    )


def training_speed(source: PurePosixPath) -> Check:
    return Check(
        "training speed",
        run_program("speed", quote(str(source)), str(STEPS)),
        "On the machine: the end of the output says why; python -m workload bench says more.",
        (
            (
                "do not fit|out of memory",
                "Something else holds the card's memory: nvidia-smi names the process.",
            ),
            (
                "No module named",
                "The environment lacks what the workload needs: fab provision makes it anew.",
            ),
            (
                "torch.compile failed.*less than half|less than half.*torch.compile failed",
                "It trains without torch.compile: see GPUs compute; fab provision installs gcc.",
            ),
            (
                "less than half",
                "See load: heat, power limit (nvidia-smi --query --display=POWER), PCIe lanes; and whether other programs are at work.",
            ),
            (
                "Killed|Cannot allocate memory",
                "The machine's memory is too small, or somebody else uses it: free --human",
            ),
        ),
        limit_s=1800,  # torch.compile for each card, and processors that are emulated
    )


def load(seconds: int) -> Check:
    return Check(
        "load",
        run_program("load", str(seconds)),
        "On the machine: nvidia-smi --query --display=PERFORMANCE,TEMPERATURE,POWER while it works.",
        (
            (
                "came out differently",
                "It computes wrongly when hot: not to be trained on. Take an overclock back, look at its power supply; else replace it.",
            ),
            (
                "power supply brakes",
                "The card gets too little power: its cables (one for each plug), the power supply's size.",
            ),
            (
                "too hot",
                "Heat: fans, dust, paste, the case's air; or a lower limit: sudo nvidia-smi --power-limit WATTS",
            ),
            (
                "hardware slows it down",
                "Heat or too little power: at the temperature that is told, which? Fans and the case's air; cables and power supply.",
            ),
            (
                "it broke off",
                "It fails under load: heat, power supply, or the card. On the machine: journalctl --dmesg --boot | grep NVRM",
            ),
            ("PCIe lanes", "A card sits in a slot with too few lanes, or loosely; or its riser is bad."),
            (
                "its speed fell",
                "It slows down when warm: heat or power, though the sensors name neither. Watch it: nvidia-smi dmon",
            ),
        ),
        limit_s=seconds + 240,  # importing torch on an emulated processor
    )
