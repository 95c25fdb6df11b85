"""A question on a terminal: an answer, none in time, nobody there."""

import os
import pty
import subprocess
import sys
import time

import pytest

ASK = (
    "from provision.person import ask_person, confirm_person\n"
    "print('ready', flush=True)\n"
    "print(repr(ask_person('yes? ', 3)), repr(ask_person('no? ', 0.3)), repr(ask_person('again? ')))\n"
)


def run(script: str, stdin: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", script], stdin=stdin, stdout=subprocess.PIPE, text=True, bufsize=1
    )


@pytest.mark.parametrize(("last", "got"), [(b"well\n", "'well'"), (b"\x04", "''")])
def test_a_person_answers_or_does_not(last: bytes, got: str) -> None:
    ours, theirs = pty.openpty()
    process = run(ASK, theirs)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    os.write(ours, b" an answer \n")
    time.sleep(1.5)  # the second question goes by
    os.write(ours, last)
    text = process.communicate(timeout=20)[0]
    assert f"'an answer' '' {got}" in text
    for end in (ours, theirs):
        os.close(end)


def test_where_nobody_sits_nobody_is_asked() -> None:
    done = run(ASK, subprocess.DEVNULL)
    assert done.communicate(timeout=20)[0] == "ready\n'' '' ''\n"
