"""A machine file and the facts of two hosts, written by hand after what the probe prints."""

import base64
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from provision.facts import Facts, parse_facts
from provision.machine import Machine, load_machine

Run = Callable[[str], subprocess.CompletedProcess[str]]
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJxCVsJW7mnqQ5hPzLmV4x2nWJ9Zs0Yw3e8oTqk5fGhd person@laptop"


def machine_folder(folder: Path, text: str, name: str = "gpu1") -> Path:
    (folder / f"{name}.toml").write_text(text)
    return folder


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    folder = tmp_path / "machines"
    folder.mkdir()
    text = f'[disk]\nserial = "S4EWNX0R"\n[user]\nauthorized_keys = ["{KEY}"]\n'
    return load_machine("gpu1", machine_folder(folder, text))


LSBLK = {
    "blockdevices": [
        {
            "name": "/dev/nvme0n1", "type": "disk", "size": 1000204886016, "serial": "S4EWNX0R", "model": "Example SSD 1TB",
            "ro": False, "fstype": None, "label": None, "uuid": None, "parttype": None, "partuuid": None, "partlabel": None,
            "mountpoints": [None],
        },
        {
            "name": "/dev/sda", "type": "disk", "size": 16008609792, "serial": "STICK1", "model": "Flash Drive",
            "ro": False, "fstype": "iso9660", "label": "ARCH_202611", "uuid": "2026-11-01-08-00-00-00", "parttype": None, "partuuid": None,
            "partlabel": None, "mountpoints": [None],
            "children": [
                {
                    "name": "/dev/sda1", "type": "part", "size": 900000000, "serial": None, "model": None, "ro": False,
                    "fstype": "iso9660", "label": "ARCH_202611", "uuid": "2026-11-01-08-00-00-00", "parttype": "0x0", "partuuid": "AB-01",
                    "partlabel": None, "mountpoints": ["/run/archiso/bootmnt"],
                }
            ],
        },
        {
            "name": "/dev/loop0", "type": "loop", "size": 800000000, "serial": None, "model": None, "ro": True,
            "fstype": "squashfs", "label": None, "uuid": None, "parttype": None, "partuuid": None, "partlabel": None,
            "mountpoints": ["/run/archiso/airootfs"],
        },
    ]
}  # fmt: skip

# EDID of a DELL U2723QE, 27 inches: 3840 x 2160 at 60 Hz
DELL_U2723QE = bytes.fromhex("""
00 ff ff ff ff ff ff 00 10 ac 79 42 4c 47 5a 42 0f 22 01 04 b5 3c 22 78 3a df 15 ad 50 44 ad 25
0f 50 54 a5 4b 00 d1 00 d1 c0 b3 00 a9 40 81 80 81 00 71 4f e1 c0 4d d0 00 a0 f0 70 3e 80 30 20
35 00 55 50 21 00 00 1a 00 00 00 ff 00 32 33 5a 53 4a 30 34 0a 20 20 20 20 20 00 00 00 fc 00 44
45 4c 4c 20 55 32 37 32 33 51 45 0a 00 00 00 fd 00 17 56 0f 8c 36 01 0a 20 20 20 20 20 20 01 2a
""")

PROBED_LIVE = f"""
@system
live

@owner

@applying
inactive

@runs

@reboot

@hostname
archiso

@os
arch

@boot_id
5f0c0e0e-1111-2222-3333-444455556666

@clock
1800000000

@firmware
uefi

@kernel
6.17.1-arch1-1

@cpu
AuthenticAMD

@cpu_model
Example 9 7950X 16-Core Processor

@memory
32768000

@root

@subvolume
/

@medium
/dev/sda

@lsblk
{json.dumps(LSBLK, indent=3)}

@holdings
/dev/nvme0n1 aaaa
/dev/sda bbbb

@by_id
nvme-Example_SSD_1TB_S4EWNX0R ../../nvme0n1
nvme-eui.0025385b21404321 ../../nvme0n1
nvme-eui.0025385b21404321-part1 ../../nvme0n1p1
usb-Flash_Drive_STICK1-0:0 ../../sda

@used


@tpm
2

@blank
/dev/nvme0n1

@gpus
0000:01:00.0 0x2684

@nics
enp5s0 a8:a1:59:00:00:01

@screens
card1-DP-1 {base64.b64encode(DELL_U2723QE).decode()}
card1-HDMI-A-1

@end
"""


@pytest.fixture
def live() -> Facts:
    return parse_facts(PROBED_LIVE)


def with_target(facts: Facts, **changes: object) -> Facts:
    """The same facts with the target disk changed."""
    target, *others = facts.disks
    return replace(facts, disks=(replace(target, **changes), *others))  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    scratch = tmp_path / "root"
    for folder in ("usr", "etc", "var/lib", "dev", "home", "tmp"):
        (scratch / folder).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (scratch / name).symlink_to(f"usr/{name}")
    (scratch / "etc/passwd").write_text("root:x:0:0::/root:/bin/bash\n")
    (scratch / "etc/group").write_text("root:x:0:\nwheel:x:998:\n")
    (scratch / "etc/shadow").write_text("root:*::::::\n")
    (scratch / "etc/login.defs").write_text("UID_MIN 1000\nUID_MAX 60000\nGID_MIN 1000\nGID_MAX 60000\n")
    return scratch


@pytest.fixture
def run(root: Path) -> Run:
    """Runs a script as root in a mount namespace where the scratch root has this computer's /usr."""

    def run_script(script: str) -> subprocess.CompletedProcess[str]:
        mounts = f"mount --bind /usr {root}/usr; mount --bind /dev {root}/dev"
        argv = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "bash",
            "-euc",
            f"{mounts}; exec bash --norc -euo pipefail -s",
        ]
        return subprocess.run(argv, input=script, capture_output=True, text=True, errors="replace")

    return run_script
