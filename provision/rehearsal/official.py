"""What a rehearsal with the official ISO stands on: that ISO as it is, a seed beside it, and the real mirrors.

Nothing is built, nothing served, and root is not needed. It has what a `Bed` has, as far as a rehearsal asks for it.
"""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal

from provision.errors import ProvisionError
from provision.machine import Machine, load_machine
from provision.nearby import host_key_at, kinds_of, pinned_keys
from provision.pins import describe_key
from provision.rehearsal import qemu, tools
from provision.rehearsal.bed import choose_accelerator, write_overlay
from provision.rehearsal.cache import Cache
from provision.rehearsal.iso import Iso, read_kernel
from provision.rehearsal.likeness import Likeness, liken_to_real
from provision.rehearsal.vm import Vm, wait_until
from provision.seed import load_keys, save_seed

BOOT_S = 1800  # emulated; its boot menu alone waits for 15 s
HANDSHAKE_S = 30  # of a key exchange that is emulated too
SEED = "seed.iso"  # in the machine's folder
NO_CONSOLE = (
    "the ISO says nothing on a serial console: where it gets stuck, screen.png shows what is on its screen"
)


class OfficialBed:
    """Use as a context manager. `person` is the machine that is rehearsed, `iso` what it is booted from."""

    trust: tuple[str, ...] = ()  # nobody is told a fingerprint: the ISO gets its host key from the seed
    provision_deadline_s = (
        4 * 3600.0
    )  # real packages, unpacked by an emulated processor; nobody has measured it

    def __init__(self, iso: Iso, person: Machine, folder: Path) -> None:
        self.iso = iso
        self.person = person
        self.folder = folder.resolve()
        self.log = self.folder / "logs" / "bed.log"
        self.cache = Cache(self.folder)
        self.likeness: Likeness = liken_to_real(person)
        self.stack = ExitStack()

    def __enter__(self) -> "OfficialBed":
        kernel = self.cache.stage(
            "kernel", [self.iso.path.with_name(self.iso.path.name + ".sig")], self.extract
        )
        self.accelerator = choose_accelerator(self.cache, kernel / "vmlinuz-linux")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    def extract(self, stage: Path) -> None:
        (stage / "vmlinuz-linux").write_bytes(read_kernel(self.iso.path))

    @property
    def programs(self) -> tuple[tools.Tool, ...]:
        return tools.for_machines()

    def machine(self, name: str, disks: tuple[qemu.Disk, ...], *, tpm: bool = False) -> Vm:
        """A machine that is off, in the folder `vm/NAME`; it ends with the bed at the latest."""
        hardware = qemu.Hardware(disks, self.accelerator, tpm=tpm, optical=True)
        vm = Vm(self.folder / "vm" / name, hardware, self.iso.path)
        self.stack.callback(vm.kill)
        return vm

    def prepare(self, vm: Vm) -> None:
        """Nothing: there is no saved state of the official ISO."""

    def describe(self) -> list[str]:
        mirror = self.person.mirror.servers[0]
        return [
            f"{self.iso.label}, signed by Arch on {self.iso.signed_on}; packages from {mirror}",
            NO_CONSOLE,
        ]

    def boot_live(self, vm: Vm, *, cold: bool = True, seed: Path | None = None) -> None:
        """Start the machine on blank disks from the ISO, with a seed; returns when it shows the seed's host key."""
        machines = vm.folder / "machines"
        machine = load_machine(self.person.name, machines)
        image = vm.folder / SEED
        vm.blank()
        image.unlink(missing_ok=True)
        save_seed(machine, load_keys(machine, ()), machines / "known_hosts", image)
        vm.start(seed=image)
        self.wait(vm)

    def boot_again(self, vm: Vm, first: Literal["disk", "medium"]) -> None:
        vm.start(first=first, seed=vm.folder / SEED)
        self.wait(vm)

    def wait(self, vm: Vm) -> None:
        """Until one of the machine's own keys answers: on the ISO, sshd may be there before cloud-init read the seed."""
        machines = vm.folder / "machines"
        wanted = pinned_keys(load_machine(self.person.name, machines), machines / "known_hosts")
        seen = ""

        def answers() -> bool:
            nonlocal seen
            kinds = kinds_of(wanted)
            seen = host_key_at(vm.ssh_address, vm.ssh_port, kinds, handshake_s=HANDSHAKE_S) or seen
            return seen in wanted

        try:
            wait_until(answers, vm.check, BOOT_S, f"SSH at {vm.ssh_address}:{vm.ssh_port}")
        except ProvisionError as error:
            if not seen:
                raise
            raise ProvisionError(
                f"{error.message}\nWhat answers there shows the host key {describe_key(seen)}, and not that of the seed: "
                "its cloud-init did not take the seed.",
                error.hint,
            ) from error

    def write_machine_files(self, vm: Vm, source: Path, wishes: str = "") -> Path:
        """The folder for METAL_MACHINES: that of the person, and where this machine answers."""
        local = f'[ssh]\naddress = "{vm.ssh_address}"\nport = {vm.ssh_port}\n'
        return write_overlay(
            vm.folder / "machines", source, self.person.name, wishes or self.likeness.wishes, local
        )
