"""`python -m datasets.check` reports a whole tree."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datasets.check import Options, check, main
from errors import UserError


def test_a_sound_tree(weathers: Path, capsys: Any) -> None:
    main(Options(weathers, dataset="ACDC"))
    printed = capsys.readouterr().out
    assert "traffic light" in printed and "64×128 (8)" in printed and "train/fog" in printed
    found = check("ACDC", weathers)
    expected = {"train": 8, "val": 4}
    for weather in ("fog", "night", "rain", "snow"):
        expected |= {f"train/{weather}": 2, f"val/{weather}": 1}
    assert {name: part.images for name, part in found.items()} == expected
    labels = [np.asarray(Image.open(path)) for path in (weathers / "gt").rglob("train/**/*.png")]
    assert found["train"].pixels["road"] == sum(int((x == 0).sum()) for x in labels) > 0
    assert found["train"].pixels.total() == 8 * 64 * 128 and found["train"].turned == 0


def test_every_problem_is_listed(scenes: Path, tmp_path: Path, capsys: Any) -> None:
    root = shutil.copytree(scenes, tmp_path / "data")
    shutil.rmtree(root / "leftImg8bit" / "val")
    images = sorted((root / "leftImg8bit" / "train").rglob("*.png"))
    labels = sorted((root / "gtFine" / "train").rglob("*.png"))
    images[0].write_bytes(images[0].read_bytes()[:300])
    labels[1].unlink()
    Image.open(labels[2]).resize((10, 10)).save(labels[2])
    Image.fromarray(np.full((64, 128), 77, np.uint8)).save(labels[3])
    with pytest.raises(UserError, match=r"problems in .*: 5, listed above"):
        main(Options(root))
    printed = capsys.readouterr().out
    assert all(path.name in printed for path in (images[0], images[1], labels[2], labels[3]))
    assert "77" in printed and images[4].name not in printed
    assert "leftImg8bit/val; expected leftImg8bit/val/" in printed
