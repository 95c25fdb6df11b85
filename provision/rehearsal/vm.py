"""A running virtual machine: started, watched, saved, cut off. It ends with the process that started it."""

import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from provision.errors import ProvisionError
from provision.rehearsal import qemu, tools

QMP_WAIT_S = 20
BOOT_WAIT_S = 400  # four times an emulated boot on two quiet cores
SAVE_WAIT_S = 300
TPM_WAIT_S = 5
TPM_STATE = Path("tpm")  # in the machine's folder

# Words on the serial console after which nobody will answer on the network any more.
DEAD_ENDS = re.compile(
    rb"Shell> |\(initramfs\)|BusyBox v|initramfs: [^\r\n]*|emergency mode|Kernel panic[^\r\n]*|BdsDxe: No bootable option"
)


class Vm:
    """One machine in a folder: its disks, its firmware's variables and its logs outlive a run.

    `ssh_port` of the loopback address `ssh_address` leads to the guest's port 22; by default a free one.
    """

    def __init__(self, folder: Path, hardware: qemu.Hardware, medium: Path, *, ssh_port: int = 0) -> None:
        self.folder = folder
        self.hardware = hardware
        self.medium = medium
        self.ssh_address = qemu.LOOPBACK
        self.ssh_port = ssh_port or free_port()
        self.serial_log = folder / "serial.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.watched_from = 0  # bytes of the serial log that belong to earlier starts
        self.qmp: Qmp | None = None
        self.console: socket.socket | None = None
        self.tpm: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.lock: int | None = None

    def disk_paths(self) -> tuple[Path, ...]:
        return tuple(self.folder / f"{disk.serial}.qcow2" for disk in self.hardware.disks)

    def blank(self) -> None:
        """New empty disks, new firmware variables, a new TPM, empty logs."""
        self.claim()
        shutil.rmtree(self.folder / TPM_STATE, ignore_errors=True)
        shutil.copy(tools.firmware()[1], self.folder / "variables.fd")
        self.serial_log.write_bytes(b"")
        for disk, path in zip(self.hardware.disks, self.disk_paths(), strict=True):
            path.unlink(missing_ok=True)
            create = ["qemu-img", "create", "-q", "-f", "qcow2", str(path), f"{disk.size_gib}G"]
            tools.run(create, log=self.folder / "qemu.log")

    def claim(self) -> None:
        """Raises ProvisionError where another process runs a machine in this folder."""
        if self.lock is not None:
            return
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ProvisionError(
                f"Another rehearsal is using {self.folder}.",
                "Wait for it, or name another folder with --cache.",
            ) from None
        self.lock = lock

    def start(
        self,
        *,
        first: Literal["disk", "medium"] = "disk",
        restore: Path | None = None,
        without: Collection[str] = (),
        reversed_disks: bool = False,
        seed: Path | None = None,
    ) -> None:
        """Power on, or go on from a saved state in the folder `restore` (with disks as they were then).

        `without`: serials of disks that died. `reversed_disks`: the kernel names them the other way round.
        `seed`: an image, attached read-only as one more drive.
        """
        if unknown := set(without) - {disk.serial for disk in self.hardware.disks}:
            raise ProvisionError(f"The machine has no disk {', '.join(sorted(unknown))}.")
        if restore and (without or reversed_disks or seed):
            raise ProvisionError("A saved state wants the hardware that it was saved with.")
        self.claim()
        if restore:
            shutil.copy(restore / "variables.fd", self.folder / "variables.fd")
        files = qemu.Files(
            firmware=tools.firmware()[0],
            variables=self.folder / "variables.fd",
            medium=self.medium,
            disks=self.disk_paths(),
            serial_log=self.serial_log,
            serial_socket=Path("serial.sock"),  # relative: the path of a socket may have 107 bytes only
            qmp_socket=Path("qmp.sock"),
            seed=seed and seed.resolve(),
        )
        self.watched_from = self.serial_log.stat().st_size if self.serial_log.exists() else 0
        argv = qemu.arguments(
            self.hardware,
            files,
            ssh_port=self.ssh_port,
            ssh_address=self.ssh_address,
            first=first,
            restore=restore and restore / "state",
            without=without,
            reversed_disks=reversed_disks,
        )
        if self.hardware.tpm:
            self.start_tpm(files.tpm_socket)
        qmp_socket = self.folder / files.qmp_socket
        qmp_socket.unlink(missing_ok=True)
        self.process = self.spawn(["nice", "-n", "5", *argv])
        wait_until(qmp_socket.exists, self.check, QMP_WAIT_S, "QEMU's control socket")
        self.qmp = Qmp(qmp_socket)
        if first == "medium":  # as from a boot menu: this once; QEMU reads the order again at the next reset
            self.qmp.command(
                "qom-set", path=f"/machine/peripheral/{qemu.MEDIUM}", property="bootindex", value=qemu.LAST
            )
        if restore:
            wait_until(lambda: self.status() != "inmigrate", self.check, SAVE_WAIT_S, "the saved state")
            self.qmp.command("cont")

    def start_tpm(self, tpm_socket: Path) -> None:
        """The TPM of this machine, as it was when the machine was last on."""
        (self.folder / TPM_STATE).mkdir(exist_ok=True)
        (self.folder / tpm_socket).unlink(missing_ok=True)
        tpm = self.tpm = self.spawn(qemu.tpm_arguments(tpm_socket, TPM_STATE))

        def check() -> None:
            if (status := tpm.poll()) is not None:
                log = self.folder / "qemu.log"
                raise ProvisionError(
                    f"swtpm ended with status {status}:\n{tools.last_lines(log)}", f"See {log}"
                )

        wait_until((self.folder / tpm_socket).exists, check, QMP_WAIT_S, "the TPM's socket")

    def spawn(self, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        """A child in the machine's folder that ends with this process; what it says goes to qemu.log."""
        with (self.folder / "qemu.log").open("ab") as log:
            return subprocess.Popen(
                tools.bound(argv), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def status(self) -> str:
        assert self.qmp, "not started"
        return str(self.qmp.command("query-status")["status"])

    def save_screen(self) -> Path:
        """A picture of what is on the screen, of a machine that has one, in its folder."""
        assert self.qmp, "not started"
        path = self.folder / "screen.png"
        self.qmp.command("screendump", filename=str(path), format="png")
        return path

    def save(self, folder: Path) -> None:
        """Freeze the machine and write `state` and `variables.fd`; it is of no use afterwards."""
        assert self.qmp, "not started"
        self.qmp.command("stop")
        self.qmp.command("migrate", uri=f"exec:cat > {qemu.quoted(folder / 'state')}")

        def state() -> str:
            assert self.qmp
            return str(self.qmp.command("query-migrate").get("status"))

        ends = ("completed", "failed", "cancelled")
        wait_until(lambda: state() in ends, self.check, SAVE_WAIT_S, "the machine's state on disk")
        if state() != "completed":
            raise ProvisionError(
                f"QEMU could not save the machine: {state()}.", f"See {self.folder / 'qemu.log'}"
            )
        shutil.copy(self.folder / "variables.fd", folder / "variables.fd")

    def serial_bytes(self) -> bytes:
        """What the console said since the last start."""
        with self.serial_log.open("rb") as log:
            log.seek(self.watched_from)
            return log.read()

    def check(self) -> None:
        """Raises ProvisionError where QEMU ended or the console shows that the boot did."""
        if self.process is None:
            raise ProvisionError("The virtual machine is not running.")
        if (status := self.process.poll()) is not None:
            log = self.folder / "qemu.log"
            raise ProvisionError(f"QEMU ended with status {status}:\n{tools.last_lines(log)}", f"See {log}")
        if self.serial_log.exists() and (found := DEAD_ENDS.search(self.serial_bytes())):
            raise ProvisionError(
                f"The virtual machine does not come up: its console says {found[0].decode(errors='replace')!r}:\n"
                + tools.last_lines(self.serial_log, start=self.watched_from),
                f"The whole console: {self.serial_log}",
            )

    def wait_for_ssh(self, deadline_s: float = BOOT_WAIT_S) -> None:
        """Until a server on the guest's port 22 says SSH; fails at once on a dead end."""
        where = f"SSH at {self.ssh_address}:{self.ssh_port}"
        wait_until(lambda: says_ssh(self.ssh_address, self.ssh_port), self.check, deadline_s, where)

    def wait_for_console(self, pattern: str, deadline_s: float = BOOT_WAIT_S) -> re.Match[bytes]:
        """Until the console said it since the last start, by regular expression; fails at once on a dead end."""
        wanted = re.compile(pattern.encode())
        wait_until(
            lambda: wanted.search(self.serial_bytes()) is not None,
            self.check,
            deadline_s,
            f"{pattern!r} on the console",
        )
        found = wanted.search(self.serial_bytes())
        assert found
        return found

    def console_send(self, text: str) -> None:
        """Type at the console: a line ends with `\\n`. Wait for its prompt first: what comes early may be lost."""
        if self.console is None:
            self.console = connect(self.folder / "serial.sock")
            threading.Thread(target=drain, args=(self.console,), daemon=True).start()
        self.console.sendall(text.encode())

    def answer_at(self, address: str, port: int = 0) -> None:
        """From now on the guest's SSH answers at another loopback address, as after DHCP gave it another.

        At the old one nobody answers any more; connections that stand are kept. Port 0: the same port.
        """
        assert self.qmp, "not started"
        new = port or self.ssh_port
        for command in (
            f"hostfwd_remove {qemu.NETWORK} {qemu.forward(self.ssh_address, self.ssh_port)}",
            f"hostfwd_add {qemu.NETWORK} {qemu.forward(address, new)}-:22",
        ):
            said = self.qmp.command("human-monitor-command", **{"command-line": command})["value"].strip()
            if said and "removed" not in said:  # the monitor has no status, only words
                raise ProvisionError(f"QEMU says to `{command}`: {said}")
        self.ssh_address, self.ssh_port = address, new

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """Cut the power. Disks stay as they are; `start` goes on from there."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        if self.tpm is not None:
            try:
                self.tpm.wait(TPM_WAIT_S)  # by itself: it has lost QEMU
            except subprocess.TimeoutExpired:
                self.tpm.kill()
                self.tpm.wait()
            self.tpm = None
        if self.console is not None:
            self.console.close()
            self.console = None
        if self.qmp is not None:
            self.qmp.close()
            self.qmp = None
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


class Qmp:
    """QEMU's control channel: one JSON object a line, an answer to each command, events between."""

    def __init__(self, path: Path) -> None:
        self.socket = connect(path)
        self.socket.settimeout(QMP_WAIT_S)
        self.lines = self.socket.makefile("r")
        self.lines.readline()
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: object) -> dict[str, Any]:
        """Raises ProvisionError with QEMU's own words where it refuses."""
        self.socket.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        while line := self.lines.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise ProvisionError(f"QEMU refuses {name}: {answer['error'].get('desc')}")
            if "return" in answer:
                result = answer["return"]
                return result if isinstance(result, dict) else {"value": result}
        raise ProvisionError(f"QEMU closed its control channel at {name}.")

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


def connect(path: Path) -> socket.socket:
    """To a socket of QEMU's, wherever it lies: its path may be longer than the 107 bytes that sockets allow."""
    channel = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + QMP_WAIT_S
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        while True:  # the path appears a moment before QEMU listens
            try:
                channel.connect(f"/proc/self/fd/{folder}/{path.name}")
                return channel
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
    except OSError:
        channel.close()
        raise
    finally:
        os.close(folder)


def drain(channel: socket.socket) -> None:
    """Read and drop: QEMU writes the console's log itself, and would stop the guest where nobody reads."""
    with suppress(OSError):
        while channel.recv(4096):
            pass


def wait_until(done: Callable[[], bool], check: Callable[[], None], deadline_s: float, what: str) -> None:
    """Poll `done`; `check` may raise sooner than the deadline does."""
    deadline = time.monotonic() + deadline_s
    while not done():
        check()
        if time.monotonic() > deadline:
            raise ProvisionError(f"Waited {deadline_s:.0f} s in vain for {what}.")
        time.sleep(0.1)


def says_ssh(address: str, port: int) -> bool:
    """One look, 3 s at most: QEMU accepts the connection long before the guest does."""
    with suppress(OSError), socket.create_connection((address, port), timeout=3) as connection:
        return connection.recv(8).startswith(b"SSH-")
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((qemu.LOOPBACK, 0))
        return int(probe.getsockname()[1])
