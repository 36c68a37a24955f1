"""Small data sets of random pixels in Cityscapes' layout."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from datasets import SceneDataset, open_split


def write(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)
    return path


def write_scene(
    root: Path, name: str, size: Any = (64, 96), *, kind: str = "TrainIds", extension: str = "png"
) -> tuple[Path, Path]:
    """A random training image and its label; returns their paths."""
    rng = np.random.default_rng(list(name.encode(errors="surrogateescape")))
    image = root / f"leftImg8bit/train/town/{name}_leftImg8bit.{extension}"
    label = root / f"gtFine/train/town/{name}_gtFine_label{kind}.png"
    values = rng.integers(0, 19 if kind == "TrainIds" else 34, size)
    return write(image, rng.integers(0, 256, (*size, 3))), write(label, values)


def open_tree(root: Path, **options: Any) -> SceneDataset:
    return open_split("cityscapes", root, "train", **{"height": 32, **options})


def same(a: SceneDataset, b: SceneDataset, *keys: Any) -> bool:
    pairs = [zip(a[key][:2], b[key][:2], strict=True) for key in keys or range(len(a))]
    return all(torch.equal(x, y) for pair in pairs for x, y in pair)


@contextmanager
def limited(resource_: int, most: int) -> Iterator[None]:
    """This process may have no more of something."""
    before = resource.getrlimit(resource_)
    resource.setrlimit(resource_, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource_, before)
