"""Files elsewhere: http(s), S3, Google, Azure and R2 by obstore, ``hf://`` by huggingface_hub; pages of them are kept on disk.

A page that was read is a file in a cache folder, written whole or not at all, so that any number of processes share it. An
object that is changed while a run reads it is noticed by its ETag. Failed requests are repeated with growing pauses.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from olmo_fn.files import filling

T = TypeVar("T")
PAGE = 1 << 18  # bytes: what a request takes about as long to answer as to send
SCHEMES = {
    "http": "",
    "https": "",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_ENDPOINT_URL for another server than Amazon's)",
    "r2": "R2_ENDPOINT_URL, R2_ACCESS_KEY_ID and R2_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "hf": "HF_TOKEN",
}
RETRIES = 6
SECONDS = 30


@dataclass(frozen=True)
class Remote:
    """An object of a store: its size in bytes and what tells its content from another (ETag); where its pages are kept."""

    url: str
    size: int
    tag: str
    folder: Path | None = None
    """Where pages are kept; None keeps none."""
    limit: int = 0
    """Bytes that all pages in the folder may have."""

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` to before ``stop``. ValueError names what cannot be read, or has changed."""
        return self.read_all([(start, stop)])[0]

    def read_all(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several ranges at once: what is not kept is asked for in one go."""
        ranges = [(start, min(stop, self.size)) for start, stop in ranges]
        if self.folder is None:
            return list(_pool().map(lambda one: get(self, *one), ranges))
        pages = sorted({n for start, stop in ranges for n in range(start // PAGE, -(-stop // PAGE))})
        kept = {n: self._kept(n) for n in pages}
        missing = [n for n, data in kept.items() if data is None]
        for n, data in zip(missing, _pool().map(self._fetch, missing), strict=True):
            kept[n] = data

        def part(start: int, stop: int) -> bytes:
            first = start // PAGE
            whole = b"".join(kept[n] or b"" for n in range(first, -(-stop // PAGE)))
            return whole[start - first * PAGE : stop - first * PAGE]

        return [part(*one) for one in ranges]

    def _fetch(self, n: int) -> bytes:
        data = get(self, n * PAGE, min((n + 1) * PAGE, self.size))
        self._keep(n, data)
        return data

    @property
    def place(self) -> Path:
        """The folder of its pages."""
        assert self.folder is not None
        return self.folder / hashlib.sha256(f"{self.url}\n{self.tag}\n{self.size}".encode()).hexdigest()[:32]

    def _kept(self, n: int) -> bytes | None:
        path = self.place / str(n)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if len(data) != min(PAGE, self.size - n * PAGE):  # cut off by a full disk
            return None
        with suppress(OSError):
            os.utime(path)  # used just now
        return data

    def _keep(self, n: int, data: bytes) -> None:
        try:
            with filling(self.place / str(n)) as file:
                file.write(data)
        except OSError as error:  # a full disk: the run goes on without
            warnings.warn(
                f"{self.folder} cannot keep pages of {self.url} ({error.strerror}): they are read again", stacklevel=2
            )
            return
        if n % 64 == 0:
            trim(self.folder, self.limit)


def trim(folder: Path | None, limit: int) -> int:
    """Delete pages in ``folder``, those used least recently first, down to ``limit`` bytes; returns the bytes that are left."""
    found = []
    for path in folder.glob("*/*") if folder else ():
        with suppress(OSError):
            stat = path.stat()
            found.append((stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size
    return total


def is_remote(path: str) -> bool:
    """Whether ``path`` is the address of a store. ValueError for a scheme that is none.

    >>> is_remote("s3://bucket/a.npy"), is_remote("runs/a.npy")
    (True, False)
    """
    scheme, there, _ = path.partition("://")
    if there and scheme not in SCHEMES:
        raise ValueError(f"{path!r}: {scheme}:// is nothing that is read; there are {', '.join(f'{s}://' for s in SCHEMES)}")
    return bool(there)


def head(url: str, folder: Path | None = None, limit: int = 0) -> Remote:
    """The object at ``url``. ValueError if it is not there or cannot be read, with what to set."""
    with answered(url):
        if url.startswith("hf://"):
            info = _hugging_face().info(url)
            return Remote(url, info["size"], str(info.get("blob_id") or info.get("etag") or info["size"]), folder, limit)
        store, path = store_of(url)
        import obstore

        meta = obstore.head(store, path)
        return Remote(url, meta["size"], str(meta["e_tag"] or meta["last_modified"]), folder, limit)


def read_whole(path: str) -> bytes:
    """A small file, on a disk or in a store. OSError for one on a disk that cannot be read, ValueError as `head` for others.

    >>> read_whole("/dev/null")
    b''
    """
    if not is_remote(path):
        return Path(path).read_bytes()
    remote = head(path)
    return remote.read(0, remote.size)


def get(remote: Remote, start: int, stop: int) -> bytes:
    """Bytes of an object, by one request. ValueError as `head`, and for an object that is another than it was."""
    if stop <= start:
        return b""
    with answered(remote.url):
        if remote.url.startswith("hf://"):
            found: bytes = _hugging_face().cat_file(remote.url, start=start, end=stop)
            return found
        store, path = store_of(remote.url)
        import obstore

        result = obstore.get(store, path, options={"range": (start, stop)})
        meta = result.meta
        if (str(meta["e_tag"] or meta["last_modified"]), meta["size"]) != (remote.tag, remote.size):
            raise ValueError(
                f"{remote.url} has changed since the run opened it (ETag {remote.tag}, now {meta['e_tag']}); put the "
                "old one back, or begin another run"
            )
        return bytes(result.bytes())


def listed(pattern: str) -> list[str]:
    """The objects that ``pattern`` names, sorted: one address, or a glob, which http has not."""
    scheme, _, rest = pattern.partition("://")
    if not any(c in rest for c in "*?["):
        return [pattern]
    if scheme in ("http", "https"):
        raise ValueError(f"{pattern!r}: http cannot list files; name each, or give a --data.mix file of lines label,path")
    with answered(pattern):
        if scheme == "hf":
            return sorted(f"hf://{name}" for name in _hugging_face().glob(pattern))
        import obstore

        fixed = rest[: min(rest.find(c) for c in "*?[" if c in rest)].rpartition("/")[0]
        store, prefix = store_of(f"{scheme}://{fixed}/")
        root = f"{scheme}://{rest.partition('/')[0]}"
        names = [f"{root}/{meta['path']}" for batch in obstore.list(store, prefix or None) for meta in batch]
        return sorted(name for name in names if fnmatch.fnmatchcase(name, pattern))


def each(function: Callable[[str], T], paths: Sequence[str]) -> list[T]:
    """``function`` of each of the ``paths``; if some are in a store many at once, so that thousands take little time.

    >>> each(len, ["ab", "c"])
    [2, 1]
    """
    if not any(map(is_remote, paths)):
        return [*map(function, paths)]
    with ThreadPoolExecutor(32, "store") as pool:  # not that of the pages, which what is called here may wait for
        return list(pool.map(function, paths))


class NotShown(ValueError):
    """A store has no such object, or does not let it be read."""


@contextmanager
def answered(url: str) -> Iterator[None]:
    """Turn what a store says into one line, a ValueError: what was asked, what is wrong, what to set."""
    try:
        yield
    except FileNotFoundError:
        raise NotShown(f"{url} is not there") from None
    except (ValueError, ImportError):
        raise
    except Exception as error:  # obstore and fsspec have errors of their own, and so have their libraries
        text = " ".join(str(error).split("Debug source")[0].split())
        denied = type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError", "GatedRepoError")
        scheme = url.partition("://")[0]
        hint = f"; set {SCHEMES[scheme]}" if SCHEMES[scheme] and (denied or "credential" in text.lower()) else ""
        raise (NotShown if denied else ValueError)(f"cannot read {url}: {text[:300]}{hint}") from None


def store_of(url: str) -> tuple[Any, str]:
    """The store of an address, and the path in it."""
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    if scheme in ("r2", "s3", "gs", "az") and not bucket:
        raise ValueError(f"{url!r} names no bucket: {scheme}://BUCKET/PATH")
    return _store(scheme, bucket, os.environ.get("AWS_ENDPOINT_URL", "")), path


@lru_cache(maxsize=64)
def _store(scheme: str, bucket: str, endpoint: str) -> Any:
    try:
        from obstore import store
    except ImportError:
        raise ValueError(f"reading {scheme}:// needs obstore: pip install 'olmo-fn[remote]'") from None
    common: dict[str, Any] = {
        "client_options": {"allow_http": True, "timeout": timedelta(seconds=SECONDS), "connect_timeout": timedelta(seconds=10)},
        "retry_config": {
            "max_retries": RETRIES,
            "retry_timeout": timedelta(seconds=4 * SECONDS),
            "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
        },
    }
    env = os.environ
    if scheme in ("http", "https"):
        return store.from_url(f"{scheme}://{bucket}/", **common)
    if scheme == "gs":
        return store.GCSStore(bucket, skip_signature="GOOGLE_APPLICATION_CREDENTIALS" not in env, **common)
    if scheme == "az":
        return store.AzureStore(bucket, skip_signature="AZURE_STORAGE_ACCOUNT_KEY" not in env, **common)
    keys = "R2" if scheme == "r2" else "AWS"
    signed = (
        f"{keys}_ACCESS_KEY_ID" in env
        or "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI" in env
        or "AWS_WEB_IDENTITY_TOKEN_FILE" in env
    )
    options: dict[str, Any] = {
        "skip_signature": not signed,
        "region": env.get("AWS_REGION", "auto" if keys == "R2" else "us-east-1"),
    }
    if scheme == "r2":
        if "R2_ENDPOINT_URL" not in env:
            raise ValueError(f"r2:// needs {SCHEMES['r2']}; R2_ENDPOINT_URL is not set")
        options |= {"endpoint": env["R2_ENDPOINT_URL"], "access_key_id": env.get("R2_ACCESS_KEY_ID", "")}
        options |= {"secret_access_key": env.get("R2_SECRET_ACCESS_KEY", "")}
    elif endpoint:
        options["endpoint"] = endpoint
    return store.S3Store(bucket, **options, **common)


@lru_cache(maxsize=1)
def _hugging_face() -> Any:
    try:
        from huggingface_hub import HfFileSystem
    except ImportError:
        raise ValueError("reading hf:// needs huggingface_hub: pip install 'olmo-fn[remote]'") from None
    return HfFileSystem()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(32, "pages")
