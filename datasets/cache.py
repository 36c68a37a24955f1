"""An exact cache: resized images and their labels in one memory-mapped file.

File: magic, number of samples, then per sample (offset, H, W) as int64, then per sample the image
(3, H, W) and the label (ceil(H/4), ceil(W/4)), or (H, W), as uint8. It is written aside and renamed when
whole, under a lock, so a killed build leaves nothing that could be taken for a cache, and of two
processes one builds and the other waits. Its name holds a hash of the settings and of every source
file's path, size and time: a changed source makes a new cache, which replaces the old one.
"""

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import track

from datasets.transforms import label_size
from errors import UserError

_MAGIC = b"TransKD1"
_MARGIN = 256 * 2**20
"""Bytes of the disk to leave free."""


def default_cache_dir() -> Path:
    """The environment variable TRANSKD_CACHE, or ~/.cache/transkd."""
    return Path(os.environ.get("TRANSKD_CACHE") or Path.home() / ".cache" / "transkd")


class Cache:
    """Reads a whole cache file; `cache[i]` is (image, label), read-only views of the file.

    `full` says that the labels have their images' size.
    """

    def __init__(self, path: Path, *, full: bool = False) -> None:
        self.path, self.full = path, full
        self._bytes = np.asarray(np.memmap(path, np.uint8, "r"))
        if len(self._bytes) < 16 or self._bytes[:8].tobytes() != _MAGIC:
            raise ValueError(f"{path} is no cache")
        count = int(self._bytes[8:16].view(np.int64)[0])
        if count < 1:
            raise ValueError(f"{path} holds nothing")
        self._index = self._bytes[16 : 16 + 24 * count].view(np.int64).reshape(count, 3)
        offset, height, width = (int(number) for number in self._index[-1])
        if len(self._bytes) != offset + _sample_bytes(height, width, full):
            raise ValueError(f"{path} is not whole")

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Cache, full=self.full), (self.path,)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        offset, height, width = (int(number) for number in self._index[index])
        middle, end = offset + 3 * height * width, offset + _sample_bytes(height, width, self.full)
        image = self._bytes[offset:middle].reshape(3, height, width)
        return image, self._bytes[middle:end].reshape(label_size((height, width), full=self.full))


def fingerprint(files: Sequence[Path], *settings: object) -> str:
    """Hash of the settings and of every file's path, size and modification time."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        digest.update(
            f"{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(
                errors="surrogateescape"
            )
        )
    return digest.hexdigest()[:20]


class Source(Protocol):
    """What is cached. Both methods are called from several threads."""

    full_labels: bool
    """Whether `read` returns labels of the images' size."""

    def __len__(self) -> int: ...

    def size(self, index: int) -> tuple[int, int]:
        """(H, W) of the image that `read` will return."""

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (3, H, W) and label (ceil(H/4), ceil(W/4)) or (H, W), uint8."""


def open_cache(directory: Path, identity: str, version: str, source: Source) -> Cache | None:
    """The cache `identity`-`version` in `directory`, built first if it is not there.

    `identity` names what is cached and `version` its present state: other versions are deleted.
    Returns None, after a note on stderr, where the disk is full or the folder cannot be written. Whatever
    `source` raises, such as UserError for a broken file, is passed on.
    """
    path = directory / f"{identity}-{version}.bin"
    full = source.full_labels
    with contextlib.suppress(OSError, ValueError):
        return Cache(path, full=full)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory / f"{identity}.lock"):
            with contextlib.suppress(OSError, ValueError):
                return Cache(path, full=full)  # the process we waited for has built it
            for remains in directory.glob(f"{identity}-*"):
                remains.unlink(missing_ok=True)
            _build(path, source)
            return Cache(path, full=full)
    except OSError as error:
        _note(
            f"no cache in {directory} ({error.strerror or error}); reading the image files directly"
        )
        return None


def _build(path: Path, source: Source) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            _fill(file.fileno(), path, source)
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _fill(fd: int, path: Path, source: Source) -> None:
    count = len(source)

    def copy(i: int) -> None:
        image, label = source.read(i)
        _write(fd, image.tobytes() + label.tobytes(), int(offsets[i]))

    # Threads, not processes: Pillow decodes and resizes outside the interpreter's lock.
    pool = ThreadPoolExecutor()
    try:
        shapes = np.array(list(pool.map(source.size, range(count))), np.int64)
        lengths = [
            _sample_bytes(int(height), int(width), source.full_labels) for height, width in shapes
        ]
        offsets = 16 + 24 * count + np.cumsum([0, *lengths])
        total, free = int(offsets[-1]), shutil.disk_usage(path.parent).free
        if free < total + _MARGIN:
            raise OSError(f"it takes {_size(total)}, and {_size(free)} are free")
        _note(f"keeping {count} resized images in {path} ({_size(total)})")
        header = np.column_stack([offsets[:-1], shapes]).astype(np.int64)
        _write(fd, _MAGIC + np.int64(count).tobytes() + header.tobytes(), 0)
        futures = [pool.submit(copy, i) for i in range(count)]
        console = Console(stderr=True)
        quiet = not console.is_terminal
        for done in track(
            as_completed(futures), "resizing", count, console=console, transient=True, disable=quiet
        ):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:  # one call may write less, and raises OSError only when it can write nothing
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait for the lock on `path`; the system releases it when its process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _note(f"waiting for another process that builds {path.with_suffix('')}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: building twice is wasteful and harmless
        yield


def _sample_bytes(height: int, width: int, full: bool) -> int:
    return 3 * height * width + math.prod(label_size((height, width), full=full))


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _note(text: str) -> None:
    print(f"cache: {text}", file=sys.stderr)
