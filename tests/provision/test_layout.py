"""Layouts of disks as planned: golden Steps of three machines, what is refused, and whose disk is whose."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from provision.errors import ProvisionError
from provision.facts import HOLDINGS, Facts, Partition
from provision.flow import authorise_wipe
from provision.machine import Machine, load_machine
from provision.steps import make_plan, render_apply, render_probes, secret_file
from provision.system import system
from provision.system.crypt import encrypt
from provision.system.data import data_disks
from provision.system.disk import losing, make_filesystem, would_lose
from provision.system.inventory import describe_disk
from provision.system.layout import LOOK, MOUNT, layout
from tests.provision.conftest import KEY, machine_folder, with_target
from tests.provision.test_system import GOLDEN, NOW, installed, render

LAYOUTS = {
    "encrypted": 'filesystem = "btrfs"\nswap = "file"\nencryption = "luks"\npassphrase = "env:DISK"\nunlock = "tpm2"\n',
    "mirror": 'filesystem = "btrfs"\nmirror = "SECOND1"\nswap = "partition"\ndata = ["ARCHIVE1 /data", "BLANK1 /scratch"]\n',
    "remote": 'encryption = "luks"\npassphrase = "env:DISK"\nunlock = "ssh"\n',
    "home": 'root_gib = 64\nswap = "partition"\nswap_gib = 8\nencryption = "luks"\npassphrase = "env:DISK"\nunlock = "console"\n',
}


def wish(folder: Path, text: str) -> Machine:
    folder.mkdir(exist_ok=True)
    content = f'[disk]\nserial = "S4EWNX0R"\n{text}[user]\nauthorized_keys = ["{KEY}"]\n'
    return load_machine("gpu1", machine_folder(folder, content))


@pytest.fixture
def several(live: Facts) -> Facts:
    """The same host with a second disk like the first, one that holds an archive, and a blank one."""
    first, stick = live.disks
    archive = Partition("/dev/sdb1", 10**12, "xfs", "photos", "x", "y", "archive", (), "1234-fs", 6 * 10**11)
    second, old, blank = (
        replace(first, path=path, serial=serial, names=())
        for path, serial in (("/dev/nvme1n1", "SECOND1"), ("/dev/sdb", "ARCHIVE1"), ("/dev/sdc", "BLANK1"))
    )
    return replace(live, disks=(first, stick, second, replace(old, partitions=(archive,)), blank))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("system_name", ["live", "installed"])
def test_golden_layouts(tmp_path: Path, several: Facts, name: str, system_name: str) -> None:
    """The Steps that differ from those of the plain machine, which has golden files of its own."""
    machine, plain = wish(tmp_path / "wished", LAYOUTS[name]), wish(tmp_path / "plain", "")

    def steps(wanted: Machine) -> list[str]:
        facts = several if system_name == "live" else installed(wanted, several)
        return [render([step]) for step in system(wanted, facts, NOW)]

    usual = set(steps(plain))
    rendered = "\n".join(step for step in steps(machine) if step not in usual)
    golden = GOLDEN / f"{name}-{system_name}.txt"
    if "UPDATE_GOLDEN" in os.environ:  # then read the difference, line by line
        golden.write_text(rendered)
    assert rendered == golden.read_text()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("system_name", ["live", "installed"])
def test_layouts_are_bash(tmp_path: Path, several: Facts, name: str, system_name: str) -> None:
    machine = wish(tmp_path / "machines", LAYOUTS[name])
    steps = system(machine, several if system_name == "live" else installed(machine, several), NOW)
    plan = make_plan("", steps, [("?", True)] * len(steps))
    scripts = [render_probes(steps, MOUNT, layout(machine).probe_mounts), render_apply(plan, MOUNT), LOOK]
    for script in [*scripts, *(text for step in steps for text in (step.script, step.probe, step.then))]:
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr + script


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('mirror = "X"\n', "disk.mirror needs disk.filesystem"),
        ('mirror = "S4EWNX0R"\nfilesystem = "btrfs"\n', "needs a second disk"),
        ('root_gib = 64\nfilesystem = "btrfs"\n', "root_gib is for ext4"),
        ("root_gib = 4\n", "needs 8"),
        ('mirror = "X"\nfilesystem = "btrfs"\nswap = "file"\n', "cannot lie on a mirror"),
        ('encryption = "luks"\nunlock = "tpm2"\n', "says no passphrase"),
        ('encryption = "luks"\npassphrase = "env:DISK"\n', "would wait for a passphrase that nobody types"),
        ('passphrase = "env:DISK"\n', 'are for disk.encryption = "luks"'),
        ('unlock = "tpm2"\n', 'are for disk.encryption = "luks"'),
        ('data = ["A /data", "A /more"]\n', "A is used twice"),
        ('data = ["A /data", "B /data"]\n', "/data is taken"),
        ('data = ["A /usr/data"]\n', "belongs to the system"),
        ('data = ["A"]\n', "is not a serial number, a blank and a folder"),
        ('data = ["A /home"]\nroot_gib = 64\n', "/home is taken"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ProvisionError, match=reason):
        wish(tmp_path / "machines", text)


def test_a_machine_without_tpm_is_refused_before_the_wipe(tmp_path: Path, several: Facts) -> None:
    machine = wish(tmp_path / "machines", LAYOUTS["encrypted"])
    with pytest.raises(ProvisionError, match="shows no TPM"):
        system(machine, replace(several, tpm=0), NOW)
    with pytest.raises(ProvisionError, match=r"shows a TPM 1\.2"):
        system(machine, replace(several, tpm=1), NOW)


def test_a_disk_of_another_size_is_refused(tmp_path: Path, live: Facts) -> None:
    assert system(wish(tmp_path / "machines", "size_gib = 932\n"), live, NOW)
    with pytest.raises(
        ProvisionError, match=r"holds 931\.5 GiB, and disk\.size_gib of machine 'gpu1' says 1863"
    ):
        system(wish(tmp_path / "machines", "size_gib = 1863\n"), live, NOW)
    with pytest.raises(ProvisionError, match="too small for what"):
        system(wish(tmp_path / "machines", "root_gib = 2000\n"), live, NOW)


def test_two_disks_of_one_serial_are_told_apart_by_id(machine: Machine, live: Facts) -> None:
    target = live.disks[0]
    twin = replace(target, path="/dev/nvme1n1", names=("nvme-eui.00000000deadbeef",))
    twins = replace(live, disks=(target, twin))
    with pytest.raises(ProvisionError, match=r"belongs to 2 disks.*(.|\n)*eui\.00000000deadbeef"):
        system(machine, twins, NOW)
    chosen = replace(machine, disk=replace(machine.disk, serial="nvme-eui.00000000deadbeef"))
    step = next(step for step in system(chosen, twins, NOW) if step.name.startswith("partition"))
    assert step.name == "partition /dev/nvme1n1"
    assert '[[ $(readlink -f /dev/disk/by-id/nvme-eui.00000000deadbeef) == "$disk" ]]' in step.script


def laid_out(machine: Machine, facts: Facts, **changes: object) -> Facts:
    """The live system, with the target laid out for this machine."""
    return with_target(replace(installed(machine, facts), system="live"), **{"mounted": (), **changes})


def test_another_layout_of_the_same_machine_is_not_taken_for_this_one(tmp_path: Path, several: Facts) -> None:
    plain = wish(tmp_path / "plain", "")
    facts = laid_out(plain, several)
    assert losing(plain, facts) == []
    for name, text in LAYOUTS.items():
        wished = wish(tmp_path / name, text)
        assert [disk.path for disk in losing(wished, facts)] == ["/dev/nvme0n1"], name
        assert not {part.uuid for part in layout(plain).parts if part.kind != "esp"} & {
            part.uuid for part in layout(wished).parts
        }


def test_another_machines_installation_is_named(machine: Machine, live: Facts) -> None:
    other = replace(machine, name="tower")
    facts = laid_out(other, live)
    assert "an installation of ours, for machine 'tower'" in would_lose(machine, facts)
    with pytest.raises(ProvisionError, match="not ours; nothing was changed"):
        authorise_wipe(machine, facts, "", ask=lambda _: "", console=Console(quiet=True))


def test_bytes_in_use_are_told(several: Facts) -> None:
    assert "xfs photos archive  558.8 GiB used" in describe_disk(several.disks[3])


def test_each_disk_of_a_mirror_is_authorised(tmp_path: Path, several: Facts) -> None:
    machine = wish(tmp_path / "machines", 'filesystem = "btrfs"\nmirror = "ARCHIVE1"\n')
    with pytest.raises(ProvisionError, match="not ours; nothing") as caught:
        authorise_wipe(machine, several, "S4EWNX0R", ask=lambda _: "", console=Console(quiet=True))
    assert "--wipe=ARCHIVE1" in caught.value.hint
    authorise_wipe(machine, several, "ARCHIVE1", ask=lambda _: "", console=Console(quiet=True))
    authorise_wipe(machine, several, "S4EWNX0R,ARCHIVE1", ask=lambda _: "", console=Console(quiet=True))
    with pytest.raises(ProvisionError, match="--wipe=BLANK1 is not the disk"):
        authorise_wipe(machine, several, "ARCHIVE1,BLANK1", ask=lambda _: "", console=Console(quiet=True))


def test_what_is_left_in_use_is_taken_apart_only_on_a_disk_of_ours(machine: Machine, live: Facts) -> None:
    names = [
        step.name for step in system(machine, laid_out(machine, live, mounted=("/mnt", "/mnt/boot")), NOW)
    ]
    assert not any(name.startswith("free ") for name in names)
    busy = laid_out(machine, live, mounted=("/mnt", "/old", "[SWAP]"), stacked=("/dev/mapper/vg-old",))
    step = next(step for step in system(machine, busy, NOW) if step.name == "free /dev/nvme0n1")
    assert "/old, [SWAP], /dev/mapper/vg-old" in step.why
    with pytest.raises(ProvisionError, match="in use: /old"):
        system(machine, with_target(live, mounted=("/old",)), NOW)
    # Active, but unmounted, as the ISO activates what it finds: goes with the disk, once that is authorised.
    idle = with_target(live, stacked=("/dev/mapper/vg-old",))
    assert [disk.path for disk in losing(machine, idle)] == ["/dev/nvme0n1"]
    assert any(step.name == "partition /dev/nvme0n1" for step in system(machine, idle, NOW))
    shared = replace(idle, disks=(idle.disks[0], replace(idle.disks[1], stacked=("/dev/mapper/vg-old",))))
    with pytest.raises(ProvisionError, match=r"vg-old lies on /dev/nvme0n1 .* and on /dev/sda too"):
        system(machine, shared, NOW)


def test_a_layout_that_the_installed_disk_has_not_is_refused(tmp_path: Path, several: Facts) -> None:
    plain = installed(wish(tmp_path / "plain", ""), several)
    with pytest.raises(ProvisionError, match="lacks partitions that the machine file asks for: swap@gpu1"):
        system(wish(tmp_path / "swap", 'swap = "partition"\n'), plain, NOW)
    with pytest.raises(ProvisionError, match="not from the root that we made"):
        system(wish(tmp_path / "btrfs", 'filesystem = "btrfs"\n'), plain, NOW)


def with_data(several: Facts, **changes: object) -> Facts:
    *others, blank = several.disks
    return replace(several, disks=(*others, replace(blank, **changes)))  # type: ignore[arg-type]


def test_data_disks(tmp_path: Path, several: Facts) -> None:
    machine = wish(tmp_path / "machines", 'data = ["ARCHIVE1 /data", "BLANK1 /scratch"]\n')
    archive, blank = data_disks(machine, several)
    assert (archive.source, archive.blank) == ("UUID=1234-fs", False)
    assert blank.source.startswith("PARTUUID=")
    assert blank.blank
    made = Partition("/dev/sdc1", 1, "ext4", "", "", blank.partition_uuid, "", ())
    again = list(data_disks(machine, with_data(several, partitions=(made,))))[1]
    assert (again.source, again.blank) == (blank.source, False)

    two = (
        Partition("/dev/sdc1", 1, "ext4", "", "", "", "", (), "a"),
        Partition("/dev/sdc2", 1, "ext4", "", "", "", "", (), "b"),
    )
    for changes, count in (
        ({"partitions": two}, 2),
        ({"filesystem": "crypto_LUKS", "filesystem_uuid": "x"}, 0),
    ):
        with pytest.raises(ProvisionError, match=f"there are {count} file systems"):
            list(data_disks(machine, with_data(several, **changes)))
    whole = list(data_disks(machine, with_data(several, filesystem="ext4", filesystem_uuid="c")))[1]
    assert whole.source == "UUID=c"
    with pytest.raises(ProvisionError, match=r"No disk with serial .BLANK1., which disk\.data"):
        list(data_disks(machine, replace(several, disks=several.disks[:-1])))


def test_no_data_disk_is_formatted_that_is_not_blank(tmp_path: Path, several: Facts) -> None:
    machine = wish(tmp_path / "machines", 'data = ["ARCHIVE1 /data", "BLANK1 /scratch"]\n')
    steps = system(machine, installed(machine, several), NOW)
    formatting = [step for step in steps if "mkfs" in step.script]
    assert [step.name for step in formatting] == ["data disk /dev/sdc"]


def test_a_machine_that_lost_a_disk_of_its_mirror_says_so(tmp_path: Path, several: Facts) -> None:
    machine = wish(tmp_path / "machines", 'filesystem = "btrfs"\nmirror = "SECOND1"\n')
    facts = installed(machine, several)
    alone = replace(facts, disks=tuple(disk for disk in facts.disks if disk.serial != "SECOND1"))
    with pytest.raises(ProvisionError, match="runs without a disk of its mirror: serial SECOND1 is gone"):
        system(machine, alone, NOW)


def test_a_copy_of_our_disk_is_not_written_to(machine: Machine, live: Facts) -> None:
    """Its partitions have our ids, and /dev/disk/by-partuuid may lead to it."""
    ours = laid_out(machine, live)
    copy = replace(ours.disks[0], path="/dev/sdb", serial="BACKUP1", names=())
    blanked = replace(live, disks=(*live.disks, copy))
    nameless = replace(live, disks=(*live.disks, replace(copy, serial="", model="BACKUP1")))
    for facts in (blanked, nameless, replace(ours, disks=(*ours.disks, copy))):
        with pytest.raises(ProvisionError, match=r"carries the ids of machine 'gpu1' too(.|\n)*BACKUP1"):
            system(machine, facts, NOW)


def test_a_disk_that_is_ours_is_never_wiped_by_a_later_look(machine: Machine, live: Facts) -> None:
    step = next(
        step for step in system(machine, laid_out(machine, live), NOW) if step.name.startswith("partition")
    )
    assert "wipefs" not in step.script
    assert "sgdisk" not in step.script


def test_what_is_not_known_is_not_blank(machine: Machine, live: Facts) -> None:
    """Plain dm-crypt, a LUKS volume whose header lies elsewhere: no signature, and yet somebody's."""
    strange = with_target(live, empty=False)
    assert "not empty" in would_lose(machine, strange)
    with pytest.raises(ProvisionError, match="nothing was changed"):
        authorise_wipe(machine, strange, "", ask=lambda _: "", console=Console(quiet=True))


def test_a_data_disk_is_none_of_the_others(tmp_path: Path, several: Facts) -> None:
    machine = wish(tmp_path / "machines", 'data = ["nvme-eui.0025385b21404321 /data"]\n')
    with pytest.raises(ProvisionError, match="is /dev/nvme0n1, which the machine file names elsewhere too"):
        system(machine, several, NOW)


def bash(script: str) -> subprocess.CompletedProcess[str]:
    """As a Step's script runs; a file stands for a disk, and has no events to wait for."""
    head = 'udevadm() { :; }; blockdev() { stat --format %s "$2"; }\n'
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", head + script], capture_output=True, text=True, check=False
    )


def image(path: Path) -> Path:
    path.touch()
    os.truncate(path, 64 << 20)
    return path


def test_a_file_system_that_could_not_be_seen_when_planned_is_found_done(tmp_path: Path) -> None:
    """On a volume that was locked then; another one of the same kind is refused."""
    device, ident = image(tmp_path / "root"), "29317be3-46ca-5825-9418-9a5cdcfaf559"
    step = make_filesystem("root", (str(device),), "ext4", ident, f"mkfs.ext4 -q -U {ident}")
    assert bash(step.script).returncode == 0
    before = device.read_bytes()
    assert bash(step.script).returncode == 0
    assert device.read_bytes() == before
    other = make_filesystem("root", (str(device),), "ext4", ident.replace("2", "3"), "mkfs.ext4 -q")
    assert bash(other.script).returncode == 1
    assert device.read_bytes() == before


def test_two_kinds_of_file_system_at_once_are_not_blank(tmp_path: Path) -> None:
    device = image(tmp_path / "both")
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    fat = image(tmp_path / "fat")
    subprocess.run(["mkfs.fat", fat], check=True, stdout=subprocess.DEVNULL)
    with device.open("r+b") as file:
        file.write(fat.read_bytes()[:1024])  # before ext4's own superblock
    assert bash(f"{LOOK}look {device}").stdout == "unclear (blkid says 8)\n"
    step = make_filesystem("root", (str(device),), "ext4", "x", "mkfs.ext4 -q")
    assert bash(step.script).returncode == 1


def test_blank_means_no_signature_and_zeros_at_both_ends(tmp_path: Path) -> None:
    def says(path: Path) -> str:
        return bash(f"{HOLDINGS}\nif is_blank {path}; then echo blank; else echo not; fi").stdout.strip()

    disk = image(tmp_path / "disk")
    assert says(disk) == "blank"
    for place in (4096, (64 << 20) - 100):
        with disk.open("r+b") as file:
            file.seek(place)
            file.write(b"somebody's")
        assert says(disk) == "not"
        disk.unlink()
        image(disk)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    assert says(disk) == "not"


def test_a_volume_that_has_a_key_is_never_made_again(tmp_path: Path) -> None:
    """However long its header is: TPM2 keys make it longer than a pipe holds."""
    machine = wish(tmp_path / "machines", LAYOUTS["encrypted"])
    part, device = layout(machine).encrypted[0], image(tmp_path / "volume")
    secret = tmp_path / "secret"
    secret.write_text("passphrase")
    options = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000"
    script = encrypt(machine, part).script.replace(part.path, str(device))
    script = script.replace(secret_file(machine.disk.passphrase), str(secret)).replace(
        "luksFormat", f"luksFormat {options}"
    )
    assert bash(script).returncode == 0, bash(script).stderr
    for _ in range(6):
        key = f"cryptsetup luksAddKey --batch-mode {options} --key-file {secret} {device} {secret}"
        subprocess.run(key.split(), check=True)
    before = device.read_bytes()
    refused = bash(script)
    assert refused.returncode == 1
    assert "holds crypto_LUKS" in refused.stdout
    assert device.read_bytes() == before
