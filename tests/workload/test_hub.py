"""Data sets of the hub: the real client of huggingface_hub against a server of this machine that stands in for it.

The server is a mock: it answers the four kinds of request that the client and we make (a revision's commit, the list of
files, a file's bytes by range, the README), as huggingface.co answered when this was written, and no others.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("huggingface_hub")
pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

from workload import hub  # noqa: E402
from workload.data import load_meta  # noqa: E402
from workload.errors import WorkloadError  # noqa: E402
from workload.hub import _matches, open_hub  # noqa: E402
from workload.prepare import prepare  # noqa: E402

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL: dict[str, Any] = {"tokenizer": "bytes", "val_fraction": 0.2, "piece_bytes": 3000, "shard_tokens": 7000}


class Hub:
    """A data set "owner/name" with `files`; what was asked for, and faults to have."""

    def __init__(self, files: dict[str, bytes], revisions: dict[str, dict[str, bytes]] | None = None) -> None:
        self.trees = {COMMIT: files}
        self.commits = {"main": COMMIT, COMMIT: COMMIT}
        for i, (name, tree) in enumerate((revisions or {}).items()):
            commit = f"{i:040x}"
            self.commits |= {name: commit, commit: commit}
            self.trees[commit] = tree
        self.asked: list[tuple[str, str]] = []  # (path, range)
        self.cut_after = 0  # bytes of an answer after which the connection ends, once a byte position
        self.status = 0  # that every file has instead
        self.flip = False  # a bit of every file
        self.slow_s = 0.0  # before every answer with a file
        self._cut: set[tuple[str, str]] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append((path, request.headers.get("Range", "")))
        parts = path.strip("/").split("/")
        if parts[:4] == ["api", "datasets", "owner", "name"] and len(parts) > 5:
            commit = self.commits.get("/".join(parts[5:]))
            if commit is None:
                self._send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif parts[4] == "revision":
                about = {
                    "id": "owner/name",
                    "sha": commit,
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                }
                self._send(request, 200, json.dumps({**about, "siblings": []}).encode())
            else:
                self._send(request, 200, json.dumps(self._tree(commit)).encode())
        elif parts[:3] == ["datasets", "owner", "name"]:
            self._send_file(request, self.trees[parts[4]]["/".join(parts[5:])])
        else:
            self._send(request, 401, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _tree(self, commit: str) -> list[dict[str, object]]:
        entries: list[dict[str, object]] = []
        for name, data in sorted(self.trees[commit].items()):
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": blob}
            if not name.endswith((".md", ".txt")):
                entry["lfs"] = {
                    "oid": hashlib.sha256(data).hexdigest(),
                    "size": len(data),
                    "pointerSize": 130,
                }
            entries.append(entry)
        return entries

    def _send_file(self, request: BaseHTTPRequestHandler, data: bytes) -> None:
        threading.Event().wait(self.slow_s)
        if self.status:
            self._send(
                request, self.status, b"{}", {"X-Error-Code": "GatedRepo"} if self.status == 403 else {}
            )
            return
        begin, end = (int(n) for n in request.headers["Range"].removeprefix("bytes=").split("-"))
        part = bytearray(data[begin : end + 1])
        if self.flip:
            part[0] ^= 1
        request.send_response(206)
        request.send_header("Content-Length", str(len(part)))
        request.end_headers()
        asked = (request.path, request.headers["Range"])
        if self.cut_after and asked not in self._cut:
            self._cut.add(asked)
            request.wfile.write(part[: self.cut_after])
            request.wfile.flush()
            request.close_connection = True
            request.connection.shutdown(2)
            return
        request.wfile.write(part)

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def ranges(self, name: str) -> list[str]:
        return [wanted for path, wanted in self.asked if path.endswith(f"/{name}")]


def rows(n: int, first: int = 0) -> bytes:
    """A real parquet file."""
    sink = pyarrow.BufferOutputStream()
    texts = [f"document {i}: {'words and more ' * (i % 13)}" for i in range(first, first + n)]
    parquet.write_table(pyarrow.table({"id": list(range(n)), "text": texts}), sink, row_group_size=20)
    return bytes(sink.getvalue())


FILES = {
    "README.md": b"---\nlicense: mit\n---\nwords\n",
    "data/train-00000-of-00002.parquet": rows(150),
    "data/train-00001-of-00002.parquet": rows(150, 150),
    "data/test-00000-of-00001.parquet": rows(50, 1000),
    "extra/more.bin": b"?" * 1000,
}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Makes a Hub that the client takes for the real one."""
    made: list[Hub] = []

    def make(*arguments: Any) -> Hub:
        server = Hub(*arguments)
        made.append(server)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(
            "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        return server

    monkeypatch.setattr(hub, "RANGE_BYTES", 1000)
    yield make
    for server in made:
        server.server.shutdown()
        server.server.server_close()


def names(source: str, tmp_path: Path) -> list[str]:
    return [file.name for file in open_hub(source, tmp_path / "downloads").files]


def test_a_data_set_is_the_shards_of_its_files(serve: Any, tmp_path: Path) -> None:
    server = serve(FILES)
    meta = prepare("hf:owner/name", tmp_path / "out", **SMALL)
    (tmp_path / "local").mkdir()
    for i in range(2):
        name = f"train-0000{i}-of-00002.parquet"
        (tmp_path / "local" / name).write_bytes(FILES[f"data/{name}"])
    local = prepare(str(tmp_path / "local"), tmp_path / "other", **SMALL)
    assert meta["shards"] == local["shards"]
    assert meta["train_documents"] + meta["val_documents"] == 300
    assert (meta["repository"], meta["revision"]) == ("owner/name", COMMIT)
    assert not server.ranges("test-00000-of-00001.parquet")  # only what is needed
    assert not server.ranges("more.bin")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*meta["shards"], "meta.json"]
    )


def test_a_connection_that_ends_in_a_file_goes_on_there(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.threading.Event, "wait", lambda self, timeout=None: self.is_set())
    server = serve(FILES)
    server.cut_after = 10
    meta = prepare("hf:owner/name", tmp_path / "out", **SMALL)
    assert meta["train_documents"] + meta["val_documents"] == 300
    wanted = server.ranges("train-00000-of-00002.parquet")
    assert wanted[0] == wanted[1] == "bytes=0-999"  # asked again
    assert len(wanted) == 2 * -(-len(FILES["data/train-00000-of-00002.parquet"]) // 1000)


KILLED = """
import sys
from pathlib import Path
import huggingface_hub
from workload import hub
from workload.prepare import prepare
hub.RANGE_BYTES = 1000
prepare("hf:owner/name", Path(sys.argv[1]), tokenizer="bytes", val_fraction=0.2, piece_bytes=3000, shard_tokens=7000,
        journal_s=0.0, watch=lambda seen: print(seen.tokens, flush=True))
"""


def test_a_download_goes_on_after_kill_9(serve: Any, tmp_path: Path) -> None:
    server = serve(FILES)
    prepare("hf:owner/name", tmp_path / "whole", **SMALL)
    server.asked.clear()
    server.slow_s = 0.1
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    for enough in (5, 12):  # ranges: in the first files, and later
        command = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "out")], env=environment, stdout=subprocess.DEVNULL
        )
        try:
            while sum(bool(wanted) for _, wanted in server.asked) < enough:
                assert command.poll() is None
                threading.Event().wait(0.02)
        finally:
            command.send_signal(signal.SIGKILL)
            command.wait()
        assert not (tmp_path / "out").exists()
    server.slow_s = 0.0
    subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "out")], env=environment, check=True, timeout=120
    )
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    # One range may have been under way at each kill in each of the threads; nothing else came twice.
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"):
        wanted = server.ranges(name)
        assert len(wanted) - len(set(wanted)) <= 2
    # The list was asked for once: what is meant by main was decided when it was begun.
    assert len([path for path, _ in server.asked if "/tree/" in path]) == 1


def test_a_download_is_shown_and_can_be_stopped(serve: Any, tmp_path: Path) -> None:
    server = serve(FILES)
    server.slow_s = 0.2
    seen: list[Any] = []
    with pytest.raises(WorkloadError, match="stopped after 0 tokens"):
        prepare(
            "hf:owner/name", tmp_path / "out", watch=seen.append, should_stop=lambda: len(seen) > 3, **SMALL
        )
    assert seen[-1].waiting.startswith("downloading data/train-00000-of-00002.parquet, ")
    assert seen[-1].waiting.endswith("of 0 MB")
    server.slow_s = 0.0
    prepare("hf:owner/name", tmp_path / "out", **SMALL)


def test_files_are_removed_when_their_tokens_are_safe(serve: Any, tmp_path: Path) -> None:
    serve({f"train-{i}.parquet": rows(30, 30 * i) for i in range(8)})
    most = 0

    def watch(_: object) -> None:
        nonlocal most
        most = max(most, len(list((tmp_path / ".out.partial" / "downloads").glob("*.parquet"))))

    prepare("hf:owner/name", tmp_path / "out", journal_s=0.0, watch=watch, **{**SMALL, "piece_bytes": 1000})
    assert 0 < most <= hub.AHEAD + 2


def test_a_limit_of_tokens_leaves_files_where_they_are(serve: Any, tmp_path: Path) -> None:
    server = serve({f"train-{i}.parquet": rows(30, 30 * i) for i in range(8)})
    meta = prepare("hf:owner/name", tmp_path / "out", tokens=2000, **{**SMALL, "piece_bytes": 1000})
    assert meta["train_tokens"] == 2000
    assert not server.ranges("train-7.parquet")


README = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
  - split: test
    path: sample/test/*
- config_name: whole
  data_dir: data
---
"""


def test_configurations_are_the_readmes_or_folders(serve: Any, tmp_path: Path) -> None:
    files = {
        name: b"x"
        for name in ("data/a/1.parquet", "data/2.parquet", "sample/10BT/3.parquet", "sample/test/4.parquet")
    }
    server = serve({"README.md": README, **files})
    assert names("hf:owner/name", tmp_path) == ["data/a/1.parquet"]
    assert names("hf:owner/name:sample-10BT", tmp_path) == ["sample/10BT/3.parquet"]
    assert names("hf:owner/name:sample/10BT", tmp_path) == ["sample/10BT/3.parquet"]
    assert names("hf:owner/name:whole", tmp_path) == ["data/2.parquet", "data/a/1.parquet"]
    assert names(f"hf:owner/name:whole@{COMMIT}", tmp_path) == ["data/2.parquet", "data/a/1.parquet"]
    with pytest.raises(
        WorkloadError, match="no files of sample-1BT; configurations: default, sample-10BT, whole"
    ):
        names("hf:owner/name:sample-1BT", tmp_path)
    server.trees[COMMIT]["README.md"] = README.replace(b"default", b"first")
    with pytest.raises(WorkloadError, match="has 3 configurations: first, sample-10BT, whole") as caught:
        names("hf:owner/name", tmp_path)
    assert "hf:owner/name:first" in caught.value.hint


def test_fineweb_is_its_sample(monkeypatch: pytest.MonkeyPatch, serve: Any, tmp_path: Path) -> None:
    """FineWeb itself cannot be here: a repository with its folders stands in, under another name."""
    serve(
        {
            "sample/10BT/000_00000.parquet": b"x",
            "sample/100BT/000_00000.parquet": b"x",
            "data/CC/0.parquet": b"x",
        }
    )
    assert hub.NAMED["fineweb-10b"] == "hf:HuggingFaceFW/fineweb:sample/10BT"
    monkeypatch.setitem(hub.NAMED, "fineweb-10b", "hf:owner/name:sample/10BT")
    assert names("fineweb-10b", tmp_path) == ["sample/10BT/000_00000.parquet"]


def test_the_hubs_own_parquet_is_taken_where_there_is_none(serve: Any, tmp_path: Path) -> None:
    converted = {"default/train/0000.parquet": rows(9), "default/test/0000.parquet": rows(9)}
    serve({"README.md": b"", "script.py": b"", "data.zip": b""}, {"refs/convert/parquet": converted})
    assert names("hf:owner/name", tmp_path) == ["default/train/0000.parquet"]
    with pytest.raises(WorkloadError, match=r"no .parquet, .jsonl or .txt in it; it has .py, .zip"):
        names("hf:owner/name@main", tmp_path)


def test_a_file_in_the_hubs_cache_is_not_downloaded(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "data/train-00000-of-00002.parquet"
    server = serve(FILES)
    path = tmp_path / "elsewhere.parquet"
    path.write_bytes(FILES[name])
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repository, file, **_: str(path) if file == name else None,
    )
    prepare("hf:owner/name", tmp_path / "out", **SMALL)
    assert not server.ranges("train-00000-of-00002.parquet")
    assert server.ranges("train-00001-of-00002.parquet")
    assert path.exists()  # not ours to remove


def refused(source: str, tmp_path: Path) -> str:
    with pytest.raises(WorkloadError) as caught:
        prepare(source, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_what_the_hub_refuses_is_said(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(FILES)
    assert "hf:owner/other@main: it does not exist, or one must be allowed" in refused(
        "hf:owner/other", tmp_path
    )
    assert "hf:owner/name@v9: there is no such data set, revision or file" in refused(
        "hf:owner/name@v9", tmp_path
    )
    server.status = 403
    assert "hf auth login" in refused("hf:owner/name", tmp_path)
    server.status = 0
    server.flip = True
    assert "what was downloaded is not " in refused("hf:owner/name", tmp_path)
    assert "it is removed; the same command downloads it again" in refused("hf:owner/name", tmp_path)
    server.flip = False
    prepare("hf:owner/name", tmp_path / "out", **SMALL)


def test_a_network_that_is_gone_is_said_and_the_command_goes_on_later(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "TRIES", 2)
    monkeypatch.setattr(hub.threading.Event, "wait", lambda self, timeout=None: self.is_set())
    server = serve(FILES)
    server.status = 503
    assert "the hub cannot be reached: " in refused("hf:owner/name", tmp_path)
    server.status = 0
    prepare("hf:owner/name", tmp_path / "out", **SMALL)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    said = refused("hf:owner/else", tmp_path / "later")
    assert "the hub cannot be reached: " in said
    assert "the same command goes on" in said
    assert load_meta(tmp_path / "out")["revision"] == COMMIT


def test_a_missing_client_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as where it is not installed
    said = refused("hf:owner/name", tmp_path)
    assert "hf:owner/name needs huggingface_hub, which cannot be loaded" in said
    assert "pip install 'metal-to-model[data]'" in said


@pytest.mark.parametrize(
    ("pattern", "name", "does"),
    [
        ("data/*/*", "data/a/1.parquet", True),
        ("data/*/*", "data/1.parquet", False),
        ("*.parquet", "a/1.parquet", False),
        ("**/*.parquet", "a/b/1.parquet", True),
        ("**/*.parquet", "1.parquet", True),
        ("**", "a/b", True),
        ("train-?.jsonl", "train-1.jsonl", True),
        ("a.b", "axb", False),
    ],
)
def test_patterns_of_a_readme(pattern: str, name: str, does: bool) -> None:
    assert _matches(name, pattern) is does
