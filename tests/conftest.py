"""A small drawn data set in two layouts, and a way to run the project's commands."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from demo.scenes import write_dataset
from tests.runs import Small
from tests.trees import write_scene

ROOT = Path(__file__).resolve().parents[1]
Command = Callable[..., subprocess.CompletedProcess[str]]
torch.set_num_threads(1)  # two tests run at a time; threads that wait for each other cost time


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave the user's cache alone."""
    os.environ["TRANSKD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def draw(factory: pytest.TempPathFactory, dataset: str, train: int, val: int) -> Path:
    size: Any = {"height": 64, "width": 128}
    return write_dataset(factory.mktemp(dataset), dataset, train=train, val=val, **size)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cityscapes layout: 10 training and 4 validation scenes of 64×128."""
    return draw(tmp_path_factory, "cityscapes", 10, 4)


@pytest.fixture(scope="session")
def weathers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ACDC layout: 2 training and 1 validation scene of 64×128 for each weather."""
    return draw(tmp_path_factory, "ACDC", 2, 1)


@pytest.fixture(scope="session")
def command() -> Command:
    """Run `python ARGUMENTS…` in the repository or in `cwd`, as a user does."""

    def run(*arguments: object, cwd: Path = ROOT, **environment: str) -> Any:
        words = [sys.executable, *map(str, arguments)]
        env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def small(scenes: Path, tmp_path: Path) -> Small:
    return Small(scenes, tmp_path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Nine training images of 64×96 random pixels in Cityscapes' layout."""
    for i in range(9):
        write_scene(tmp_path / "data", f"town_{i:02}", extension="jpg" if i % 2 else "png")
    return tmp_path / "data"
