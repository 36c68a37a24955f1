"""An exact cache of resized images and their labels: two `.npy` files in a folder.

`samples.npy` holds every sample's uint8 image (3, H, W) and label (h, w) one after the other,
`index.npy` where each begins, H, W, h and w. The folder is written aside and renamed when it is
whole, under a lock, so a killed build leaves nothing that could be taken for a cache, and of two
processes one builds and the other waits. Its name holds a hash of the settings and of every source
file's path, size and time: a changed source makes a new cache, which replaces the old one.
"""

import hashlib
import logging
import math
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from filelock import FileLock

from datasets.images import upright_size
from datasets.scenes import SceneDataset
from datasets.transforms import label_size, resized_size
from files import acquire
from progress import track

log = logging.getLogger(__name__)

NO_CACHE = (OSError, ValueError, EOFError)  # a power failure can leave empty files


def default_cache_dir() -> Path:
    """TRANSKD_CACHE of the environment, or ~/.cache/transkd; without a home, a temporary folder."""
    try:
        return Path(os.environ.get("TRANSKD_CACHE") or "~/.cache/transkd").expanduser()
    except RuntimeError:  # a user without an entry in the system, as containers have
        return Path(tempfile.gettempdir()) / "transkd"


class Cache:
    """Reads a cache folder; `cache[i]` is (image, label), read-only views of a file.

    Raises one of `NO_CACHE` if there is no whole cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = np.load(folder / "index.npy")
        self.samples = np.load(folder / "samples.npy", mmap_mode="r")

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker maps the same files instead of getting a copy."""
        return Cache, (self.folder,)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        begin, *image_size, height, width = self.index[index].tolist()
        middle = begin + 3 * math.prod(image_size)
        image = self.samples[begin:middle].reshape(3, *image_size)
        return image, self.samples[middle : middle + height * width].reshape(height, width)


def fingerprint(*facts: object) -> str:
    """Hash of what a cache depends on."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:20]


def use_cache(scenes: SceneDataset, directory: Path | None = None) -> None:
    """Read the scenes from a cache from now on, which is built first if there is none.

    It lies in `directory`, by default $TRANSKD_CACHE or ~/.cache/transkd. Raises UserError if an
    image or a label can't be read.
    """
    paths = [path for sample in scenes.samples for path in (sample.image, sample.label) if path]
    names = fingerprint([str(path.absolute()) for path in paths])
    stats = [path.stat() for path in paths]
    version = fingerprint(
        2,  # raised whenever reading changes
        [(stat.st_size, stat.st_mtime_ns) for stat in stats],
        [sample.encoding for sample in scenes.samples],
        [scenes.classes.table(kind).tobytes() for kind in ("train_ids", "label_ids")],
        scenes.height,
        PIL.__version__,
    )
    kind = "-full" if scenes.full_labels else ""
    identity = f"{scenes.title}-{scenes.height}{kind}-{names}"
    scenes.cache = open_cache(directory or default_cache_dir(), identity, version, scenes)


def open_cache(directory: Path, identity: str, version: str, scenes: SceneDataset) -> Cache | None:
    """The cache `identity`-`version` in `directory`, built first if it is not there.

    Other versions of `identity` are deleted. None, after a line that says so, where the disk is
    full or the folder can't be written. What reading the scenes raises is passed on.
    """
    folder = directory / f"{identity}-{version}"
    with suppress(*NO_CACHE):
        return Cache(folder)
    lock = FileLock(directory / f"{identity}.lock")
    aside = directory / f"{identity}-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with suppress(PermissionError):  # another user's, in a folder that all may write
            if not acquire(lock):
                log.warning("waiting for another process that builds the cache %s", lock.lock_file)
                acquire(lock, wait=True)
        with suppress(*NO_CACHE):  # the process that we waited for has built it
            return Cache(folder)
        if lock.is_locked:  # else one of these may be another process's, which builds it
            for old in directory.glob(f"{identity}-*"):
                shutil.rmtree(old, ignore_errors=True)
        aside.mkdir()
        build(aside, scenes)
        aside.replace(folder)
        return Cache(folder)
    except OSError as error:
        reason = error.strerror or error
        log.warning("no cache in %s (%s); the image files are read directly", directory, reason)
        return None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        lock.release()


def build(folder: Path, scenes: SceneDataset) -> None:
    """Write the two files. Raises OSError where there is too little space."""
    # Threads, not processes: Pillow decodes and resizes outside the interpreter's lock.
    pool = ThreadPoolExecutor()
    try:
        needed = 0
        for own_size in pool.map(upright_size, [sample.image for sample in scenes.samples]):
            size = resized_size(scenes.height, own_size)
            needed += 3 * math.prod(size) + math.prod(label_size(size, full=scenes.full_labels))
        free = shutil.disk_usage(folder).free
        if free < needed + 2**28:  # 256 MB of the disk stay free
            raise OSError(f"it takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")
        title = f"resizing for the cache ({needed / 1e9:.2f} GB)"
        samples = track(pool.map(scenes.read, range(len(scenes))), title, len(scenes))
        index, end = [], 0
        with (folder / "samples.npy").open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (needed,)}
            np.lib.format.write_array_header_1_0(file, header)
            for image, label in samples:
                index.append((end, *image.shape[1:], *label.shape))
                end += file.write(image.tobytes()) + file.write(label.tobytes())
        np.save(folder / "index.npy", np.array(index, np.int64))
    finally:
        pool.shutdown(cancel_futures=True)
