"""The cache holds the very same numbers, and whatever happens to it costs time alone."""

import multiprocessing
import os
import pickle
import pwd
import resource
import tempfile
import time
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
    assert len(before) == 4
    monkeypatch.setattr("PIL.__version__", "1.0")  # another may resize otherwise
    cached(tree, folder)
    assert len(caches(folder)) == 4 and caches(folder) != before


@pytest.mark.parametrize("name", ["index", "samples"])
def test_a_damaged_cache_is_built_again(tree: Path, tmp_path: Path, name: str) -> None:
    """A power failure may leave files that are short or empty."""
    direct = open_tree(tree)
    for damage in (lambda x: x[:-1], lambda x: b"", lambda x: b"x" * len(x)):
        stored = cached(tree, tmp_path).cache
        assert stored is not None
        file = stored.folder / f"{name}.npy"
        whole = file.read_bytes()
        file.unlink()
        file.write_bytes(damage(whole))
        assert same(cached(tree, tmp_path), direct) and file.read_bytes() == whole


def test_without_room(tree, tmp_path, monkeypatch, caplog) -> None:
    """A real write error, too little space and a folder that can't be made: the files are read."""
    direct = open_tree(tree)
    with limited(resource.RLIMIT_FSIZE, 20_000):
        assert same(cached(tree, tmp_path / "cache"), direct)
    (tmp_path / "file").touch()
    assert same(cached(tree, tmp_path / "file/cache"), direct)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    assert same(cached(tree, tmp_path / "cache"), direct)
    for words in ("File too large", "Not a directory", "0.00 GB are free"):
        assert f"({words}" in caplog.text or f"and {words}" in caplog.text
    assert caches(tmp_path / "cache") == []


def test_a_broken_file_stops_the_build_and_leaves_nothing(tree: Path, tmp_path: Path) -> None:
    write(next((tree / "gtFine").rglob("town_06*")), np.full((64, 96), 77))
    with pytest.raises(UserError, match="town_06"):
        cached(tree, tmp_path / "cache")
    assert caches(tmp_path / "cache") == []


def build(tree: Path, folder: Path) -> tuple[Any, str]:
    """Start a process that builds a cache in `folder`; it reads once tree/gate is there.

    Returns when it "reads" or "waits" for another one.
    """
    read = SceneDataset.read

    def mark(what: str) -> None:
        (tree / f"{os.getpid()} {what}").touch()

    def read_later(self: SceneDataset, index: int) -> Any:
        mark("reads")
        while not (tree / "gate").exists():
            time.sleep(0.01)
        return read(self, index)

    def target() -> None:
        cache.log.warning = lambda *args: mark("waits" if "waiting" in args[0] else "fails")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SceneDataset, "read", read_later)
            found = cached(tree, folder)
        os._exit(0 if same(found, open_tree(tree)) else 1)

    process = multiprocessing.get_context("fork").Process(target=target, daemon=True)
    process.start()
    while not (marks := list(tree.glob(f"{process.pid} *"))):
        time.sleep(0.01)
    return process, marks[0].name.split()[1]


def test_a_killed_build_leaves_nothing_that_counts(tree: Path, tmp_path: Path) -> None:
    process, _ = build(tree, tmp_path / "cache")
    process.kill()
    process.join()
    (remains,) = caches(tmp_path / "cache")
    assert same(cached(tree, tmp_path / "cache"), open_tree(tree))
    assert remains not in caches(tmp_path / "cache") and len(caches(tmp_path / "cache")) == 1


@pytest.mark.parametrize("error", [None, NotImplementedError("no locks")])
def test_two_builders_at_once(error, tree, tmp_path, monkeypatch) -> None:
    """One builds and the other waits; without locks both build, and what they read is right."""
    if error is not None:
        monkeypatch.setattr(FileLock, "acquire", Mock(side_effect=error))
    builders = [build(tree, tmp_path / "cache") for _ in range(2)]
    assert [what for _, what in builders] == ["reads", "waits" if error is None else "reads"]
    (tree / "gate").touch()
    for process, _ in builders:
        process.join(60)
    assert [process.exitcode for process, _ in builders] == [0, 0]
    assert len(caches(tmp_path / "cache")) == 1


def test_where_the_cache_is(tmp_path, monkeypatch, caplog) -> None:
    """Where TRANSKD_CACHE says, at home, or without a home in a temporary folder, said once."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRANSKD_CACHE", "~/x")
    assert cache.default_cache_dir() == tmp_path / "x"
    monkeypatch.delenv("TRANSKD_CACHE")
    assert cache.default_cache_dir() == tmp_path / ".cache/transkd"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", Mock(side_effect=KeyError))
    cache.warn_once.cache_clear()
    for _ in range(2):
        assert cache.default_cache_dir() == Path(tempfile.gettempdir()) / "transkd"
    assert caplog.text.count("there is no home folder") == 1
