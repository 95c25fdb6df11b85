"""The bed: everything that a rehearsed machine needs, built in order from the cache, and machines made from it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from provision.errors import ProvisionError
from provision.machine import PACKAGED_DEFAULTS, Machine, load_machine
from provision.pins import fingerprint_of, parse_key
from provision.rehearsal import medium, packages, qemu, rootfs, signing, tools, wheels
from provision.rehearsal.cache import Cache
from provision.rehearsal.likeness import Likeness, StandIns, liken
from provision.rehearsal.medium import Keys
from provision.rehearsal.server import Server
from provision.rehearsal.vm import Vm
from provision.system.python import CPU_INDEX

NAME = "rehearsal"  # machines/rehearsal.toml
DISKS = (qemu.Disk("REHEARSAL0"),)
DEFAULT_CACHE = Path(".cache/rehearsal")
FIRST_PORT = 20000  # of those that the bed's server is at, by its folder: below what the kernel gives out
KVM_PROBE_S = 30  # a kernel under KVM reaches its root file system in two
SNAPSHOT_SETTLE_S = 240


@dataclass(frozen=True)
class Parts:
    """The finished stages."""

    keys: Keys
    medium: Path  # folder with medium.img and vmlinuz-linux
    repository: Path
    wheels: Path


class Bed:
    """Use as a context manager: on entry the parts are built and served, on exit the server ends.

    `on_build(name)` is called for each stage that is not in the cache. `person` is the machine that is rehearsed, where
    it is not that of machines/rehearsal.toml; `likeness` is then what the virtual machine makes of it.
    """

    provision_deadline_s = 3600.0  # generous: emulation on a busy computer

    def __init__(
        self,
        folder: Path = DEFAULT_CACHE,
        *,
        on_build: Callable[[str], None] = lambda name: None,
        person: Machine | None = None,
    ) -> None:
        self.person = person
        self.folder = folder.resolve()
        self.log = self.folder / "logs" / "bed.log"
        self.cache = Cache(self.folder, on_build)
        self.stack = ExitStack()

    def __enter__(self) -> "Bed":
        example = load_example()
        self.likeness: Likeness | None = None
        if self.person is None:
            self.parts = build(self.cache, example, self.log)
        else:
            requirements = tuple(dict.fromkeys((*example.python.packages, *self.person.python.packages)))
            wanted = replace(example, python=replace(example.python, packages=requirements))
            self.parts = build(self.cache, wanted, self.log)
            self.likeness = liken(self.person, example, packages.known_packages(self.parts.repository))
            if self.likeness.stand_ins:
                self.parts = build(self.cache, wanted, self.log, self.likeness.stand_ins)
        self.accelerator = choose_accelerator(self.cache, self.parts.medium / "vmlinuz-linux")
        folders = {"repository": self.parts.repository, "wheels": self.parts.wheels}
        port = FIRST_PORT + zlib.crc32(bytes(self.folder)) % 10000
        self.server = Server(folders, self.folder / "logs" / "http.log", port)
        self.stack.callback(self.server.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    @property
    def programs(self) -> tuple[tools.Tool, ...]:
        return tools.for_all()

    @property
    def trust(self) -> tuple[str, ...]:
        """What `provision` is told, so that it knows the live system: a person would read it on the console."""
        return ("--fingerprint", fingerprint_of(parse_key(self.parts.keys.host_line)))

    def prepare(self, vm: Vm) -> None:
        """Make what a machine is booted from fast."""
        self.snapshot(vm.hardware)

    def describe(self) -> list[str]:
        return [f"repository and wheels at {self.server.url('')}"]

    def machine(
        self,
        name: str = NAME,
        disks: tuple[qemu.Disk, ...] = DISKS,
        *,
        tpm: bool = False,
    ) -> Vm:
        """A machine that is off, in the folder `vm/NAME` of the bed; it ends with the bed at the latest."""
        hardware = qemu.Hardware(disks, self.accelerator, tpm=tpm)
        vm = Vm(self.folder / "vm" / name, hardware, self.parts.medium / "medium.img")
        self.stack.callback(vm.kill)
        return vm

    def boot_live(self, vm: Vm, *, cold: bool = False, seed: Path | None = None) -> None:
        """Start the machine on blank disks in the live system; returns when its sshd answers.

        Unless `cold`, it goes on from a saved state: its clock is then as late as that state is old.
        With a seed or a TPM it always boots from the firmware: both are met on the way.
        """
        saved = not (cold or seed or vm.hardware.tpm)
        state = self.snapshot(vm.hardware) if saved else None
        vm.blank()
        vm.start(restore=state, seed=seed)
        vm.wait_for_ssh()

    def boot_again(self, vm: Vm, first: Literal["disk", "medium"]) -> None:
        """Start a machine with its disks as they are; returns when its sshd answers."""
        vm.start(first=first)
        vm.wait_for_ssh()

    def snapshot(self, hardware: qemu.Hardware) -> Path:
        """A stage: the live system of such a machine with blank disks, booted and settled."""
        version = subprocess.run(
            ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True
        ).stdout
        inputs: list[str | Path] = [self.parts.medium.name, hardware.key, version, Path(qemu.__file__)]
        return self.cache.stage("snapshot", inputs, lambda stage: self.build_snapshot(stage, hardware))

    def build_snapshot(self, stage: Path, hardware: qemu.Hardware) -> None:
        vm = Vm(self.folder / "vm" / "snapshot", hardware, self.parts.medium / "medium.img")
        try:
            vm.blank()
            vm.start()
            vm.wait_for_ssh()
            settle = "systemctl is-system-running --wait; sync; echo 3 > /proc/sys/vm/drop_caches"
            self.ssh(vm, f"bash -c {settle!r}", deadline_s=SNAPSHOT_SETTLE_S)
            vm.save(stage)
        finally:
            vm.kill()

    def ssh_command(self, port: int, user: str = "root", address: str = qemu.LOOPBACK) -> list[str]:
        """argv of OpenSSH into a live system, by the bed's keys."""
        known = self.parts.keys.host.with_name("known_hosts")
        known.write_text(f"live {' '.join(self.parts.keys.host_line.split()[:2])}\n")
        options = [
            f"UserKnownHostsFile={known}",
            "HostKeyAlias=live",
            "StrictHostKeyChecking=yes",
            "BatchMode=yes",
        ]
        options += ["IdentitiesOnly=yes", "ConnectTimeout=20", "LogLevel=ERROR"]
        words = [word for option in options for word in ("-o", option)]
        identity = ["-F", "none", "-i", str(self.parts.keys.identity)]
        return ["ssh", *identity, "-p", str(port), *words, f"{user}@{address}"]

    def ssh(self, vm: Vm, command: str, *, deadline_s: float = 600) -> str:
        """Run a command in the live system, by plain OpenSSH; its output. For the bed's own use and its tests.

        Raises ProvisionError where it fails or takes longer.
        """
        try:
            done = subprocess.run(
                [*self.ssh_command(vm.ssh_port, address=vm.ssh_address), command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=deadline_s,
                check=False,
            )
        except subprocess.TimeoutExpired as late:
            raise ProvisionError(
                f"`{command}` in the live system took longer than {deadline_s:.0f} s."
            ) from late
        if done.returncode:
            raise ProvisionError(
                f"`{command}` in the live system ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def write_machine_files(self, vm: Vm, source: Path, wishes: str = "") -> Path:
        """The folder for METAL_MACHINES: that of the person, and what is true only here and now.

        `wishes`, TOML, go over the machine's own file: another layout, another driver.
        """
        name = self.person.name if self.person else NAME
        wishes = wishes or (self.likeness.wishes if self.likeness else "")
        local = (
            f'[ssh]\naddress = "{vm.ssh_address}"\nport = {vm.ssh_port}\n'
            f'identity = "{self.parts.keys.identity}"\n\n'
            f'[mirror]\nservers = ["{self.server.url("repository")}/$repo/os/$arch"]\n\n'
            f'[user]\nauthorized_keys = ["{self.parts.keys.identity}.pub"]\n\n'
            f'[python]\nfind_links = "{self.server.url("wheels")}/"\n'
        )
        return write_overlay(vm.folder / "machines", source, name, wishes, local)


def write_overlay(folder: Path, source: Path, name: str, wishes: str, local: str) -> Path:
    """A copy of a person's machine files without their pins, `wishes` over the one of that name, `local` over both."""
    shutil.copytree(
        source, folder, ignore=shutil.ignore_patterns("known_hosts*", "*.local.toml"), dirs_exist_ok=True
    )
    if wishes:
        below = [source / f"{name}.toml", source / f"{name}.local.toml"]
        names = []
        for index, path in enumerate(below):
            if path.exists():
                names.append(f"below-{index}")
                shutil.copy(path, folder / f"below-{index}.toml")
        (folder / f"{name}.toml").write_text(f"extends = {json.dumps(names)}\n\n{wishes}")
    (folder / f"{name}.local.toml").write_text(local)
    return folder


def load_example() -> Machine:
    """machines/rehearsal.toml without what is known only when a bed runs: requirements of the environment."""
    source = PACKAGED_DEFAULTS.parent
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("defaults.toml", f"{NAME}.toml"):
            (folder / file).write_bytes((source / file).read_bytes())
        placeholder = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "A" * 43  # a key of zeros
        (folder / f"{NAME}.local.toml").write_text(
            f'[user]\nauthorized_keys = ["{placeholder}"]\n[python]\nfind_links = "http://localhost/"\n'
        )
        return load_machine(NAME, folder)


def build(cache: Cache, machine: Machine, log: Path, stand_ins: StandIns = StandIns()) -> Parts:  # noqa: B008
    """All stages, in order. Those that need root are built through sudo where this process is not root."""
    keys = medium.load_keys(cache.folder / "keys", log)
    uv = cache.stage("uv", [wheels.UV], lambda stage: wheels.build_uv(stage, log))
    wanted = machine.python
    index = wanted.torch_index or CPU_INDEX
    wheel_inputs: list[str | Path] = [Path(wheels.__file__), wanted.torch, *wanted.packages]
    wheel_folder = cache.stage(
        "wheels",
        wheel_inputs,
        lambda stage: wheels.build_wheels(stage, wanted.torch, wanted.packages, index, log),
    )
    uv_wheel = wheels.wheel(uv, "uv")
    if os.geteuid() != 0 and not has_root_stages(cache.folder, keys, uv_wheel, log, stand_ins):
        command = [sys.executable, "-m", "provision.rehearsal", "root-stages", "--cache", str(cache.folder)]
        subprocess.run(["sudo", *command, "--stand-ins", json.dumps(asdict(stand_ins))], check=True)
    built_medium, repository = build_root_stages(cache, keys, uv_wheel, log, stand_ins)
    return Parts(keys, built_medium, repository, wheel_folder)


def has_root_stages(folder: Path, keys: Keys, uv: Path, log: Path, stand_ins: StandIns) -> bool:
    """True where nothing would have to be built: then nobody is asked for sudo's password."""

    def refuse(name: str) -> None:
        raise LookupError(name)

    try:
        build_root_stages(Cache(folder, refuse), keys, uv, log, stand_ins)
    except (
        LookupError,
        PermissionError,
    ):  # PermissionError: the lock is root's, who built another one before
        return False
    return True


def build_root_stages(
    cache: Cache, keys: Keys, uv: Path, log: Path, stand_ins: StandIns
) -> tuple[Path, Path]:
    """(medium, repository): made from one root file system by mounts, chroots and files with owners."""
    debian = cache.stage(
        "debian",
        [rootfs.SUITE, *rootfs.DEBIAN_PACKAGES, *rootfs.BULK_MODULES],
        lambda stage: rootfs.build_debian(stage, log),
    )
    inputs: list[str | Path] = [debian.name, Path(rootfs.__file__), *sorted(rootfs.STANDIN.iterdir())]
    dressed = cache.stage("rootfs", inputs, lambda stage: rootfs.build_rootfs(stage, debian, log))
    key = cache.stage(
        "signing", [Path(signing.__file__)], lambda stage: signing.build_signing(stage, dressed / "root", log)
    )
    repository = cache.stage(
        "repository",
        [dressed.name, Path(packages.__file__), uv.name, key.name],  # standin/ is in dressed.name
        lambda stage: packages.build_repository(stage, dressed, uv, key, log),
    )
    built_medium = cache.stage(
        "medium",
        [repository.name, Path(medium.__file__), keys.identity_line, keys.host_line],
        lambda stage: medium.build_medium(stage, dressed / "root", repository, keys, log),
    )
    if stand_ins:
        base = repository
        repository = cache.stage(
            "stand-ins",
            [base.name, json.dumps(asdict(stand_ins))],
            lambda stage: packages.add_stand_ins(stage, base, stand_ins, dressed / "root", key, log),
        )
    return built_medium, repository


def choose_accelerator(cache: Cache, kernel: Path) -> qemu.Accelerator:
    """KVM where a kernel really starts under it, else emulation. Asked once for each boot of the host."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def probe(stage: Path) -> None:
        (stage / "name").write_text("kvm" if kvm_works(kernel, stage / "console.log") else "tcg")

    stage = cache.stage("accelerator", [boot_id, kernel], probe)
    return qemu.KVM if (stage / "name").read_text() == "kvm" else qemu.TCG


def kvm_works(kernel: Path, console: Path) -> bool:
    """Start the kernel without a root: it must come as far as missing it.

    That /dev/kvm can be opened says little: on some hosts the guest's first instructions hang.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    argv = [
        "qemu-system-x86_64",
        "-machine",
        "q35",
        *qemu.KVM.options,
        "-m",
        "512",
        "-nodefaults",
        "-display",
        "none",
    ]
    argv += ["-no-reboot", "-serial", f"file:{qemu.escaped(console)}", "-kernel", str(kernel)]
    argv += ["-append", "console=ttyS0 panic=-1"]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(tools.bound(argv), timeout=KVM_PROBE_S, capture_output=True, check=False)
    return console.exists() and b"Unable to mount root fs" in console.read_bytes()
