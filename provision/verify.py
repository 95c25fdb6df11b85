"""The proof at the end: boot, units, driver, environment, and a few optimizer steps on the device."""

from shlex import quote

from provision.checks import Check, Outcome, parse_checks, render_checks
from provision.gpu_checks import gpu_checks
from provision.host import Host
from provision.machine import Machine
from provision.system.layout import layout
from provision.system.python import ENVIRONMENT

__all__ = ["Outcome", "checks", "verify"]

DEADLINE_S = 900  # importing torch takes most of a minute on an emulated processor

LEARN = """
import torch
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
inputs = torch.randn(64, 8, device=device)
targets = inputs @ torch.randn(8, 1, device=device)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 1)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(20):
    loss = torch.nn.functional.mse_loss(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
print(f"torch {torch.__version__} on {name}: loss {losses[0]:.2f} -> {losses[-1]:.2f} in 20 steps")
assert WANT_GPU is False or device == "cuda", "torch does not see the GPU"
"""


def checks(machine: Machine, has_gpu: bool) -> list[Check]:
    """What must hold on an installed machine. `has_gpu`: an NVIDIA driver was installed on it."""
    roots = " ".join(sorted(layout(machine).roots))
    found = [
        Check(
            "root file system",
            "findmnt --noheadings --output SOURCE,FSTYPE,OPTIONS /\n"
            'on=$(lsblk --inverse --noheadings --raw --output PARTUUID "$(findmnt --nofsroot --noheadings --output SOURCE /)")\n'
            f'for root in {roots}; do ! grep -qix "$root" <<< "$on" || exit 0; done; exit 1',
            "It runs from another disk: check the firmware's boot order.",
        ),
        Check("fstab", "findmnt --verify | tail -n 1", "See findmnt --verify."),
        Check(
            "kernel modules",
            "uname -r; [[ -d /usr/lib/modules/$(uname -r)/kernel ]]",
            "An update removed the running kernel's modules: reboot.",
        ),
        Check(
            "failed units",
            "seen=$(systemctl list-units --failed --plain --no-legend | awk '{print $1}'); echo ${seen:-none}; [[ -z $seen ]]",
            "See: systemctl status UNIT; journalctl --boot --unit UNIT",
        ),
        Check(
            "free space",
            "df --output=avail,target -h / | tail -n 1; (( $(df --output=avail / | tail -n 1) > 1048576 ))",
            "Free 1 GiB.",
        ),
    ]
    if has_gpu:
        found += gpu_checks()
    learn = LEARN.replace("WANT_GPU", str(has_gpu))
    found.append(
        Check(
            "training steps",
            f"{ENVIRONMENT}/bin/python -W error::UserWarning -c {quote(learn)}",
            f"To make the environment anew, on the machine: sudo rm {ENVIRONMENT}",
        )
    )
    return found


def verify(machine: Machine, host: Host, has_gpu: bool) -> list[Outcome]:
    """One exec: all checks, in order."""
    wanted = checks(machine, has_gpu)
    return parse_checks(wanted, host.look(render_checks(wanted), deadline_s=DEADLINE_S).stdout)
