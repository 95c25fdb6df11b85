"""Asking a person who sits at the terminal."""

import select
import sys
from typing import Protocol


class Ask(Protocol):
    """A question to a line typed by a person; "" where nobody sits there, or nobody answers `within_s`."""

    def __call__(self, question: str, within_s: float | None = None, /) -> str: ...


def ask_person(question: str, within_s: float | None = None, /) -> str:
    if not sys.stdin.isatty():
        return ""
    if within_s is not None:
        print(question, end="", flush=True)
        if not select.select([sys.stdin], [], [], within_s)[0]:
            print()
            return ""
        question = ""
    try:
        return input(question).strip()
    except EOFError:  # Ctrl-D
        return ""


def confirm_person(question: str) -> bool:
    return ask_person(f"{question} [yes/no] ").lower() == "yes"


def ask_nobody(question: str, within_s: float | None = None, /) -> str:
    return ""
