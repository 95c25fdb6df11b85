"""The checks of an NVIDIA machine: driver, device files, daemon, every card computing, the kernel's complaints.

Each remedy is for the cause that what was seen points to. `sysfs` and `dev` are elsewhere only in tests.
"""

from shlex import quote

from provision.checks import SCRATCH, Check, run_program
from provision.programs import program
from provision.system.gpu import DAEMON
from provision.system.python import ENVIRONMENT

REBOOT = "Reboot it: sudo systemctl reboot"
OLD_CARD = (
    'The card is older than Turing, which this driver left out. In the machine file: [gpu] driver = "auto", and legacy_commit, '
    "of which `fab plan` says more."
)
UVM = "On the machine: sudo modprobe nvidia-uvm; sudo nvidia-modprobe -u -c 0"


def gpu_checks(sysfs: str = "/sys", dev: str = "/dev") -> list[Check]:
    return [
        driver_modules(sysfs),
        driver_version(sysfs),
        device_files(dev),
        Check(
            "persistence daemon",
            f"systemctl is-active {DAEMON}",
            f"On the machine: sudo systemctl restart {DAEMON}; journalctl --boot --unit {DAEMON}",
        ),
        cards(sysfs),
        kernel_log(),
        compute(),
        together(),
    ]


def driver_modules(sysfs: str, dkms: str = "/var/lib/dkms") -> Check:
    return Check(
        "driver modules",
        f"""loaded=$(for module in nvidia nvidia_uvm nouveau nova_core; do
  if [[ -d {sysfs}/module/$module ]]; then echo $module; fi
done | xargs)
echo "loaded: ${{loaded:-no driver}}."
[[ $loaded == "nvidia nvidia_uvm" ]] && exit
if ! modinfo nvidia > /dev/null 2>&1; then
  echo "no nvidia module for $(uname -r)."
  dkms status 2> /dev/null | grep nvidia | grep -v ': installed' | sed 's/^/dkms: /; s/$/;/'
  for log in {dkms}/nvidia/*/build/make.log; do
    if [[ -e $log ]]; then echo "$log:"; grep -iE 'error|not found|exit status' "$log" | tail -n 2; fi
  done
fi
journalctl --boot --no-pager --quiet --output=cat | grep -E 'NVRM|nvidia|nouveau|nova_core' | tail -n 5
exit 1""",
        "On the machine, this says why not: sudo modprobe nvidia; journalctl --dmesg --boot | tail",
        (
            (
                "Key was rejected|unavailable key|Lockdown",
                "Secure Boot lets no unsigned module in: turn it off in the firmware.",
            ),
            (r"580\.xx Legacy|ignoring the legacy GPU", OLD_CARD),
            (
                "requires use of the NVIDIA open",
                "The card needs the open modules: fab provision puts them in.",
            ),
            (
                r"dkms: |make\.log",
                "DKMS built no module: are the headers installed (pacman -Q linux-lts-headers)? Is the kernel too new for this "
                'driver? system.kernels = ["linux-lts"], then fab provision; make.log says why.',
            ),
            (
                "no nvidia module",
                f"{REBOOT}; if that does not help: dkms status, and whether the kernel's headers are installed.",
            ),
            (
                "nouveau|nova_core",
                f"nouveau was first: sudo mkinitcpio --allpresets (without the kms hook). {REBOOT}",
            ),
            (r"loaded: nvidia\.", UVM),
        ),
    )


def driver_version(sysfs: str) -> Check:
    return Check(
        "driver version",
        f"""running=$(cat {sysfs}/module/nvidia/version 2> /dev/null || echo none)
installed=$(modinfo --field version nvidia 2> /dev/null || echo none)
package=$(pacman -Q nvidia-utils | awk '{{print $2}}')
package=${{package#*:}} # without epoch
package=${{package%-*}} # and release
echo "running $running, installed $installed, nvidia-utils $package"
[[ $running == "$installed" && $installed == "$package" ]]""",
        "Module and library are of different versions: sudo pacman -Syu, then reboot.",
        (
            (
                "installed none",
                f"The running kernel has no nvidia module. {REBOOT}; if that does not help: dkms status",
            ),
            (r"running (\S+), installed (?!\1,)", f"The driver was upgraded since the boot. {REBOOT}"),
        ),
    )


def device_files(dev: str) -> Check:
    return Check(
        "device files",
        f"""missing=$(for file in nvidiactl nvidia0 nvidia-uvm; do [[ -c {dev}/$file ]] || echo {dev}/$file; done | xargs)
echo "${{missing:+missing: }}${{missing:-nvidiactl nvidia0 nvidia-uvm}}"
[[ -z $missing ]]""",
        UVM,
    )


def cards(sysfs: str) -> Check:
    """By fields and not by the banner, whose words change; `[N/A]` in one is no error."""
    return Check(
        "cards",
        f"""there=0
for device in {sysfs}/bus/pci/devices/*; do
  [[ -e $device/vendor && $(<"$device/vendor") == 0x10de ]] || continue
  case $(<"$device/class") in 0x0300*|0x0302*|0x0380*) there=$((there + 1)) ;; esac
done
fields=name,driver_version,memory.total,temperature.gpu,power.draw
seen=$(nvidia-smi --query-gpu=$fields --format=csv,noheader,nounits 2>&1) || {{ echo "$seen"; exit 1; }}
found=$(grep -c ', .*, .*, .*, ' <<< "$seen")
echo "$seen" | sed 's/$/;/'
busy=$(nvidia-smi --query-compute-apps=pid --format=csv,noheader 2> /dev/null | grep -c '^[0-9]') || true
echo "figure busy_processes ${{busy:-0}}"
(( found == there )) || {{ echo "$found cards answer, and $there are there"; exit 1; }}""",
        "On the machine: journalctl --dmesg --boot | grep NVRM names the reason.",
        (
            ("version mismatch", f"The driver was upgraded since the boot. {REBOOT}"),
            ("communicate with the NVIDIA driver", "The driver is not loaded: see driver modules."),
            (
                "No devices were found",
                "The driver is not one for this card; fab plan names the right one, and why.",
            ),
            (
                "cards answer",
                "A card does not come up: its power cables, its seat; in the firmware, Above 4G Decoding.",
            ),
        ),
    )


# Faults of programs, not of the machine: https://docs.nvidia.com/deploy/xid-errors/
OF_PROGRAMS = "13|31|43|45"
# Of the many lines that the driver writes these mean that a card is not usable.
SERIOUS = (
    r"Xid|RmInitAdapter|rm_init_adapter|fallen off|API mismatch|None of the NVIDIA|No NVIDIA|was not called for|"
    r"Legacy drivers|legacy GPU|requires use of the NVIDIA open|not include the required GPU|BAR[0-9] is 0M"
)


def kernel_log() -> Check:
    return Check(
        "kernel log",
        f"""lines=$(journalctl --dmesg --boot --no-pager --quiet --output=cat | grep NVRM | grep -vE 'Xid .*: ({OF_PROGRAMS}),')
serious=$(grep -E '{SERIOUS}' <<< "$lines")
if [[ $serious ]]; then tail -n 3 <<< "$serious"; exit 1; fi
echo "no faults in $(grep -c . <<< "$lines") lines of the driver\"""",
        "What an Xid means: https://docs.nvidia.com/deploy/xid-errors/",
        (
            (
                r"Xid .*: 79,|fallen off",
                "A card left the bus: its power cables, its seat or riser, its heat.",
            ),
            (
                r"Xid .*: (48|63|64|92|94|95),",
                "A card's memory fails: nvidia-smi --query --display=ECC,ROW_REMAPPER",
            ),
            (r"BAR\d is 0M", "In the firmware, turn Above 4G Decoding on."),
            (r"580\.xx Legacy|legacy GPU", OLD_CARD),
            (
                "requires use of the NVIDIA open",
                "The card needs the open modules: fab provision puts them in.",
            ),
            ("API mismatch", f"The driver was upgraded since the boot. {REBOOT}"),
            (
                "not include the required GPU",
                "The driver is not one for this card; fab plan names the right one, and why.",
            ),
        ),
    )


def compute() -> Check:
    return Check(
        "GPUs compute",
        run_program("compute", "gpu"),
        "See cards and kernel log; a wrong product means a fault of the card.",
        (
            (
                "no kernels for it|no kernel image",
                'The wheel of torch is not for this card: python.torch_index = "" chooses by the cards; then fab provision.',
            ),
            ("CUDA unknown error|initialization error", UVM),
            (
                "driver .*is too old|insufficient",
                "torch wants a newer driver: fab provision upgrades it, and reboot.",
            ),
            ("no NVIDIA driver", "The driver is not loaded: see driver modules."),
            ("C compiler|gcc", "torch.compile found no compiler: fab provision installs gcc."),
        ),
    )


def together(
    count: str = '$(nvidia-smi -L | grep -c "^GPU ")', python: str = f"{ENVIRONMENT}/bin/python"
) -> Check:
    """All cards add up, where there are several. `count` (bash): how many processes."""
    return Check(
        "cards together",
        f"""count={count}
if ((count < 2)); then echo "one card, alone"; exit; fi
{SCRATCH}printf %s {quote(program("together"))} > "$scratch/together.py"
export OMP_NUM_THREADS=1  # or torchrun says that it chose that
{python} -m torch.distributed.run --standalone --nproc-per-node "$count" "$scratch/together.py" > "$scratch/said" 2> "$scratch/errors" || {{
  # Of torchrun's many lines those that name a reason.
  grep -hE 'Error|NCCL WARN|Watchdog' "$scratch/errors" "$scratch/said" | grep -vE 'ChildFailedError|error_file' | tail -n 3
  exit 1
}}
cat "$scratch/said\"""",
        "On the machine: NCCL_DEBUG=INFO before a run of several cards says more.",
        (
            (
                "shm|No space left|shared memory",
                "/dev/shm is too small for NCCL: df /dev/shm; it is half of the memory, unless /etc/fstab says less.",
            ),
            (
                "[Tt]imeout|[Tt]imed out|Watchdog|P2P|peer access",
                "Copies between cards hang: turn ACS and IOMMU off in the firmware, or iommu=pt in system.cmdline. "
                "If NCCL_P2P_DISABLE=1 helps, that was it.",
            ),
            (
                "the sum over",
                "A card or a link between cards sums up wrongly: see GPUs compute and kernel log.",
            ),
        ),
    )
