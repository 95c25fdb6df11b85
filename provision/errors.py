"""What people see when something is wrong.

- ProvisionError: the base; everything below is caught by it
  - Unreachable: nothing that speaks SSH answered in time; trying again may help
  - ConnectionLost: the connection ended or fell silent in the middle: what the host did since is unknown
  - Refused: the host answered, and does not let us in; trying again does not help
    - UnknownKey: it presents a host key that is not the pinned one
    - Locked: it is the machine, which waits for the passphrase of its disk
  - ScriptFailed: a script on the host ended with a status other than 0
"""


class ProvisionError(Exception):
    """Something that a person must read.

    ``message`` says what was seen and what was expected; ``hint`` is what to do or to type next.
    Libraries raise it; only ``fabfile.py`` and ``__main__`` modules print it and choose an exit code.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class Unreachable(ProvisionError):
    """No SSH server answered: name not known, no route, refused, timed out, or no SSH server."""


class ConnectionLost(ProvisionError):
    """An established connection was lost or fell silent. What ran on the host may have finished or not."""


class Refused(ProvisionError):
    """The host answered but no login came about."""


class UnknownKey(Refused):
    """The host key that was presented is neither pinned nor vouched for."""


class Locked(Refused):
    """The machine's initramfs answers: it waits for the passphrase of its disk."""


class ScriptFailed(ProvisionError):
    """A script ended with ``code``, which is not 0; the message ends with its last lines of output."""

    def __init__(self, message: str, hint: str = "", *, code: int) -> None:
        super().__init__(message, hint)
        self.code = code
