"""The legacy driver's Steps run to their end: real git, useradd, runuser, makepkg, fakeroot and pacman in a throwaway root.

What the AUR serves is a stand-in: a PKGBUILD of the same shape, of which no driver comes.
"""

import hashlib
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from shlex import quote
from types import SimpleNamespace

import pytest

from provision.facts import GpuSeen
from provision.rehearsal.bed import load_example
from provision.steps import Step, make_plan, parse_probes, render_apply, render_probes
from provision.system.gpu import other_drivers
from provision.system.legacy import HOME, RECORD, SOURCE, legacy_driver
from tests.git import git
from tests.rehearsal.conftest import CACHE

pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts a root file system: needs root"),
]

PKGBUILD = """
pkgbase=nvidia-580xx-utils
pkgname=('nvidia-580xx-utils' 'opencl-nvidia-580xx' 'nvidia-580xx-dkms')
pkgver=580.178.{version}
pkgrel=1
arch=('x86_64')
options=('!strip')
source=('nvidia.rules')
sha256sums=('{digest}')

package_opencl-nvidia-580xx() {{ :; }}

package_nvidia-580xx-dkms() {{
  depends=("nvidia-580xx-utils=$pkgver")
  provides=('NVIDIA-MODULE')
  install -d "$pkgdir/usr/src/nvidia-$pkgver"
  awk '/^Uid/ {{print $2}}' /proc/$PPID/status > "$pkgdir/usr/src/nvidia-$pkgver/built-by"
}}

package_nvidia-580xx-utils() {{
  provides=('nvidia-utils')
  conflicts=('nvidia-utils')
  install -D -m 644 "$srcdir/nvidia.rules" "$pkgdir/usr/lib/udev/rules.d/60-nvidia.rules"
}}
"""

# A root of its own over the rehearsal's, gone with the namespace; git is the host's.
IN_ROOT = r"""
set -euo pipefail
mount -t tmpfs -o mode=755 tmpfs "$scratch"
mkdir "$scratch"/{upper,work,root}
[[ ! -e $kept ]] || tar -C "$scratch/upper" -xf "$kept"
mount -t overlay -o "lowerdir=$lower,upperdir=$scratch/upper,workdir=$scratch/work" overlay "$scratch/root"
cd "$scratch/root"
mkdir -p usr/lib/git-core srv/aur
touch usr/bin/git
mount --bind /usr/bin/git usr/bin/git
mount --bind /usr/lib/git-core usr/lib/git-core
mount --bind "$served" srv/aur
mount --bind /dev dev
mount -t proc proc proc
code=0
chroot . bash --norc --noprofile < <(printf '%s\n' "$script") || code=$?
umount srv/aur dev proc usr/bin/git usr/lib/git-core
cd /
umount "$scratch/root"
tar -C "$scratch/upper" -cf "$kept" .
exit $code
"""


@pytest.fixture(scope="module")
def lower(request: pytest.FixtureRequest) -> Path:
    """The rehearsal's root file system, built where there is none yet."""
    if not list(CACHE.glob("rootfs-*/root/usr/bin/makepkg")):
        request.getfixturevalue("bed")
    return max(CACHE.glob("rootfs-*/root"), key=lambda root: root.parent.stat().st_mtime)


class Box:
    """A root that remembers what was done in it."""

    def __init__(self, lower: Path, folder: Path) -> None:
        self.lower, self.folder, self.served = lower, folder, folder / "served"
        self.served.mkdir()
        (folder / "scratch").mkdir()
        self.git("init", "--quiet")

    def git(self, *arguments: str) -> str:
        return git(self.served, *arguments)

    def publish(self, version: str, digest: str = "") -> str:
        """One more commit in what the AUR serves."""
        rules = f"# rules of {version}\n"
        (self.served / "nvidia.rules").write_text(rules)
        digest = digest or hashlib.sha256(rules.encode()).hexdigest()
        (self.served / "PKGBUILD").write_text(PKGBUILD.format(version=version, digest=digest))
        self.git("add", ".")
        self.git("commit", "--quiet", "--message", version)
        return self.git("rev-parse", "HEAD")

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "scratch": self.folder / "scratch", "kept": self.folder / "kept.tar", "lower": self.lower, "served": self.served,
            "script": script,
        }  # fmt: skip
        assigned = "\n".join(f"{name}={quote(str(value))}" for name, value in environment.items())
        words = ["unshare", "--mount", "--propagation", "private", "bash", "-c", f"{assigned}\n{IN_ROOT}"]
        return subprocess.run(words, capture_output=True, text=True)

    def pending(self, steps: list[Step]) -> list[str]:
        answer = self.run(render_probes(steps, ""))
        plan = make_plan("", steps, parse_probes(steps, answer.stdout))
        return [planned.step.name for planned in plan.pending]

    def apply(self, steps: list[Step]) -> subprocess.CompletedProcess[str]:
        answer = self.run(render_probes(steps, ""))
        return self.run(render_apply(make_plan("", steps, parse_probes(steps, answer.stdout)), ""))


@pytest.fixture
def box(lower: Path, tmp_path: Path) -> Box:
    return Box(lower, tmp_path)


def steps_for(commit: str) -> list[Step]:
    return list(legacy_driver(commit, "file:///srv/aur"))


ALL = ["user metal-aur", f"directory {HOME}", "source of nvidia-580xx", "driver nvidia-580xx"]


def test_the_driver_is_built_by_nobody_in_particular_and_known_again(box: Box) -> None:
    first = box.publish("03")
    box.publish("04")  # newer, and not what was read
    assert box.pending(steps_for(first)) == ALL
    done = box.apply(steps_for(first))
    assert done.returncode == 0, done.stdout + done.stderr
    assert box.pending(steps_for(first)) == []
    seen = box.run(
        f"pacman -Q; cat /usr/src/nvidia-*/built-by; id -u metal-aur; cat {RECORD}; ls {HOME}; stat -c %U {SOURCE}/PKGBUILD"
    ).stdout.splitlines()
    assert seen[:2] == ["nvidia-580xx-dkms 580.178.03-1", "nvidia-580xx-utils 580.178.03-1"]
    assert seen[2] == seen[3] != "0"
    assert seen[4].startswith(f"{first} ")
    assert seen[5:] == ["root"]  # nothing is left in the builder's home


def test_another_commit_and_another_build_are_noticed(box: Box) -> None:
    first = box.publish("03")
    assert box.apply(steps_for(first)).returncode == 0
    second = box.publish("04")
    assert box.pending(steps_for(second)) == ALL[2:]
    done = box.apply(steps_for(second))
    assert done.returncode == 0, done.stdout + done.stderr
    assert box.pending(steps_for(second)) == []
    assert box.apply(steps_for(first)).returncode == 0  # and back
    assert box.pending(steps_for(first)) == []
    # The same version, built from something else by somebody else.
    elsewhere = (
        f"cp -r {SOURCE} {HOME}/evil; echo '# evil' >> {HOME}/evil/nvidia.rules; chown -R metal-aur {HOME}/evil; cd {HOME}/evil\n"
        f"runuser --user metal-aur -- env HOME={HOME} PKGEXT=.pkg.tar makepkg --force --skipchecksums\n"
        "pacman -U --noconfirm nvidia-580xx-utils-*.pkg.tar nvidia-580xx-dkms-*.pkg.tar"
    )
    done = box.run(elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    assert box.pending(steps_for(first)) == ["driver nvidia-580xx"]


OFFICIAL = """
pkgname={name}
pkgver=610.43.02
pkgrel=1
arch=('any')
options=('!strip')
provides=({provides})
conflicts=({provides})
package() {{ install -d "$pkgdir/usr/share/{name}"; }}
"""


def test_the_driver_that_conflicts_goes_first_since_pacman_would_not_remove_it(box: Box) -> None:
    commit = box.publish("03")
    own = []
    for name, provides in (("nvidia-open-lts", "NVIDIA-MODULE"), ("nvidia-utils", "")):
        recipe = quote(OFFICIAL.format(name=name, provides=provides))
        own.append(
            f"install -d -o nobody /tmp/{name}; cd /tmp/{name}; printf %s {recipe} > PKGBUILD\n"
            f"runuser --user nobody -- env HOME=/tmp/{name} PKGEXT=.pkg.tar makepkg\npacman -U --noconfirm *.pkg.tar"
        )
    done = box.run("set -e\n" + "\n".join(own))
    assert done.returncode == 0, done.stdout + done.stderr
    steps = steps_for(commit)
    failed = box.apply(steps)
    assert failed.returncode != 0
    assert "unresolvable package conflicts" in failed.stdout
    machine = load_example()
    machine = replace(machine, gpu=replace(machine.gpu, legacy_commit=commit, driver="auto"))
    seen = SimpleNamespace(gpus=(GpuSeen("0000:01:00.0", 0x1B06),))
    steps = [*other_drivers(machine, seen), *steps]
    assert box.pending(steps) == ["no other NVIDIA driver", "driver nvidia-580xx"]
    done = box.apply(steps)
    assert done.returncode == 0, done.stdout + done.stderr
    assert box.pending(steps) == []
    assert box.run("pacman -Qq").stdout.split() == ["nvidia-580xx-dkms", "nvidia-580xx-utils"]
    assert (
        box.run("pacman -Q nvidia-utils").stdout == "nvidia-580xx-utils 580.178.03-1\n"
    )  # what verification asks


def test_a_build_that_fails_changes_nothing_and_says_so(box: Box) -> None:
    commit = box.publish("03", digest="0" * 64)
    failed = box.apply(steps_for(commit))
    assert failed.returncode != 0
    assert "@@failed 3" in failed.stdout
    assert "makepkg failed" in failed.stdout
    assert "nvidia" not in box.run("pacman -Q").stdout
    assert box.pending(steps_for(commit)) == ["driver nvidia-580xx"]
