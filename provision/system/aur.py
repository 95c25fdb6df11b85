"""Packages of the AUR: of reviewed commits only, built by nobody in particular, known again by their files.

The AUR is where anybody may publish, and what it serves is changed at will. So: only on a person's word, only that
commit, never as root, and what is installed is known again by its files.
"""

from collections.abc import Iterator
from dataclasses import replace
from shlex import join, quote

from provision.steps import STATE, Directory, Script, Step

AUR = "https://aur.archlinux.org"
BUILDER = "metal-aur"
FOLDER = f"{STATE}/aur"
HOME = f"{FOLDER}/home"
PACKAGES = f"{FOLDER}/packages"  # of each: its source, which is root's, and the record of what was installed


def builder(why: str) -> Iterator[Step]:
    """The account that builds, and its home."""
    yield Script(
        f"user {BUILDER}",
        why=why,
        probe=f"getent passwd {BUILDER} | cut -d: -f6,7",
        expect=f"{HOME}:/usr/bin/nologin",
        script=f"id -u {BUILDER} > /dev/null 2>&1 || useradd --system --user-group --no-create-home {BUILDER}\n"
        f"usermod --home {HOME} --shell /usr/bin/nologin {BUILDER}",
    )
    yield Directory(HOME, mode=0o700, owner=f"{BUILDER}:{BUILDER}", why="where it builds")


def from_aur(base: str, commit: str, names: tuple[str, ...], url: str = "") -> Iterator[Step]:
    """A source package (pkgbase) at a commit, and of the packages that it makes those with these names."""
    url = url or f"{AUR}/{base}.git"
    source, record = f"{PACKAGES}/{base}/source", f"{PACKAGES}/{base}/installed"
    wanted = join(names)
    # pacman keeps the sum of every file of an installed package: a build of another commit has others. A package that
    # only provides the name is not meant, so its folder is looked for, and not asked for by `pacman -Q`.
    files = (
        f'for name in {wanted}; do for found in /var/lib/pacman/local/"$name"-*; do'
        ' if [[ ${found##*/} == "$name"-+([^-])-+([^-]) ]]; then echo "${found##*/}"; cat "$found/mtree"; fi; done; done'
        " | sha256sum | cut -d' ' -f1"
    )
    installed = f'[[ $(cat {record}) == "{commit} {" ".join(names)} $({files})" ]]'
    yield Script(
        f"source of {base}",
        why=f"commit {commit} of {url}, as aur.{base} says",
        probe=f"if {installed} || [[ -z $(git -C {source} status --porcelain || echo none) ]]; then\n"
        f"  {installed} && echo {commit} || git -C {source} rev-parse HEAD\nfi",
        expect=commit,
        script=fetch_source(commit, url, source, f"aur.{base}"),
    )
    build = Script(
        f"package {base} of the AUR",
        why=f"{' '.join(names)}, built here from commit {commit[:12]}",
        probe=f"{installed} && echo {commit}",
        expect=commit,
        script=f"""{make_packages(source)}built=()
for name in {wanted}; do
  found=
  for file in {HOME}/packages/*.pkg.tar; do
    version=${{file##*/}}
    [[ ${{version%-*-*-*}} != "$name" ]] || found=$file
  done
  [[ $found ]] || {{ echo "makepkg made no $name, but: $(cd {HOME}/packages && echo *)"; exit 1; }}
  built+=("$found")
done
pacman -U --noconfirm --noprogressbar "${{built[@]}}"
files=$({files})
echo "{commit} {" ".join(names)} $files" > {record}.new
mv -T {record}.new {record}
rm -rf {HOME}/sources {HOME}/packages {HOME}/build""",
    )
    yield replace(build, disturbs_runs=True)


def fetch_source(commit: str, url: str, folder: str, setting: str) -> str:
    """Bash: exactly this commit of the package's history in a folder made anew; anything else is refused.

    `setting` is where the machine file names the commit.
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
  echo "Read that one, and if you trust it, put it into {setting} of the machine file."
  exit 1
}}
git -c advice.detachedHead=false checkout --quiet --detach {commit}
[[ $(git rev-parse HEAD) == {commit} && -z $(git status --porcelain) ]] || {{ echo "refused: {folder} is not commit {commit}"; exit 1; }}
"""


def make_packages(source: str) -> str:
    """Bash: makepkg run by `BUILDER` on the source of root's; what it made lies in HOME/packages."""
    return f"""rm -rf {HOME}/packages {HOME}/build
install -d -m 700 -o {BUILDER} -g {BUILDER} {HOME}/sources {HOME}/packages {HOME}/build
cd {source}
# Packed without compression: they are unpacked at once.
runuser --user {BUILDER} -- env --ignore-environment HOME={HOME} PATH=/usr/local/bin:/usr/bin LC_ALL=C.UTF-8 \\
  SRCDEST={HOME}/sources PKGDEST={HOME}/packages BUILDDIR={HOME}/build PKGEXT=.pkg.tar PACKAGER={BUILDER} \\
  makepkg --force --noconfirm --noprogressbar --nocolor || {{
  echo "makepkg failed; if it misses packages, put them into system.packages of the machine file"
  exit 1
}}
"""
