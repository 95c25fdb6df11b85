"""Secrets by reference: a machine file says where a secret is, never what it is.

`Secret` prints as `***`, whatever prints it. Only `reveal` looks behind it: late, on this computer, and for one use.
What it returns goes to the host on stdin; it is in no argument, log, plan or process list.
"""

import getpass
import os
import re
import shlex
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from provision.errors import ProvisionError

REFERENCE = r"(env:[A-Za-z_][A-Za-z0-9_]*|file:[~/][^\n]*|command:[^\n]*\S[^\n]*|prompt:[^\n]+)?"
HOW = (
    "a reference, never the secret itself: env:NAME, file:/PATH (or file:~/PATH), "
    "command:PROGRAM ARGUMENTS, or prompt:TEXT"
)
COMMAND_DEADLINE_S = 60

Prompt = Callable[[str], str]


@dataclass(frozen=True, repr=False)
class Secret:
    """Where a secret is; false where none is wanted."""

    reference: str = ""

    def __bool__(self) -> bool:
        return bool(self.reference)

    def __repr__(self) -> str:
        return "***" if self.reference else "none"


def is_reference(text: str) -> bool:
    return re.fullmatch(REFERENCE, text) is not None


def ask_person(text: str) -> str:
    """Typed without echo; "" where nobody sits there, or several machines, a thread each, would ask at once."""
    alone = threading.current_thread() is threading.main_thread()
    return getpass.getpass(f"{text}: ") if alone and sys.stdin.isatty() else ""


def reveal(secret: Secret, prompt: Prompt = ask_person) -> str:
    """The secret itself. ProvisionError says by its reference what was not found, and what to do."""
    kind, _, rest = secret.reference.partition(":")
    if kind == "env":
        found, remedy = os.environ.get(rest, ""), f"read -rs {rest} && export {rest}"
    elif kind == "file":
        found, remedy = read_file(Path(rest)), f"Write it there, for your eyes only: umask 077; cat > {rest}"
    elif kind == "command":
        found, remedy = run_command(rest), "It must print the secret and nothing else."
    elif kind == "prompt":
        found, remedy = (
            prompt(rest),
            "Run this on a terminal, for one machine, or refer to env:, file: or command: instead.",
        )
    else:
        raise ProvisionError(f"There is no secret to look up; expected {HOW}.")
    found = found.removesuffix("\n").removesuffix("\r")
    if not found:
        raise ProvisionError(f"The secret at {secret.reference} is empty or not there.", remedy)
    if "\n" in found or "\0" in found:
        raise ProvisionError(f"The secret at {secret.reference} is more than one line.", remedy)
    return found


def read_file(path: Path) -> str:
    try:
        path = path.expanduser()
        if not path.exists():
            return ""
        mode = path.stat().st_mode
        if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ProvisionError(
                f"{path} holds a secret, and others on this computer may read it.", f"chmod 600 {path}"
            )
        return path.read_text()
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: ~ of nobody
        raise ProvisionError(f"The secret at file:{path} cannot be read: {type(error).__name__}.") from error


def run_command(line: str) -> str:
    """What a command prints. It runs without a shell, and may ask a person on the terminal, as gpg does."""
    try:
        done = subprocess.run(
            shlex.split(line), stdout=subprocess.PIPE, text=True, timeout=COMMAND_DEADLINE_S, check=False
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise ProvisionError(
            f"command:{line} did not give a secret: {type(error).__name__}.",
            "It is run without a shell: one program and its arguments.",
        ) from None  # a TimeoutExpired carries what was printed so far
    if done.returncode:
        raise ProvisionError(f"command:{line} ended with exit {done.returncode}, not with a secret.")
    return done.stdout
