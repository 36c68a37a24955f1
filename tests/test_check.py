"""`python -m datasets.check` reports a whole tree."""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import CITYSCAPES
from tests.conftest import Command


def test_a_sound_tree(command: Command, weathers: Path, tmp_path: Path) -> None:
    done = command(
        "-m",
        "datasets.check",
        "--dataset",
        "ACDC",
        "--datadir",
        weathers,
        "--json",
        tmp_path / "c.json",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "c.json").read_text())
    assert {name: part["images"] for name, part in found.items()} == {
        **{"train": 8, **{f"train/{c}": 2 for c in ("fog", "night", "rain", "snow")}},
        **{"val": 4, **{f"val/{c}": 1 for c in ("fog", "night", "rain", "snow")}},
    }
    assert found["train"]["sizes"] == {"64×128": 8}
    labels = [np.asarray(Image.open(p)) for p in (weathers / "gt").rglob("train/**/*.png")]
    road = sum(int((label == CITYSCAPES.names.index("road")).sum()) for label in labels)
    assert found["train"]["pixels"]["road"] == road > 0
    assert sum(found["train"]["pixels"].values()) == 8 * 64 * 128


def test_every_problem_is_told(command: Command, scenes: Path, tmp_path: Path) -> None:
    """A broken image, a label too few, a label of another size and one with wrong values: all of them, then exit 2."""
    root = tmp_path / "data"
    shutil.copytree(scenes, root)
    images = sorted((root / "leftImg8bit" / "train").rglob("*.png"))
    labels = sorted((root / "gtFine" / "train").rglob("*.png"))
    images[0].write_bytes(images[0].read_bytes()[:300])
    labels[1].unlink()
    Image.open(labels[2]).resize((10, 10)).save(labels[2])
    Image.fromarray(np.full((64, 128), 77, np.uint8)).save(labels[3])
    done = command("-m", "datasets.check", "--datadir", root)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "4 problems" in done.stderr.splitlines()[-1]
    for path in (images[0], images[1], labels[2], labels[3]):
        assert path.name in done.stdout
    assert "77" in done.stdout


def test_a_split_that_is_missing(command: Command, scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "leftImg8bit" / "train")
    done = command("-m", "datasets.check", "--datadir", tmp_path / "data")
    assert done.returncode == 2 and "leftImg8bit/train" in done.stdout


def test_nothing_there(command: Command, tmp_path: Path) -> None:
    done = command("-m", "datasets.check", "--datadir", tmp_path / "nowhere")
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr


def test_no_label_found(command: Command, scenes: Path, tmp_path: Path) -> None:
    """Then the names that labels should have are told instead of an empty histogram."""
    shutil.copytree(scenes / "leftImg8bit", tmp_path / "leftImg8bit")
    done = command("-m", "datasets.check", "--datadir", tmp_path)
    assert done.returncode == 2 and "gtFine/val/<city>/*_gtFine_labelTrainIds.png" in done.stdout
    assert "traffic light" not in done.stdout
