"""What `train --data` names, and how it comes to the host.

A file or folder of this computer is sent once, under the hash of its content: metal/data/HASH/NAME. A name that
`workload prepare` knows is made into shards on the host, inside the run's unit: metal/data/NAME-TOKENIZER. Both are
complete or not there.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from provision.errors import ProvisionError
from provision.host import Host
from provision.runs import Folder
from provision.transfer import hash_file, human
from provision.units import variables
from workload.config import DataConfig

NAME = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._:-]*(/[A-Za-z0-9][A-Za-z0-9._:@-]*)?"
)  # also hf:OWNER/NAME:CONFIG@COMMIT

Say = Callable[[str], object]

# What arrived is read again: only then it gets its name. rsync has checked what it moved, not what lay there.
SETTLE = r"""
cd "$staging"
if ! sha256sum --check --strict --quiet >&2; then
  rm -rf "$staging"
  echo "$final did not arrive whole" >&2
  exit 1
fi
sync -f .
mkdir -p "${final%/*}"
if [ -e "$final" ]; then rm -rf "$staging"; else mv -T "$staging" "$final"; fi
"""


@dataclass(frozen=True)
class Data:
    """`key`: the path below metal/, or an absolute one of the host; "" where the preset's source is to be read."""

    key: str = ""
    given: str = ""  # data.source instead of a path: "demo"
    files: Mapping[str, Path] = field(default_factory=dict)  # to be sent, by their names below the folder
    sums: Mapping[str, str] = field(default_factory=dict)  # their sha256
    prepare: str = ""  # a name for `workload prepare`

    def source(self, folder: Folder) -> str:
        """data.source of the run; "" for the preset's."""
        return self.given or (str(folder.path / self.key) if self.key else "")

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def find_data(data: str, tokenizer: str, val_fraction: float, say: Say) -> Data:
    """What `data` means: here, on the host, or a name. Raises ProvisionError where it can be none of them."""
    if data in ("", "demo"):
        return Data(given=data)
    path = Path(data).expanduser()
    if path.exists():
        return gather_local(path, say)
    if data.startswith(("/", "~", "./", "../")) or not NAME.fullmatch(data):
        raise ProvisionError(
            f"--data: there is no {data} on this computer.",
            "A file or folder here, or a name that `python -m workload prepare` knows. "
            "What lies on the host already: --set data.source=/its/path",
        )
    # Where another tokenizer or split is wanted, these are other shards.
    slug = re.sub(r"[^A-Za-z0-9._-]", "-", data)
    split = "".join(f"-{word}" for word in split_options(val_fraction)[1:])
    return Data(key=f"data/{slug}-{tokenizer}{split}", prepare=data)


def gather_local(path: Path, say: Say) -> Data:
    """The files of a folder, without hidden ones, or one file; and the hash of it all."""
    if path.is_file():
        files = {path.name: path}
    else:
        files = {}
        for above, folders, names in os.walk(path, followlinks=True):
            folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
            for name in names:
                file = Path(above, name)
                if not name.startswith(".") and file.is_file():
                    files[str(file.relative_to(path))] = file
    odd = [name for name in files if re.search(r"[\n\r\\]", name)]
    if odd or not files:
        what = f"the name {odd[0]!r} cannot be sent" if odd else "there is no file in it"
        raise ProvisionError(f"--data {path}: {what}.")
    size = sum(file.stat().st_size for file in files.values())
    if size > 1e9:
        say(f"reading {human(size)} of {path}")
    sums = {name: hash_file(file) for name, file in sorted(files.items())}
    digest = hashlib.sha256("".join(f"{name}\0{sums[name]}\n" for name in sums).encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9._-]", "-", path.resolve().name) or "data"
    inside = "" if path.is_dir() else f"/{path.name}"
    return Data(key=f"data/{digest}-{name}{inside}", files=files, sums=sums)


def send_data(host: Host, folder: Folder, data: Data, say: Say) -> None:
    """Three execs, of which one is rsync's: what is cut short stays there and is gone on with."""
    final = folder.path / "/".join(PurePosixPath(data.key).parts[:2])
    staging = final.with_name(f".{final.name}.partial")
    say(f"sending {len(data.files)} file{'s' * (len(data.files) != 1)}, {human(data.size)}, to {final}")
    host.run(variables(staging=staging) + 'mkdir -p "$staging"', as_root=False)
    first = next(iter(data.files))
    root = Path(str(data.files[first]).removesuffix(first))
    host.rsync(
        [
            *("--files-from=-", "--from0", "--copy-links", "--times", "--chmod=F644,D755", "--partial"),
            *(f"{root}/", host.remote(staging) + "/"),
        ],
        stdin="".join(f"{name}\0" for name in data.files),
    )
    host.run(
        variables(staging=staging, final=final) + SETTLE,
        stdin="".join(f"{sum} *{name}\n" for name, sum in data.sums.items()).encode(),
        as_root=False,
        deadline_s=24 * 3600,
    )


def prepare_arguments(data: Data, folder: Folder, tokenizer: str, val_fraction: float) -> list[str]:
    """Of `workload prepare`; the folder it makes is the last. [] where nothing is to be prepared."""
    if not data.prepare:
        return []
    options = ["--tokenizer", tokenizer, *split_options(val_fraction)]
    return [data.prepare, *options, "--out", data.source(folder)]


def split_options(val_fraction: float) -> list[str]:
    """Only what a person chose: `prepare` has a default of its own for each kind of source."""
    chosen = val_fraction != DataConfig().val_fraction
    return ["--val-fraction", f"{val_fraction:g}"] if chosen else []
