"""NVIDIA's 580xx branch, the last for Maxwell, Pascal and Volta: built from the AUR, at a commit that a person has read.

The AUR is where anybody may publish, and what it serves is changed at will. So: only on a person's word, only that
commit, never as root, and what is installed is known again by its files.
"""

from collections.abc import Iterator
from dataclasses import replace
from shlex import quote

from provision.steps import STATE, Directory, Script, Step

# One source package makes both, and opencl-nvidia-580xx. Its nvidia-580xx-utils provides nvidia-utils, conflicts with
# Arch's own, blacklists nouveau and nova, loads nvidia-uvm and brings nvidia-persistenced.service.
AUR_URL = "https://aur.archlinux.org/nvidia-580xx-utils.git"
LEGACY = ("nvidia-580xx-dkms", "nvidia-580xx-utils")
BUILDER = "metal-aur"
FOLDER = f"{STATE}/aur"
SOURCE = f"{FOLDER}/source"  # root's: who builds cannot change what is built
HOME = f"{FOLDER}/home"
RECORD = f"{FOLDER}/installed"

# pacman keeps the sum of every file of an installed package: a build of another commit has others.
FILES = "cat /var/lib/pacman/local/nvidia-580xx-{dkms,utils}-[0-9]*/mtree | sha256sum | cut -d' ' -f1"


def legacy_driver(commit: str, url: str = AUR_URL) -> Iterator[Step]:
    """On the installed system, after dkms, headers, git and base-devel."""
    yield Script(
        f"user {BUILDER}",
        why="builds the driver from the AUR, so that root does not",
        probe=f"getent passwd {BUILDER} | cut -d: -f6,7",
        expect=f"{HOME}:/usr/bin/nologin",
        script=f"id -u {BUILDER} > /dev/null 2>&1 || useradd --system --user-group --no-create-home {BUILDER}\n"
        f"usermod --home {HOME} --shell /usr/bin/nologin {BUILDER}",
    )
    yield Directory(HOME, mode=0o700, owner=f"{BUILDER}:{BUILDER}", why="where it builds")
    installed = f'[[ $(cat {RECORD}) == "{commit} $({FILES})" ]]'
    yield Script(
        "source of nvidia-580xx",
        why=f"commit {commit} of {url}, as gpu.legacy_commit says",
        probe=f"if {installed} || [[ -z $(git -C {SOURCE} status --porcelain || echo none) ]]; then\n"
        f"  {installed} && echo {commit} || git -C {SOURCE} rev-parse HEAD\nfi",
        expect=commit,
        script=fetch_source(commit, url, SOURCE),
    )
    build = Script(
        "driver nvidia-580xx",
        why="drives cards older than Turing; built here, for every kernel by DKMS",
        probe=f"{installed} && echo {commit}",
        expect=commit,
        script=build_packages() + f'pacman -U --noconfirm --noprogressbar "${{built[@]}}"\n'
        f'files=$({FILES})\necho "{commit} $files" > {RECORD}.new\nmv -T {RECORD}.new {RECORD}\n'
        f"rm -rf {HOME}/sources {HOME}/packages {HOME}/build",
    )
    yield replace(build, disturbs_runs=True)


def fetch_source(commit: str, url: str, folder: str) -> str:
    """Bash: exactly this commit of the package's history in a folder made anew; anything else is refused.

    git names a commit by the sum of all it holds, and checks it as it fetches. A commit that is not in the history
    of what the AUR shows is refused too: nobody could read it there.
    """
    return f"""umask 022
export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null GIT_TERMINAL_PROMPT=0
rm -rf {folder}
mkdir -p {folder}
cd {folder}
git init --quiet
git fetch --quiet --no-tags {quote(url)} HEAD || {{ echo "{url} does not answer as a git repository"; exit 1; }}
git merge-base --is-ancestor {commit} FETCH_HEAD 2> /dev/null || {{
  echo "refused: commit {commit} is not in the history of {url}, whose newest is $(git rev-parse FETCH_HEAD)"
  echo "Read that one, and if you trust it, put it into gpu.legacy_commit of the machine file."
  exit 1
}}
git -c advice.detachedHead=false checkout --quiet --detach {commit}
[[ $(git rev-parse HEAD) == {commit} && -z $(git status --porcelain) ]] || {{ echo "refused: {folder} is not commit {commit}"; exit 1; }}
"""


def build_packages() -> str:
    """Bash: both packages built by `BUILDER`, their paths in the array `built`."""
    return f"""rm -rf {HOME}/packages {HOME}/build
install -d -m 700 -o {BUILDER} -g {BUILDER} {HOME}/sources {HOME}/packages {HOME}/build
cd {SOURCE}
# Packed without compression: they are unpacked at once.
runuser --user {BUILDER} -- env --ignore-environment HOME={HOME} PATH=/usr/local/bin:/usr/bin LC_ALL=C.UTF-8 \\
  SRCDEST={HOME}/sources PKGDEST={HOME}/packages BUILDDIR={HOME}/build PKGEXT=.pkg.tar PACKAGER={BUILDER} \\
  makepkg --force --noconfirm --noprogressbar --nocolor || {{
  echo "makepkg failed; if it misses packages, put them into system.packages of the machine file"
  exit 1
}}
built=()
for name in {" ".join(LEGACY)}; do
  built+=({HOME}/packages/$name-[0-9]*.pkg.tar)
  [[ -f ${{built[-1]}} ]] || {{ echo "makepkg made no $name"; exit 1; }}
done
(( ${{#built[@]}} == {len(LEGACY)} )) || {{ echo "makepkg made more than was asked for: ${{built[*]}}"; exit 1; }}
"""
