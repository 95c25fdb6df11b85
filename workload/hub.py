"""Data sets of the Hugging Face hub: which files are meant, and those files, one by one.

``hf:OWNER/NAME[:CONFIG][@REVISION]``: CONFIG is a configuration that the data set's README names, or a folder in its
repository; REVISION a branch, tag or commit (main). Only files of the split "train" are fetched, when they are needed,
and each is removed when its tokens are safe. A file that the hub's own cache has is used from there.

A download goes on where it was, also in another process: the hub's client keeps no part of a file whose process was
killed, so files come in ranges into ``NAME.part``, and are compared with the repository's checksum when complete.
"""

import hashlib
import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from workload.errors import WorkloadError
from workload.files import hash_file
from workload.sources import (
    KINDS,
    ROWS,
    Source,
    SourceFile,
    choose_training_files,
    is_by_document,
    load_library,
)

# The card of HuggingFaceFW/fineweb: configs sample-10BT … are these folders.
NAMED = {
    "fineweb-10b": "hf:HuggingFaceFW/fineweb:sample/10BT",
    "fineweb-100b": "hf:HuggingFaceFW/fineweb:sample/100BT",
    "fineweb-edu-10b": "hf:HuggingFaceFW/fineweb-edu:sample/10BT",
}
SPEC = re.compile(
    r"hf:(?P<repository>[\w.-]+/[\w.-]+?)(?::(?P<config>[\w./-]+?))?(?:@(?P<revision>[\w./-]+))?"
)
CONVERTED = "refs/convert/parquet"  # where the hub keeps its own parquet of a data set that has none
RANGE_BYTES = 1 << 25  # asked for at once
AHEAD = 2  # units fetched before they are needed
TRIES = 6  # in a row without a byte, with waits of 1, 2, 4 … s between them


def is_named(source: str) -> bool:
    return source in NAMED or source.startswith("hf:")


def open_hub(source: str, downloads: Path) -> Source:
    """The training files of a data set at the commit that its revision is now."""
    spec = SPEC.fullmatch(NAMED.get(source, source))
    if spec is None:
        raise WorkloadError(
            f"{source}: not the name of a data set", "hf:OWNER/NAME, hf:OWNER/NAME:CONFIG, …@REVISION"
        )
    repository, config = spec["repository"], spec["config"] or ""
    revision = spec["revision"] or "main"
    commit, listed = _list(repository, revision)
    if not any(_is_data(name) for name in listed) and not spec["revision"]:
        commit, listed = _list(
            repository, CONVERTED
        )  # a data set of a script, or of a format that we do not read
    names = _choose(source, repository, commit, config, listed, downloads)
    files = choose_training_files([listed[name] for name in names])
    return Source(source, tuple(files), is_by_document(files), repository=repository, revision=commit)


def _list(repository: str, revision: str) -> tuple[str, dict[str, SourceFile]]:
    """(commit, files by name in order); the stamp is "sha256:…" or "git:…"."""
    client = load_library("huggingface_hub", f"hf:{repository}")
    api = client.HfApi(library_name="metal-to-model")
    try:
        commit = str(api.dataset_info(repository, revision=revision).sha)
        tree = api.list_repo_tree(repository, repo_type="dataset", revision=commit, recursive=True)
        found = {}
        for entry in tree:
            if isinstance(entry, client.hf_api.RepoFile):
                stamp = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
                found[entry.path] = SourceFile(entry.path, entry.size, stamp)
    except Exception as error:
        raise _explain(error, f"hf:{repository}@{revision}") from error
    return commit, dict(sorted(found.items()))


def _is_data(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    return KINDS.get(suffix, "tokens") in ROWS or suffix == ".txt"


def _choose(
    source: str, repository: str, commit: str, config: str, listed: dict[str, SourceFile], downloads: Path
) -> list[str]:
    data = [name for name in listed if _is_data(name)]
    if not data:
        suffixes = sorted({Path(name).suffix for name in listed} - {"", ".md", ".gitattributes"})
        raise WorkloadError(
            f"{source}: no .parquet, .jsonl or .txt in it; it has {', '.join(suffixes) or 'no data'}",
            "download it yourself, make .jsonl of it, and prepare that",
        )
    configs = _load_configs(repository, commit, listed, downloads) if "README.md" in listed else {}
    if not config and configs:
        named = [name for name, table in configs.items() if table.get("default") or name == "default"]
        if not named and len(configs) > 1:
            raise WorkloadError(
                f"{source} has {len(configs)} configurations: {_some(list(configs))}",
                f"name one: {source}:{next(iter(configs))}",
            )
        config = (named or list(configs))[0]
    if config in configs:
        chosen = [name for name in data if _is_in_config(name, configs[config])]
    else:
        chosen = [name for name in data if not config or f"/{config.strip('/')}/" in f"/{name}"]
    if not chosen:
        folders = sorted({Path(name).parent.as_posix() for name in data})
        raise WorkloadError(
            f"{source}: no files of {config}; configurations: {_some(list(configs)) or 'none named'}; folders: {_some(folders)}"
        )
    # One format: a data set may have its rows twice.
    suffix = max({Path(name).suffix for name in chosen}, key=lambda s: (s == ".parquet", s))
    return [name for name in chosen if Path(name).suffix == suffix]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (" …" if len(names) > 20 else "")


def _load_configs(
    repository: str, commit: str, listed: dict[str, SourceFile], downloads: Path
) -> dict[str, dict[str, Any]]:
    """`configs` at the head of the README by name (hub's documentation, "Manual configuration")."""
    client = load_library("huggingface_hub", f"hf:{repository}")
    path = fetch(repository, commit, listed["README.md"], downloads)
    try:
        head = client.metadata_load(path) or {}
    except Exception:  # a README whose head is not YAML names nothing
        head = {}
    tables = head.get("configs") or []
    return {
        str(table["config_name"]): table
        for table in tables
        if isinstance(table, dict) and "config_name" in table
    }


def _is_in_config(name: str, table: dict[str, Any]) -> bool:
    """Whether a file is of the training split of a configuration."""
    entries = table.get("data_files")
    folder = str(table.get("data_dir", "")).strip("/")
    prefix = f"{folder}/" if folder and folder != "." else ""
    if entries is None:
        return name.startswith(prefix)
    entries = entries if isinstance(entries, list) else [entries]
    splits = [entry for entry in entries if isinstance(entry, dict) and "split" in entry]
    training = [entry for entry in splits if entry["split"] == "train"] or splits
    paths: list[str] = []
    for entry in training if splits else entries:
        path = entry["path"] if isinstance(entry, dict) else entry
        paths += [str(p) for p in (path if isinstance(path, list) else [path])]
    return any(_matches(name, prefix + path.removeprefix("./")) for path in paths)


def _matches(name: str, pattern: str) -> bool:
    """As shells do: * within a folder, ** across folders."""
    parts = re.split(r"(\*\*/?|\*|\?)", pattern)
    means = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.fullmatch("".join(means.get(part, re.escape(part)) for part in parts), name) is not None


def place(downloads: Path, file: SourceFile) -> Path:
    """Named by its content, so what lies there is right for whoever asks."""
    return downloads / f"{file.stamp.partition(':')[2]}{Path(file.name).suffix}"


def forget(downloads: Path, file: SourceFile) -> None:
    """Remove a file whose tokens are safe."""
    place(downloads, file).unlink(missing_ok=True)


def fetch(
    repository: str, commit: str, file: SourceFile, downloads: Path, stop: threading.Event | None = None
) -> Path:
    """The file, from the hub's cache, or downloaded, going on where an earlier download was; its checksum is right."""
    client = load_library("huggingface_hub", f"hf:{repository}")
    stop = stop or threading.Event()
    path = place(downloads, file)
    if path.exists():  # renamed when its checksum was right
        return path
    cached = client.try_to_load_from_cache(repository, file.name, revision=commit, repo_type="dataset")
    if isinstance(cached, str):
        return Path(cached)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.touch()
    url = client.hf_hub_url(repository, file.name, repo_type="dataset", revision=commit)
    failures = 0
    while (have := part.stat().st_size) < file.size:
        try:
            data = _fetch_range(client, url, have, min(file.size, have + RANGE_BYTES))
        except Exception as error:
            failures += 1
            # A person who stops does not wait for a network that is gone.
            if failures == TRIES or not _may_pass(error) or stop.wait(2.0 ** (failures - 1)):
                raise _explain(error, f"{file.name} of hf:{repository}") from error
            continue
        failures = 0
        with part.open("ab") as out:
            out.write(data)
        if stop.is_set():
            raise WorkloadError(f"{file.name} of hf:{repository}: stopped", "the same command goes on")
    if _digest(part, file.stamp) != file.stamp:
        part.unlink()
        raise WorkloadError(
            f"{file.name} of hf:{repository}: what was downloaded is not {file.stamp}",
            "it is removed; the same command downloads it again",
        )
    part.rename(path)
    return path


def _fetch_range(client: Any, url: str, begin: int, end: int) -> bytes:
    """Bytes begin … end - 1 of a file."""
    headers = client.utils.build_hf_headers(library_name="metal-to-model")
    response = client.get_session().get(
        url,
        headers={**headers, "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"},
        timeout=60,
    )
    client.utils.hf_raise_for_status(response)
    data = bytes(response.content)
    if response.status_code == 200:  # a server that does not know ranges sends all of it
        data = data[begin:end]
    if not data or len(data) > end - begin:
        raise ConnectionError(f"{len(data)} bytes came instead of {end - begin}")
    return data


def _digest(path: Path, stamp: str) -> str:
    if stamp.startswith("sha256:"):
        return f"sha256:{hash_file(path)}"
    data = path.read_bytes()  # not in LFS: small
    blob = b"blob %d\0" % len(data) + data
    return f"git:{hashlib.sha1(blob, usedforsecurity=False).hexdigest()}"


def _may_pass(error: Exception) -> bool:
    """Whether asking again may help: the network's errors and a server's troubles, but not its no."""
    status = _status(error)
    if status:
        return status >= 500 or status in (408, 429)
    return _is_network(error)


def _status(error: Exception) -> int:
    """Of the server's answer; 0: there was none."""
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _is_network(error: Exception) -> bool:
    # The client's own client has been another with each of its major versions.
    kind = type(error).__module__.partition(".")[0]
    return kind in ("httpx", "httpx2", "requests", "urllib3") or isinstance(
        error, ConnectionError | TimeoutError
    )


def _explain(error: Exception, what: str) -> Exception:
    """The client's error as one of ours; what is none of the network's as it is."""
    status = _status(error)
    if status in (401, 403):
        return WorkloadError(
            f"{what}: it does not exist, or one must be allowed to read it",
            "check the name; then accept its terms on huggingface.co, and: hf auth login",
        )
    if status == 404:
        return WorkloadError(
            f"{what}: there is no such data set, revision or file on the hub", "check the name"
        )
    if status or _is_network(error):
        said = (str(error) or type(error).__name__).splitlines()[0]
        return WorkloadError(
            f"{what}: the hub cannot be reached: {said}",
            "the same command goes on; or download it elsewhere and prepare the folder",
        )
    return error


class Fetcher:
    """Files of units, fetched a little ahead of their use; those of a folder are simply there."""

    def __init__(
        self, source: Source, units: Sequence[tuple[SourceFile, ...]], downloads: Path, first: int
    ) -> None:
        self._source, self._units, self._downloads, self._first = source, units, downloads, first
        self._threads = (
            ThreadPoolExecutor(AHEAD + 1, thread_name_prefix="download") if source.repository else None
        )
        self._stop = threading.Event()
        self._fetching: dict[int, Future[list[Path]]] = {}

    def is_ready(self, unit: int) -> bool:
        if self._threads is None:
            return True
        self._begin(unit)
        return self._fetching[unit].done()

    def take(self, unit: int) -> list[Path]:
        """Where the files of a unit are; waits for them, and raises what fetching them raised."""
        if self._threads is None:
            folder = self._source.folder
            return [folder / file.name for file in self._units[unit] if folder is not None]
        self._begin(unit)
        return self._fetching.pop(unit).result()

    def describe(self, unit: int) -> str:
        """What is waited for."""
        file = next((f for f in self._units[unit] if not place(self._downloads, f).exists()), None)
        if file is None:
            return ""
        path = place(self._downloads, file)
        part = path.with_name(f"{path.name}.part")
        have = part.stat().st_size if part.exists() else 0
        return f"downloading {file.name}, {have / 1e6:,.0f} of {file.size / 1e6:,.0f} MB"

    def _begin(self, unit: int) -> None:
        assert self._threads is not None
        for i in range(unit, min(unit + AHEAD + 1, len(self._units))):
            if i not in self._fetching and i >= self._first:
                self._fetching[i] = self._threads.submit(self._fetch, i)
        self._first = max(self._first, min(unit + AHEAD + 1, len(self._units)))

    def _fetch(self, unit: int) -> list[Path]:
        source = self._source
        return [
            fetch(source.repository, source.revision, file, self._downloads, self._stop)
            for file in self._units[unit]
        ]

    def __enter__(self) -> "Fetcher":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
