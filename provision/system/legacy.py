"""NVIDIA's 580xx branch, the last for Maxwell, Pascal and Volta: built from the AUR, at a commit that a person has read.

The AUR is where anybody may publish, and what it serves is changed at will. So: only on a person's word, only that
commit, never as root, and what is installed is known again by its files.
"""

from collections.abc import Iterator
from dataclasses import replace

from provision.steps import Script, Step
from provision.system.aur import FOLDER, HOME, builder, fetch_source, make_packages

# One source package makes both, and opencl-nvidia-580xx. Its nvidia-580xx-utils provides nvidia-utils, conflicts with
# Arch's own, blacklists nouveau and nova, loads nvidia-uvm and brings nvidia-persistenced.service.
AUR_URL = "https://aur.archlinux.org/nvidia-580xx-utils.git"
LEGACY = ("nvidia-580xx-dkms", "nvidia-580xx-utils")
SOURCE = f"{FOLDER}/source"  # root's: who builds cannot change what is built
RECORD = f"{FOLDER}/installed"

# pacman keeps the sum of every file of an installed package: a build of another commit has others.
FILES = "cat /var/lib/pacman/local/nvidia-580xx-{dkms,utils}-[0-9]*/mtree | sha256sum | cut -d' ' -f1"


def legacy_driver(commit: str, url: str = AUR_URL) -> Iterator[Step]:
    """On the installed system, after dkms, headers, git and base-devel."""
    yield from builder("builds the driver from the AUR, so that root does not")
    installed = f'[[ $(cat {RECORD}) == "{commit} $({FILES})" ]]'
    yield Script(
        "source of nvidia-580xx",
        why=f"commit {commit} of {url}, as gpu.legacy_commit says",
        probe=f"if {installed} || [[ -z $(git -C {SOURCE} status --porcelain || echo none) ]]; then\n"
        f"  {installed} && echo {commit} || git -C {SOURCE} rev-parse HEAD\nfi",
        expect=commit,
        script=fetch_source(commit, url, SOURCE, "gpu.legacy_commit"),
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


def build_packages() -> str:
    """Bash: both packages built by `BUILDER`, their paths in the array `built`."""
    return f"""{make_packages(SOURCE)}built=()
for name in {" ".join(LEGACY)}; do
  built+=({HOME}/packages/$name-[0-9]*.pkg.tar)
  [[ -f ${{built[-1]}} ]] || {{ echo "makepkg made no $name"; exit 1; }}
done
(( ${{#built[@]}} == {len(LEGACY)} )) || {{ echo "makepkg made more than was asked for: ${{built[*]}}"; exit 1; }}
"""
