"""A small drawn data set in both layouts, and a way to run the project's commands as a user does."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datasets.synthetic import write_dataset

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(
    1
)  # two tests run at a time; threads that wait for each other are slower than none
Command = Callable[..., subprocess.CompletedProcess[str]]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave the user's cache alone."""
    os.environ["TRANSKD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cityscapes layout: 10 training and 4 validation scenes of 64×128."""
    root = tmp_path_factory.mktemp("cityscapes")
    write_dataset(root, dataset="cityscapes", train=10, val=4, height=64, width=128, seed=0)
    return root


@pytest.fixture(scope="session")
def weathers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ACDC layout: 2 training and 1 validation scene of 64×128 for each weather."""
    root = tmp_path_factory.mktemp("acdc")
    write_dataset(root, dataset="ACDC", train=2, val=1, height=64, width=128, seed=0)
    return root


@pytest.fixture(scope="session")
def command() -> Command:
    """Run `python ARGUMENTS…` in the repository (or `cwd`) and return what it printed and its exit code."""

    def run(
        *arguments: object, cwd: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture(scope="session")
def teacher_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained SegFormer-B2."""
    from models import create_model, save_model

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "teacher.safetensors"
    save_model(create_model("segformer_b2"), path)
    return path
