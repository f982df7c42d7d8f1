"""A local HTTP server of files with ranges and ETags, which can be told to fail in the ways that real ones do."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Objects(dict[str, bytes]):
    """Objects by path; ``fail`` says how many of the next requests for a range fail, and how: a status, ``cut``."""

    def __init__(self) -> None:
        super().__init__()
        self.fail: list[Any] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.delay = 0.0
        self.vanish_after = 0  # requests, after which there is nothing any more; 0: never


@lru_cache(maxsize=64)
def digest(data: bytes) -> str:
    """What an object's ETag is; once an object, and not a request."""
    return hashlib.md5(data).hexdigest()


@contextmanager
def serving() -> Iterator[tuple[Objects, str]]:
    """The objects that are served, and the address of the server."""
    objects = Objects()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            data, ranged = objects.get(self.path.lstrip("/")), self.headers.get("Range")
            objects.requests.append((self.command, self.path, ranged))
            time.sleep(objects.delay)
            if objects.vanish_after and len(objects.requests) > objects.vanish_after:
                data = None
            failure = objects.fail.pop(0) if ranged and objects.fail else None
            if data is None:
                return self.answer(404, b"")
            if isinstance(failure, int):
                return self.answer(failure, b"")
            start, stop = 0, len(data)
            if ranged:
                first, last = ranged.removeprefix("bytes=").split("-")
                start, stop = int(first), min(int(last) + 1, stop)
            headers = {"ETag": f'"{digest(data)}"', "Accept-Ranges": "bytes"}
            headers["Last-Modified"] = "Sat, 28 Nov 2026 12:00:00 GMT"
            if ranged:
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            self.answer(206 if ranged else 200, data[start:stop], headers, cut=failure == "cut")

        def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            if cut:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield objects, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
