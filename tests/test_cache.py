"""The cache holds the very same numbers, and whatever happens to it costs time alone."""

import os
import pickle
import pwd
import resource
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import Augmentation, SceneDataset, cache, use_cache
from errors import UserError
from tests.trees import limited, open_tree, same, write, write_scene


def cached(tree: Path, folder: Path, **options: Any) -> SceneDataset:
    scenes = open_tree(tree, **options)
    use_cache(scenes, folder)
    return scenes


def caches(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.tuples(*2 * [st.integers(1, 90)]), min_size=1, max_size=4),
    height=st.integers(32, 48),
    kind=st.sampled_from(["TrainIds", "Ids"]),
    full=st.booleans(),
)
def test_cache_equals_direct_reading(tmp_path_factory, sizes, height, kind, full) -> None:
    root = tmp_path_factory.mktemp("cache")
    for i, size in enumerate(sizes):
        write_scene(root, f"t_{i}", size, kind=kind, extension="jpg" if i % 2 else "png")
    options = {"height": height, "augment": Augmentation(seed=height), "full_labels": full}
    direct, stored = open_tree(root, **options), cached(root, root / "cache", **options)
    assert stored.cache is not None
    for index in range(len(sizes)):
        assert same(direct, stored, index, (1, index), (2, index))
    pickled = pickle.dumps(stored)  # as macOS hands it to workers, which map the same files
    assert len(pickled) < 4000 and same(direct, pickle.loads(pickled))


def test_cache_is_reused_until_a_file_or_a_setting_changes(tree, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "cache"
    first = cached(tree, folder)
    (name,) = caches(folder)
    before = (folder / name).stat().st_ino
    assert same(cached(tree, folder), first) and (folder / name).stat().st_ino == before

    image = first.samples[4].image
    stat = image.stat()
    write(image, np.full((64, 96, 3), 50))
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # its size alone changed
    assert (cached(tree, folder)[4].image == 50).all()
    (second,) = caches(folder)
    assert second != name and first[4].image.float().std() > 1, "who reads the old one may go on"
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    cached(tree, folder)
    assert caches(folder) != [second], "the time alone makes a file another"
    for options in ({"height": 48}, {"every": 2}, {"full_labels": True}):
        cached(tree, folder, **options)
    before = caches(folder)
    monkeypatch.setattr("PIL.__version__", "1.0")  # another may resize otherwise
    cached(tree, folder)
    assert len(before) == len(caches(folder)) == 4 and caches(folder) != before


@pytest.mark.parametrize("name", ["index", "samples"])
def test_a_damaged_cache_is_built_again(tree: Path, tmp_path: Path, name: str) -> None:
    """A power failure may leave files that are short or empty."""
    direct = open_tree(tree)
    for kept in (0, -1):
        stored = cached(tree, tmp_path).cache
        assert stored is not None
        file = stored.folder / f"{name}.npy"
        whole = file.read_bytes()
        file.unlink()
        file.write_bytes(whole[:kept])
        assert same(cached(tree, tmp_path), direct) and file.read_bytes() == whole


def test_without_room_or_locks(tree, tmp_path, monkeypatch, caplog) -> None:
    """A real write error, too little space and a folder that can't be made: the files are read."""
    direct = open_tree(tree)
    with limited(resource.RLIMIT_FSIZE, 20_000):
        assert same(cached(tree, tmp_path / "cache"), direct)
    (tmp_path / "file").touch()
    assert same(cached(tree, tmp_path / "file/cache"), direct)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2_000_000))
        assert same(cached(tree, tmp_path / "cache"), direct)
    for words in ("File too large", "Not a directory", "0.00 GB are free"):
        assert f"({words}" in caplog.text or f"and {words}" in caplog.text
    assert caches(tmp_path / "cache") == []
    monkeypatch.setattr(FileLock, "acquire", Mock(side_effect=NotImplementedError("no locks")))
    assert cached(tree, tmp_path / "cache").cache is not None


def test_a_broken_file_stops_the_build_and_leaves_nothing(tree: Path, tmp_path: Path) -> None:
    write(next((tree / "gtFine").rglob("town_06*")), np.full((64, 96), 77))
    with pytest.raises(UserError, match="town_06"):
        cached(tree, tmp_path / "cache")
    assert caches(tmp_path / "cache") == []


def test_a_second_builder_waits_and_takes_the_firsts(tree, tmp_path, monkeypatch, caplog) -> None:
    first = cached(tree, tmp_path)
    folder = first.cache.folder
    aside = folder.rename(tmp_path / "aside")  # it isn't whole yet
    monkeypatch.setattr(SceneDataset, "read", None)
    with ThreadPoolExecutor() as pool, FileLock(next(tmp_path.glob("*.lock"))):
        second = pool.submit(cached, tree, tmp_path)
        while "waiting for another" not in caplog.text and not second.done():
            time.sleep(0.01)
        aside.rename(folder)
    assert same(second.result(), first)


def test_without_a_home_the_cache_is_temporary(monkeypatch) -> None:
    """A user that the system doesn't know, as in containers, has none."""
    for name in ("TRANSKD_CACHE", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", Mock(side_effect=KeyError))
    assert cache.default_cache_dir() == Path(tempfile.gettempdir()) / "transkd"
