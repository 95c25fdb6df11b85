"""Packages of the AUR that a person asks for, for real: git, makepkg and pacman in a throwaway root, as in test_aur.

What the AUR serves is a stand-in with the same shape, whose source package makes two packages.
"""

import subprocess

from provision.steps import Step
from provision.system.aur import HOME, PACKAGES, builder, from_aur
from tests.rehearsal.test_aur import Box, box, lower, pytestmark

__all__ = ["box", "lower", "pytestmark"]

PKGBUILD = """
pkgbase=tool
pkgname=('tool' 'tool-extra')
pkgver=r{version}
pkgrel=1
arch=('any')
options=('!strip')

package_tool() {{ install -d "$pkgdir/usr/share/tool"; awk '/^Uid/ {{print $2}}' /proc/$PPID/status > "$pkgdir/usr/share/tool/{version}"; }}
package_tool-extra() {{ install -d "$pkgdir/usr/share/tool-extra"; }}
"""


def publish(box: Box, version: int) -> str:
    (box.served / "PKGBUILD").write_text(PKGBUILD.format(version=version))
    box.git("add", ".")
    box.git("commit", "--quiet", "--message", str(version))
    return box.git("rev-parse", "HEAD")


def steps_for(commit: str, *names: str) -> list[Step]:
    return [*builder("builds"), *from_aur("tool", commit, names or ("tool",), "file:///srv/aur")]


def applied(box: Box, steps: list[Step]) -> subprocess.CompletedProcess[str]:
    done = box.apply(steps)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_what_was_read_is_built_and_only_what_was_asked_for_is_installed(box: Box) -> None:
    first = publish(box, 1)
    second = publish(box, 2)  # newer, and not what was read
    assert box.pending(steps_for(first)) == [
        "user metal-aur",
        f"directory {HOME}",
        "source of tool",
        "package tool of the AUR",
    ]
    applied(box, steps_for(first))
    assert box.pending(steps_for(first)) == []
    seen = box.run(
        f"pacman -Q; ls {HOME}; stat -c %U {PACKAGES}/tool/source/PKGBUILD; cat /usr/share/tool/1"
    ).stdout.split("\n")
    assert seen[:2] == [
        "tool r1-1",
        "root",
    ]  # nothing is left in the builder's home, and nothing of `tool-extra`
    assert int(seen[2]) > 0
    assert box.pending(steps_for(first, "tool", "tool-extra")) == ["package tool of the AUR"]
    applied(box, steps_for(second, "tool", "tool-extra"))
    assert box.pending(steps_for(second, "tool", "tool-extra")) == []
    assert box.run("pacman -Q").stdout.splitlines() == ["tool r2-1", "tool-extra r2-1"]


def test_a_commit_or_a_package_that_is_not_there_is_refused(box: Box) -> None:
    commit = publish(box, 1)
    failed = box.apply(steps_for("0" * 40))
    assert failed.returncode != 0
    assert "is not in the history" in failed.stdout
    assert "put it into aur.tool of the machine file" in failed.stdout
    failed = box.apply(steps_for(commit, "other"))
    assert failed.returncode != 0
    assert "makepkg made no other, but: tool-" in failed.stdout
    assert box.run("pacman -Q").stdout == ""
