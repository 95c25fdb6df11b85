"""What a power cut, or a kernel out of memory, leaves of pacman's work, by the real pacman in a throwaway root."""

import os
import subprocess
from pathlib import Path
from shlex import quote

import pytest

from provision.rehearsal.bed import Bed
from provision.steps import IN_DOUBT, Packages, make_plan, prelude, render_apply

pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts a root file system: needs root"),
]

# A root over the rehearsal's, gone with the namespace.
IN_ROOT = r"""
set -euo pipefail
mount -t tmpfs -o mode=755 tmpfs "$scratch"
mkdir "$scratch"/{upper,work,root}
mount -t overlay -o "lowerdir=$lower,upperdir=$scratch/upper,workdir=$scratch/work" overlay "$scratch/root"
cd "$scratch/root"
mkdir -p srv/repository
mount --bind "$repository" srv/repository
mount --bind /dev dev
mount -t proc proc proc
echo 'Server = file:///srv/repository/$repo/os/$arch' > etc/pacman.d/mirrorlist
sed -i 's/^SigLevel.*/SigLevel = Never/' etc/pacman.conf
rm -rf var/lib/pacman/local/*
exec chroot . bash --norc --noprofile -c "$script"
"""

# ext4 writes a file's name before its content: what was written last is there after a power cut, and empty.
POWER_CUT = rf"""
for file in /usr/bin/tmux /usr/bin/uv /var/lib/pacman/local/uv-*/desc /var/lib/pacman/sync/*.db /var/cache/pacman/pkg/tmux-*; do
  : > "$file"
done
touch /var/lib/pacman/db.lck
touch --date '1 hour ago' {IN_DOUBT}
"""


def in_root(bed: Bed, folder: Path, script: str) -> list[str]:
    newest = max(bed.folder.glob("rootfs-*/root"), key=lambda root: root.parent.stat().st_mtime)
    values = {"scratch": folder, "lower": newest, "repository": bed.parts.repository, "script": script}
    assigned = "\n".join(f"{name}={quote(str(value))}" for name, value in values.items())
    words = ["unshare", "--mount", "--propagation", "private", "bash", "-c", f"{assigned}\n{IN_ROOT}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_what_pacman_installed_before_the_power_went_is_installed_once_more(bed: Bed, tmp_path: Path) -> None:
    step = Packages("tmux", "uv", why="")
    apply = quote(render_apply(make_plan("", [step], [("tmux", False)]), ""))
    look = quote(f"{prelude('')}\n{step.probe}")
    good = "sha256sum /usr/bin/tmux /usr/bin/uv; pacman -Q tmux uv; pacman -Qk tmux uv 2> /dev/null"
    script = f"""
set -euo pipefail
{{ pacman -Sy --noconfirm --dbonly base; pacman -S --noconfirm --overwrite '*' tmux; pacman -Rdd --noconfirm tmux; }} >&2
bash -euo pipefail -c {apply} >&2
echo "@$(bash -c {look})"
{good}
{POWER_CUT}
echo "@$(bash -c {look} 2> /dev/null | xargs)"
bash -euo pipefail -c {apply} >&2
echo "@$(bash -c {look})"
{good}
"""
    first, cut, again = "\n".join(in_root(bed, tmp_path, script)).split("@")[1:]
    assert first.splitlines()[0] == "", "nothing is left to do"
    assert len(first.splitlines()) == 7
    assert cut.splitlines()[0].startswith("unfinished")
    assert again.splitlines() == first.splitlines()


def test_a_killed_pacman_is_in_doubt_and_its_lock_goes(bed: Bed, tmp_path: Path) -> None:
    """As by the kernel where memory is short; an error of its own leaves nothing in doubt."""
    step = Packages("tmux", why="")
    apply = quote(render_apply(make_plan("", [step], [("tmux", False)]), ""))
    script = f"""
set -uo pipefail
{{ pacman -Sy --noconfirm --dbonly base; pacman -S --noconfirm --overwrite '*' tmux; pacman -Rdd --noconfirm tmux; }} >&2
hook=/etc/pacman.d/hooks/kill.hook
mkdir -p "${{hook%/*}}"
printf '%s\n' '[Trigger]' 'Operation = Install' 'Type = Package' 'Target = tmux' '[Action]' 'When = PreTransaction' \
  'Exec = /usr/bin/bash -c "kill -KILL $PPID"' > $hook
bash -euo pipefail -c {apply} >&2 && echo unexpected
ls {IN_DOUBT} /var/lib/pacman/db.lck
printf '%s\n' '[Trigger]' 'Operation = Install' 'Type = Package' 'Target = tmux' '[Action]' 'When = PreTransaction' \
  'Exec = /usr/bin/false' AbortOnFail > $hook
rm {IN_DOUBT} /var/lib/pacman/db.lck
bash -euo pipefail -c {apply} >&2 && echo unexpected
ls {IN_DOUBT} /var/lib/pacman/db.lck 2> /dev/null
touch /var/lib/pacman/db.lck
touch --date '1 hour ago' {IN_DOUBT}
rm $hook
bash -euo pipefail -c {apply} >&2
ls {IN_DOUBT} /var/lib/pacman/db.lck 2> /dev/null
pacman -Qq tmux
"""
    assert in_root(bed, tmp_path, script) == [IN_DOUBT, "/var/lib/pacman/db.lck", "tmux"]
