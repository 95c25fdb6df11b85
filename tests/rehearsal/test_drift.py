"""Fifty changes by chance to what a machine file manages, for real: files, users, packages, enabled units, kernel settings.

In a throwaway root over the rehearsal's, with real pacman, useradd and systemctl. Nothing runs there, so whether a unit is
active is kept in a file; `python -m tests.drift NAME` does the same to a machine that runs.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shlex import quote
from types import SimpleNamespace

import pytest

from provision.drift import parse_extras, render_look
from provision.machine import Machine
from provision.steps import (
    Packages,
    Plan,
    Step,
    make_plan,
    merge_packages,
    parse_probes,
    render_apply,
    render_plan,
    render_probes,
)
from provision.system import own
from tests.drift import PACKAGES, WISHES, blocks, draw, hidden, tally, unasked, wished
from tests.provision.test_own import wish
from tests.rehearsal.hardware import today
from tests.rehearsal.test_aur import lower, pytestmark
from tests.sshd import wait_for

__all__ = ["lower", "pytestmark"]

# The first process of namespaces of its own, with a root that is gone when it ends.
SETUP = r"""
set -eu
mount -t tmpfs -o mode=755 tmpfs "$scratch"
mkdir "$scratch"/{upper,work,root}
mount -t overlay -o "lowerdir=$lower,upperdir=$scratch/upper,workdir=$scratch/work" overlay "$scratch/root"
cd "$scratch/root"
mount --bind /dev dev
mount -t proc proc proc
mount -t tmpfs tmpfs run
mkdir -p usr/local/bin srv/repo
printf '%s' "$systemctl" > usr/local/bin/systemctl
chmod 755 usr/local/bin/systemctl
touch run/active run/masked run/ready
while :; do sleep 1000 & wait $!; done
"""
SYSTEMCTL = r"""#!/bin/bash
# Which units run, and which ones systemd knows as masked, is kept in files; all else is the real systemctl's, on the
# files of this root. As with the real one, systemd hears of a change at `daemon-reload`, or where --root is not given.
words=() reload=yes
for word in "$@"; do case $word in --root=*) reload= ;; --now|--quiet|--property|--value|Type) ;; *) words+=("$word") ;; esac; done
set -- "${words[@]}"
reload() { find /etc/systemd/system -lname /dev/null -printf '%f\n' > /run/masked; }
case $1 in
  is-active) if grep -qx "$2" /run/active; then echo active; else echo inactive; exit 3; fi ;;
  start)
    if grep -qx "$2" /run/masked; then echo "Failed to start $2: Unit $2 is masked." >&2; exit 1; fi
    echo "$2" >> /run/active ;;
  stop) sed -i "/^$2$/d" /run/active ;;
  show) echo simple ;;
  cat) find {/usr/local,/usr,/etc}/systemd /usr/{,local/}lib/systemd -name "$2" 2> /dev/null | grep . ;;
  daemon-reload) reload ;;
  list-units) ;;
  *) /usr/bin/systemctl --root=/ "$@"; status=$?; [[ ! $reload ]] || reload; exit "$status" ;;
esac
"""
# Packages of nothing, in a repository of this root.
REPOSITORY = r"""
cat > /etc/pacman.conf <<'CONF'
[options]
Architecture = auto
SigLevel = Never
[drift]
Server = file:///srv/repo
CONF
for name in NAMES; do
  mkdir -p "/tmp/$name/usr/share/$name"
  printf '%s\n' "pkgname = $name" "pkgbase = $name" 'pkgver = VERSION-1' 'pkgdesc = x' 'builddate = 1' 'size = 1' 'arch = any' > "/tmp/$name/.PKGINFO"
  bsdtar -C "/tmp/$name" -cf "/srv/repo/$name-VERSION-1-any.pkg.tar" .PKGINFO usr
done
repo-add --quiet /srv/repo/drift.db.tar.gz /srv/repo/*-VERSION-1-any.pkg.tar > /dev/null 2>&1
"""


class Root:
    """A root of Arch's kind in namespaces of its own, network included."""

    def __init__(self, lower: Path, folder: Path) -> None:
        scratch = folder / "scratch"
        scratch.mkdir()
        values = {"scratch": scratch, "lower": lower, "systemctl": SYSTEMCTL}
        assigned = "".join(f"{name}={quote(str(value))}\n" for name, value in values.items())
        alone = ["unshare", "--mount", "--propagation", "private", "--net", "--pid", "--fork", "--kill-child"]
        self.holder = subprocess.Popen([*alone, "bash", "-c", assigned + SETUP], stdin=subprocess.DEVNULL)
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children")
        wait_for(lambda: bool(children.read_text().split()), "the namespaces")
        self.init = int(children.read_text().split()[0])
        self.path = Path(f"/proc/{self.init}/root{scratch}/root")
        wait_for((self.path / "run/ready").exists, "the root")
        self.root = scratch / "root"

    def run(self, script: str) -> str:
        """What a script prints in the root. It must end well."""
        enter = ["nsenter", "-t", str(self.init), "-m", "-n", "-p", "chroot", str(self.root)]
        clean = ["env", "-i", "PATH=/usr/local/bin:/usr/bin", "HOME=/root"]
        done = subprocess.run(
            [*enter, *clean, "bash", "--norc", "-euo", "pipefail", "-s"],
            input=script, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def plan(self, steps: list[Step]) -> Plan:
        return make_plan("root", steps, parse_probes(steps, self.run(render_probes(steps, ""))))

    def close(self) -> None:
        os.kill(self.init, signal.SIGKILL)
        self.holder.wait(10)


@pytest.fixture
def root(lower: Path, tmp_path: Path) -> Iterator[Root]:
    root = Root(lower, tmp_path)
    try:
        root.run(REPOSITORY.replace("NAMES", " ".join((*PACKAGES, "strange"))).replace("VERSION", "1"))
        yield root
    finally:
        root.close()


CONCERNS = (
    own.own_packages, own.own_groups, own.own_users, own.own_files, own.own_lines, own.own_sysctl, own.own_units,
)  # fmt: skip


def steps_of(machine: Machine) -> list[Step]:
    facts = SimpleNamespace(system="installed", screens=(), gpus=())
    steps = [step for concern in CONCERNS for step in concern(machine, facts)]
    return merge_packages([*steps, Packages(PACKAGES[0], why="another concern's")])


def test_fifty_changes_are_shown_and_mended(root: Root, tmp_path: Path) -> None:
    """Other ones each day; METAL_DAY repeats a day's."""
    steps = steps_of(wish(tmp_path / "own", WISHES))
    root.run(render_apply(root.plan(steps), ""))
    assert not root.plan(steps)
    changes = draw(list(wished()), 50, today())
    assert len(changes) == 50
    assert {kind.partition(" ")[0] for kind in tally(changes)} == {
        "file", "folder", "link", "line", "user", "unit", "package", "sysctl",
    }  # fmt: skip
    root.run("\n".join(change.script for change in changes))
    plan = root.plan(steps)
    text = render_plan(plan)
    assert hidden(text, changes) == []
    assert unasked(text, changes) == []
    assert len(blocks(text)) == len(plan.pending)
    root.run(render_apply(plan, ""))
    assert not root.plan(steps)


def test_what_somebody_masked_runs_again(root: Root, tmp_path: Path) -> None:
    steps = steps_of(wish(tmp_path / "own", WISHES))
    root.run(render_apply(root.plan(steps), ""))
    root.run("systemctl mask drift0.service; systemctl stop drift0.service; systemctl daemon-reload")
    root.run(render_apply(root.plan(steps), ""))
    assert not root.plan(steps)


def test_what_pacman_says_of_packages_that_no_file_names(root: Root, tmp_path: Path) -> None:
    """The real pacman and its log: what is installed by hand, what once was wanted, what is of no repository."""
    machine = wish(tmp_path / "own", '[packages]\none = ["htop"]\n')
    facts = SimpleNamespace(system="installed", screens=(), gpus=())
    before = replace(machine, packages={"one": ("htop", "nano")})
    steps = steps_of(before)[:1]
    root.run(render_apply(root.plan(steps), ""))
    root.run("pacman -S --noconfirm tmux strange > /dev/null")
    root.run(
        "rm /srv/repo/drift.db*; repo-add --quiet /srv/repo/drift.db.tar.gz /srv/repo/[!s]*.pkg.tar > /dev/null 2>&1; pacman -Syy > /dev/null"
    )
    root.run(
        "pacman -D --asdeps tmux > /dev/null; touch /etc/hosts.pacnew; useradd --no-create-home stranger"
    )
    found = list(own.own_packages(machine, facts))
    extras = parse_extras(machine, facts, found, root.run(render_look(machine, facts, found)))
    assert extras.no_longer_wanted == ("nano",)
    assert extras.by_hand == ("strange",)
    assert extras.unneeded == ("tmux",)
    assert extras.foreign == ("strange",)
    assert extras.leftover_files == ("/etc/hosts.pacnew",)
    assert "stranger" in extras.accounts
    assert extras.upgraded
