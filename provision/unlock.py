"""A machine whose initramfs waits for the passphrase of its disk: telling it, over SSH.

There dropbear runs, with a host key of its own (pinned as NAME.unlock), and root's login shell is the
`cryptsetup_shell` of Arch's mkinitcpio-utils: whatever command is asked for, `cryptsetup open` reads one line of
stdin. Its exit status is 0 for a wrong passphrase too, so what it says is what counts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import paramiko

from provision.dial import Wanted, dial
from provision.errors import ProvisionError, Refused, Unreachable
from provision.link import hang_up

COMMAND = "cryptsetup_shell"
WRONG = "No key available with this passphrase"  # cryptsetup's words
TOO_EARLY = "please wait"  # cryptsetup_shell's, before the device mapper is there
OPEN_S = 180.0  # argon2 is made to take seconds, and minutes on an emulated machine
AGAIN_S = 60.0  # from a passphrase that was taken to the end of dropbear
TRIES = 3


def give_passphrase(wanted: Wanted, passphrase: str) -> None:
    """Say it once. Returns when it was taken; Refused where it is wrong, Unreachable where trying again may help."""
    name = wanted.machine.name
    dialled = dial(replace(wanted, only="unlock", confirm=None, fingerprint="", password=""))
    try:
        channel = dialled.connection.transport.open_session(timeout=wanted.timeout_s)
        channel.settimeout(OPEN_S)
        channel.set_combine_stderr(True)
        channel.exec_command(COMMAND)
        channel.sendall(passphrase.encode() + b"\n")
        channel.shutdown_write()
        said = b"".join(iter(lambda: channel.recv(4096), b""))
        channel.status_event.wait(1)
        status = (
            channel.exit_status
        )  # -1 where the boot went on, and dropbear was ended, before it could tell
    except TimeoutError as error:
        raise Unreachable(f"{name} took the passphrase and said nothing for {OPEN_S:g} s.") from error
    except (OSError, EOFError, paramiko.SSHException) as error:
        raise Unreachable(f"{name} hung up while it was given the passphrase.") from error
    finally:
        hang_up(dialled.connection)
    text = said.decode(errors="replace").replace(passphrase, "***").strip()
    if WRONG in text:
        raise Refused(
            f"The passphrase that disk.passphrase of {name} refers to ({wanted.machine.disk.passphrase.reference}) "
            "does not open its disk.",
            f"Where it is the right one, was the disk encrypted by another machine file? Then: fab -H {name} unlock",
        )
    if TOO_EARLY in text:
        raise Unreachable(f"{name} is not ready for the passphrase yet: {text}")
    if status > 0:
        raise Refused(
            f"{name} did not take the passphrase (status {status}): {text}",
            f"On its console it can be typed; or again: fab -H {name} unlock",
        )


@dataclass
class Opener:
    """Opens the disk of a machine that is found waiting, and leaves it the time to boot on.

    `passphrase` is called when it is needed, and once.
    """

    passphrase: Callable[[], str] = field(repr=False)
    again_s: float = AGAIN_S
    tries: int = 0
    taken_at: float = 0.0
    known: str = field(default="", repr=False)

    def open(self, wanted: Wanted) -> str:
        """What to tell a person who waits. Raises ProvisionError where waiting longer will not help."""
        name = wanted.machine.name
        if self.tries and time.monotonic() - self.taken_at < self.again_s:
            return f"{name} has its passphrase, and boots on"
        if self.tries >= TRIES:
            raise ProvisionError(
                f"{name} took its passphrase {self.tries} times, and still waits for it.",
                "Its console may say why; its initramfs cannot open the disk.",
            )
        self.known = self.known or self.passphrase()
        try:
            give_passphrase(wanted, self.known)
        except Unreachable as error:
            return error.message
        self.tries += 1
        self.taken_at = time.monotonic()
        return f"{name} was given the passphrase of its disk"
