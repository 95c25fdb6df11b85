"""The parts of the rehearsal that are values or plain files: no machine, no root."""

import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from provision.errors import ProvisionError
from provision.rehearsal import cache, loop, packages, qemu, rootfs, vm, wheels
from provision.rehearsal.server import Server


def test_a_stage_is_built_once_for_its_inputs(tmp_path: Path) -> None:
    built: list[str] = []
    stages = cache.Cache(tmp_path, built.append)
    write = lambda folder: (folder / "file").write_text("done") and None  # noqa: E731
    first = stages.stage("part", ["a", "b"], write)
    assert stages.stage("part", ["a", "b"], write) == first
    assert stages.stage("part", ["ab"], write) != first, "inputs must not run together"
    assert built == ["part", "part"]


def test_a_stage_depends_on_the_content_of_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("1")
    before = cache.digest([source])
    source.write_text("2")
    assert cache.digest([source]) != before


def test_a_killed_build_leaves_no_stage(tmp_path: Path) -> None:
    stages = cache.Cache(tmp_path)

    def die(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.stage("part", ["a"], die)
    folder = stages.stage("part", ["a"], lambda folder: None)
    assert list(folder.iterdir()) == [], "what the killed build left must be gone"


def test_old_stages_make_room_when_a_new_one_is_made(tmp_path: Path) -> None:
    stages = cache.Cache(tmp_path)
    old, recent = (stages.stage("part", [name], lambda folder: None) for name in ("old", "recent"))
    long_ago = time.time() - (cache.KEPT_DAYS + 1) * 86400
    os.utime(old, (long_ago, long_ago))
    stages.stage("part", ["new"], lambda folder: None)
    assert not old.exists()
    assert recent.exists()


def test_apt_sources_of_the_host_are_read_in_both_formats() -> None:
    deb822 = "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie\n# http://old.example/debian\n"
    line = "deb [signed-by=/x.gpg] https://mirror.example/debian-security trixie-security main\n"
    other = "deb https://packages.example/nodesource nodistro main\n"
    assert rootfs.apt_lines([other, deb822, line]) == [
        "deb http://mirror.example/debian bookworm main",
        "deb http://mirror.example/debian bookworm-updates main",
        "deb https://mirror.example/debian-security bookworm-security main",
    ]
    assert rootfs.apt_lines([other]) == []


def test_paths_of_debian_become_those_of_arch() -> None:
    assert rootfs.canonical("/sbin/mkfs.fat\n") == "usr/bin/mkfs.fat"
    assert rootfs.canonical("/usr/sbin/sshd") == "usr/bin/sshd"
    assert rootfs.canonical("/lib/systemd/system/x.service") == "usr/lib/systemd/system/x.service"
    assert rootfs.canonical("/etc/sbin/x") == "etc/sbin/x"


def test_every_path_of_the_root_goes_into_one_package(tmp_path: Path) -> None:
    for path in (
        "usr/bin/rsync",
        "usr/bin/mkinitcpio",
        "usr/lib/systemd/system/sshd.service",
        "usr/lib/modules/6.1/vmlinuz",
        "usr/lib/modules/6.1-cloud/kernel/a.ko",
        "usr/lib/initcpio/prebuilt/modules-6.1.img",
        "usr/lib/initcpio/prebuilt/tpm2.img",
        "usr/lib/python3.11/os.py",
        "usr/lib/python3/dist-packages/cloudinit/util.py",
        "etc/cloud/cloud.cfg",
        "usr/bin/bash",
        "boot/vmlinuz",
        "etc/hosts",
        "etc/passwd-",
        "root/.bashrc",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    cloud = ("etc/cloud/cloud.cfg", "usr/lib/python3/dist-packages/cloudinit/util.py")
    owners = {"usr/bin/rsync": "rsync", "usr/bin/bash": "bash"} | dict.fromkeys(cloud, "cloud-init")
    parts = packages.split(tmp_path, owners)
    assert parts["rsync"] == ["usr/bin/rsync"]
    assert parts["mkinitcpio"] == ["usr/bin/mkinitcpio"]
    assert "usr/lib/systemd/system/sshd.service" in parts["openssh"]
    assert parts["tpm2-tss"] == ["usr/lib/initcpio/prebuilt/tpm2.img"]
    assert "usr/lib/python3.11/os.py" in parts["python"]
    assert sorted(parts["kernel 6.1"]) == [
        "usr/lib/initcpio/prebuilt/modules-6.1.img",
        "usr/lib/modules/6.1",
        "usr/lib/modules/6.1/vmlinuz",
    ]
    assert "usr/lib/modules/6.1-cloud/kernel" in parts["kernel 6.1-cloud"]
    assert {*cloud, "etc/cloud"} <= set(parts["cloud-init"]), "a folder goes with all that is in it"
    assert {"usr/bin/bash", "etc", "usr/lib/modules"} <= set(parts["filesystem"])
    assert "boot" in parts["filesystem"], "the folder itself, for its mode"
    everything = [path for part in parts.values() for path in part]
    assert len(everything) == len(set(everything))
    assert not {"boot/vmlinuz", "etc/passwd-", "root/.bashrc"} & set(everything)


def test_kernels_of_several_flavours_are_told_apart(tmp_path: Path) -> None:
    for version in ("6.1.0-56-amd64", "6.1.0-56-cloud-amd64"):
        (tmp_path / "usr/lib/modules" / version).mkdir(parents=True)
    assert rootfs.kernel_version(tmp_path, "linux-lts") == "6.1.0-56-amd64"
    assert rootfs.kernel_version(tmp_path, "linux") == "6.1.0-56-cloud-amd64"
    (tmp_path / "usr/lib/modules/6.1.0-57-amd64").mkdir()
    with pytest.raises(ProvisionError, match="Expected one kernel amd64"):
        rootfs.kernel_version(tmp_path, "linux-lts")


def test_package_description() -> None:
    text = packages.pkginfo(packages.Package("x", depends=("base", "y"), provides=("z",)), 12)
    assert "pkgname = x\n" in text
    assert "size = 12\n" in text
    assert "depend = base\ndepend = y\n" in text
    assert "provides = z\n" in text


def test_stand_in_programs_fail_loudly(tmp_path: Path) -> None:
    content, mode = packages.refusing("nvcc")
    program = tmp_path / "nvcc"
    program.write_bytes(content)
    program.chmod(mode)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "stand-in" in done.stderr


def test_empty_archive_holds_the_trailer_alone() -> None:
    archive = (
        packages.empty_archive()
    )  # https://www.kernel.org/doc/html/latest/driver-api/early-userspace/buffer-format.html
    assert archive[:6] == b"070701"
    name_bytes = int(archive[94:102], 16)
    assert archive[110 : 110 + name_bytes] == b"TRAILER!!!\0"
    assert archive[110 + name_bytes :].strip(b"\0") == b""


def test_uv_comes_out_of_its_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "uv-1.2.3-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("uv-1.2.3.data/scripts/uv", b"binary")
        archive.writestr("uv/__init__.py", b"")
    package = packages.uv(wheel)
    assert package.version == "1.2.3-1"
    assert dict(package.extra) == {"usr/bin/uv": (b"binary", 0o755)}


@pytest.mark.parametrize("name", ["nvidia_cublas_cu13-1-py3-none-any.whl", "triton-3-cp311-none-any.whl"])
def test_wheels_of_cuda_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-linux.whl").write_bytes(b"")
    (tmp_path / "nvidia_ml_py-13.615.71-py3-none-any.whl").write_bytes(b"")
    wheels.check(tmp_path)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ProvisionError, match=name):
        wheels.check(tmp_path)


def test_a_general_build_of_torch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torch-2.13.0-cp311-cp311-linux.whl").write_bytes(b"")
    with pytest.raises(ProvisionError, match=r"no torch-…\+cpu wheel"):
        wheels.check(tmp_path)


def files(folder: Path) -> qemu.Files:
    return qemu.Files(
        firmware=Path("/code.fd"),
        variables=folder / "variables.fd",
        medium=Path("/medium,1.img"),
        disks=(folder / "disk.qcow2",),
        serial_log=folder / "serial.log",
        serial_socket=Path("serial.sock"),
        qmp_socket=Path("qmp.sock"),
    )


def test_the_medium_is_the_first_disk_and_the_last_to_boot() -> None:
    hardware = qemu.Hardware((qemu.Disk("S1"),), qemu.TCG)
    argv = qemu.arguments(hardware, files(Path("/vm")), ssh_port=2222, first="disk", restore=None)
    devices = [word for word in argv if "bootindex" in word]
    assert devices == [
        "virtio-blk-pci,id=medium-device,drive=medium,serial=MEDIUM,bootindex=9",
        "virtio-blk-pci,drive=disk0,serial=S1,bootindex=1",
    ]
    assert any("file=/medium,,1.img" in word for word in argv), "a comma in a path is doubled"
    assert "user,id=net,hostfwd=tcp:127.0.0.1:2222-:22" in argv, "reachable from this computer only"


def test_a_person_can_choose_the_medium_and_a_state_is_restored() -> None:
    hardware = qemu.Hardware((qemu.Disk("S1", bus="nvme"),), qemu.KVM)
    argv = qemu.arguments(hardware, files(Path("/vm")), ssh_port=1, first="medium", restore=Path("/it's"))
    assert "virtio-blk-pci,id=medium-device,drive=medium,serial=MEDIUM,bootindex=0" in argv
    assert "nvme,drive=disk0,serial=S1,bootindex=1" in argv
    assert argv[argv.index("-incoming") + 1] == "exec:cat '/it'\\''s'"


def test_server_gives_files_and_listings_and_nothing_else(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "a+cpu.whl").write_text("wheel")
    (tmp_path / "secret").write_text("secret")
    server = Server({"wheels": shared}, tmp_path / "http.log")
    try:
        base = f"http://127.0.0.1:{server.http.server_port}"
        with urllib.request.urlopen(f"{base}/wheels/a%2Bcpu.whl", timeout=10) as answer:
            assert answer.read() == b"wheel"
        with urllib.request.urlopen(f"{base}/wheels/", timeout=10) as answer:
            assert b'href="a%2Bcpu.whl"' in answer.read()
        for outside in ("/wheels/../secret", "/wheels/%2e%2e/secret", "/", "/etc/passwd"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(base + outside, timeout=10)
            refused.value.close()
            assert refused.value.code == 404
        assert "GET /wheels/a%2Bcpu.whl" in (tmp_path / "http.log").read_text()
        assert server.url("wheels") == f"http://10.0.2.2:{server.http.server_port}/wheels"
    finally:
        server.close()


def test_a_server_comes_back_where_it_was_and_makes_way(tmp_path: Path) -> None:
    first = Server({}, tmp_path / "log")
    port = first.http.server_port
    second = Server({}, tmp_path / "log", port)
    second.close()
    first.close()
    again = Server({}, tmp_path / "log", port)
    again.close()
    assert second.http.server_port != port
    assert again.http.server_port == port


def checkpoint(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    digest = hashlib.sha256(b"weights").hexdigest()
    (folder / "manifest.json").write_text(
        json.dumps({"files": {"model.safetensors": {"bytes": 7, "sha256": digest}}})
    )
    return folder


def test_newest_checkpoint_is_verified(tmp_path: Path) -> None:
    with pytest.raises(ProvisionError, match="No complete checkpoint"):
        loop.newest_checkpoint(tmp_path)
    older = checkpoint(tmp_path / "run/checkpoints/step-00000010")
    newer = checkpoint(tmp_path / "run/checkpoints/step-00000020")
    os.utime(older / "manifest.json", (1, 1))
    assert loop.newest_checkpoint(tmp_path) == newer
    (older / "model.safetensors").write_bytes(b"weights!")
    with pytest.raises(ProvisionError, match="not what"):
        loop.newest_checkpoint(tmp_path)


def test_commands_are_shown_as_a_person_types_them() -> None:
    assert loop.shown(loop.fab_command("train", "--preset", "demo")) == (
        ["fab", "-H", "rehearsal", "train", "--preset", "demo"]
    )


def test_a_command_is_ended_by_what_the_machine_says_and_by_its_deadline() -> None:
    argv = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]

    def dead() -> None:
        raise ProvisionError("the machine died")

    for check, deadline_s, message in ((dead, 60.0, "the machine died"), (lambda: None, 0.0, "did not end")):
        process = loop.start(argv, {})
        with pytest.raises(ProvisionError, match=message):
            list(loop.lines_of(process, deadline_s, check))
        process.kill()
        process.wait()


def test_phases_say_which_one_failed_and_how_to_go_on(tmp_path: Path) -> None:
    from rich.console import Console

    record = loop.Record(tmp_path / "vm/rehearsal.json")
    phases = loop.Phases(record, Console(quiet=True), hint="Go on from here: again")
    with phases.run("boot"):
        pass
    with (
        pytest.raises(ProvisionError, match=r"(?s)Phase 'train' failed. loss is nan.*Go on from here"),
        phases.run("train"),
    ):
        raise ProvisionError("loss is nan")
    assert list(loop.load_record(record.path, "again").seconds) == ["boot"]


def test_resuming_nothing_is_one_readable_error(tmp_path: Path) -> None:
    with pytest.raises(ProvisionError, match=r"(?s)no rehearsal to go on with.*fab rehearse box1"):
        loop.load_record(tmp_path / "rehearsal.json", "fab rehearse box1")


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys; from provision.rehearsal import tools\n"
        "child = subprocess.Popen(tools.bound(['sleep', '300'])); print(child.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    assert parent.stdin
    child = int(parent.stdout.readline())
    time.sleep(0.5)  # setpriv has to have become sleep: before it, nothing is tied yet
    parent.kill()
    parent.wait()
    parent.stdout.close()
    parent.stdin.close()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and state_of(child) != "Z":
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


@pytest.mark.parametrize(
    "console",
    [
        b"Shell> ",
        b"initramfs: no device PARTUUID=1 after 30 s",
        b"You are in emergency mode.",
        b"Kernel panic - not syncing: VFS",
    ],
)
def test_a_console_that_leads_nowhere_is_an_error_at_once(tmp_path: Path, console: bytes) -> None:
    machine = vm.Vm(tmp_path / "vm", qemu.Hardware((), qemu.TCG), tmp_path / "medium.img", ssh_port=1)
    with subprocess.Popen(["sleep", "60"]) as process:
        machine.process = process
        machine.serial_log.write_bytes(b"an earlier start: Shell> ")
        machine.watched_from = machine.serial_log.stat().st_size
        machine.check()
        with machine.serial_log.open("ab") as log:
            log.write(b"BdsDxe: loading Boot0001\r\n" + console)
        with pytest.raises(ProvisionError, match="does not come up"):
            machine.check()
        process.kill()


def test_disks_of_every_bus_one_dead_and_the_others_swapped() -> None:
    disks = (
        qemu.Disk("A"),
        qemu.Disk("B", bus="sata"),
        qemu.Disk("C", bus="nvme"),
        qemu.Disk("D", bus="sata"),
    )
    paths = [Path(f"/{disk.serial}.qcow2") for disk in disks]

    def devices(**options: Any) -> list[str]:
        return [word for word in qemu.disk_arguments(disks, paths, **options) if "serial=" in word]

    assert devices() == [
        "virtio-blk-pci,drive=disk0,serial=A,bootindex=1",
        "ide-hd,bus=ide.0,drive=disk1,serial=B,bootindex=2",
        "nvme,drive=disk2,serial=C,bootindex=3",
        "ide-hd,bus=ide.1,drive=disk3,serial=D,bootindex=4",
    ]
    assert devices(without=["A", "C"], reversed_disks=True) == [
        "ide-hd,bus=ide.0,drive=disk3,serial=D,bootindex=4",
        "ide-hd,bus=ide.1,drive=disk1,serial=B,bootindex=2",
    ]


def test_a_seed_is_a_drive_behind_the_disks_and_a_tpm_is_another_process(tmp_path: Path) -> None:
    hardware = qemu.Hardware((qemu.Disk("S1"),), qemu.TCG, tpm=True)
    parts = replace(files(tmp_path), seed=Path("/a,b.iso"))
    argv = qemu.arguments(hardware, parts, ssh_port=22, ssh_address="127.0.0.9", first="disk", restore=None)
    serials = [word.split("serial=")[1].split(",")[0] for word in argv if "serial=" in word]
    assert serials == ["MEDIUM", "S1", "SEED"]
    assert "if=none,id=seed,format=raw,readonly=on,file=/a,,b.iso" in argv
    assert "user,id=net,hostfwd=tcp:127.0.0.9:22-:22" in argv
    assert "tpm-crb,tpmdev=tpm0" in argv
    assert f"socket,id=tpm,path={parts.tpm_socket}" in argv
    assert f"type=unixio,path={parts.tpm_socket}" in qemu.tpm_arguments(parts.tpm_socket, Path("tpm"))


def test_disks_that_are_not_there_cannot_die(tmp_path: Path) -> None:
    machine = vm.Vm(
        tmp_path, qemu.Hardware((qemu.Disk("S1"),), qemu.TCG), tmp_path / "medium.img", ssh_port=1
    )
    with pytest.raises(ProvisionError, match="no disk S2"):
        machine.start(without=["S2"])
    with pytest.raises(ProvisionError, match="wants the hardware"):
        machine.start(without=["S1"], restore=tmp_path)


def test_the_console_is_read_from_the_last_start_on(tmp_path: Path) -> None:
    machine = vm.Vm(tmp_path, qemu.Hardware((), qemu.TCG), tmp_path / "medium.img", ssh_port=1)
    with subprocess.Popen(["sleep", "60"]) as process:
        machine.process = process
        machine.serial_log.write_bytes(b"Please enter passphrase for disk root: ")
        machine.watched_from = machine.serial_log.stat().st_size
        with pytest.raises(ProvisionError, match="in vain for 'passphrase for"):
            machine.wait_for_console("passphrase for (.*):", deadline_s=0.2)
        with machine.serial_log.open("ab") as log:
            log.write(b"Please enter passphrase for disk home: ")
        assert machine.wait_for_console("passphrase for disk (.*):", deadline_s=5)[1] == b"home"
        process.kill()


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ("", ""),
        ("discard", "discard"),
        (f"discard {'1' * 8}-2222-3333-4444-{'5' * 12}=tpm2-device=auto,discard", "tpm2-device=auto,discard"),
        (f"tpm2-device=auto {'9' * 8}-2222-3333-4444-{'5' * 12}=discard", "tpm2-device=auto"),
    ],
)
def test_options_of_a_volume_are_its_own_or_those_of_all(options: str, chosen: str) -> None:
    """As systemd-cryptsetup-generator reads rd.luks.options=."""
    init = (rootfs.STANDIN / "init").read_text()
    function = init[init.index("options_of()") :].partition("\n}\n")[0] + "\n}\n"
    uuid = f"{'1' * 8}-2222-3333-4444-{'5' * 12}"
    done = subprocess.run(
        ["sh", "-euc", f"luks_options=$1\n{function}\noptions_of {uuid}", "sh", options],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == chosen


def test_other_tasks_do_not_wait_for_the_rehearsal_to_be_imported() -> None:
    look = (
        "import sys, fabfile; sys.exit(sum(name.startswith('provision.rehearsal') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", look], cwd=loop.PROJECT, check=False).returncode == 0
