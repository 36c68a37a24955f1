"""The drawn scenes: what they promise to the trainings and to the other tests."""

from pathlib import Path

import numpy as np
import pytest

from datasets import CITYSCAPES
from demo.scenes import draw_scene, write_dataset
from errors import UserError

SMALL = {"train": 3, "val": 2, "height": 32, "width": 64}
ROAD, SKY = (CITYSCAPES.names.index(name) for name in ("road", "sky"))


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.png")}


def test_every_class_occurs_and_place_and_not_colour_tells_them_apart():
    """The best guess from a pixel's colour, learned from other scenes, is far from the truth."""
    pairs = [draw_scene(np.random.default_rng([7, number]), 48, 96) for number in range(60)]
    images, labels = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    assert set(np.unique(labels)) == {*range(19), 255}
    assert (labels[:, :5] == SKY).mean() > 0.2 and not (labels[:, 30:] == SKY).any()
    assert (labels[:, 34:42] == ROAD).mean() > 0.4 and not (labels[:, :12] == ROAD).any()
    cells = images // 16 @ np.array([256, 16, 1])  # 4096 colours
    counts = np.zeros((4096, 256))
    np.add.at(counts, (cells[:40].ravel(), labels[:40].ravel()), 1)
    assert (counts.argmax(1)[cells[40:]] == labels[40:]).mean() < 0.65


def test_a_scene_is_the_same_however_it_is_drawn(tmp_path):
    few = files(write_dataset(tmp_path / "few", **SMALL))
    assert len(set(few.values())) == 10  # no scene twice
    several_processes = write_dataset(tmp_path / "many", **SMALL)
    write_dataset(several_processes, **SMALL | {"train": 66})
    assert few.items() <= files(several_processes).items()
    lost, kept = (tmp_path / "few" / name for name in sorted(few)[:2])
    lost.unlink()
    written = kept.stat().st_mtime_ns
    assert files(write_dataset(tmp_path / "few", **SMALL)) == few
    assert kept.stat().st_mtime_ns == written
    with pytest.raises(UserError, match="few holds other scenes"):
        write_dataset(tmp_path / "few", **SMALL | {"height": 64})
    assert few.items().isdisjoint(files(write_dataset(tmp_path / "seed", **SMALL, seed=1)).items())
