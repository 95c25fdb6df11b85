"""Repository and wheels over HTTP, on loopback: QEMU's guests reach it as 10.0.2.2."""

import http.server
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from provision.rehearsal.qemu import GUEST_SEES_HOST_AS, LOOPBACK


class Server:
    """Serves folders below names: `/repository/…`, `/wheels/…`. One request a line goes to the log.

    `port`: where it is free, so that a machine that was told of it finds the server of the next command there too.
    """

    def __init__(self, folders: Mapping[str, Path], log: Path, port: int = 0) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        handler = partial(Handler, folders=dict(folders), log=log)
        try:
            self.http = http.server.ThreadingHTTPServer((LOOPBACK, port), handler)
        except OSError:
            self.http = http.server.ThreadingHTTPServer((LOOPBACK, 0), handler)
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    def url(self, name: str) -> str:
        """Where the guest finds a folder."""
        return f"http://{GUEST_SEES_HOST_AS}:{self.http.server_port}/{name}"

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files and listings of a few folders, nothing above them."""

    def __init__(self, *args: Any, folders: Mapping[str, Path], log: Path) -> None:
        self.folders = folders
        self.log = log
        super().__init__(*args)

    def translate_path(self, path: str) -> str:
        parts = [part for part in unquote(urlsplit(path).path).split("/") if part]
        if not parts or parts[0] not in self.folders or ".." in parts:
            return "/nonexistent"
        return str(self.folders[parts[0]].joinpath(*parts[1:])) + ("/" if path.endswith("/") else "")

    def copyfile(self, source: Any, outputfile: Any) -> None:
        with suppress(ConnectionError):  # a guest whose power was cut
            super().copyfile(source, outputfile)

    def log_message(self, format: str, *args: Any) -> None:
        with self.log.open("a") as log:
            log.write(f"{self.log_date_time_string()} {format % args}\n")
