"""The drawn scenes: what they promise to the trainings and to the other tests."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import CITYSCAPES, open_split
from demo.scenes import WEATHERS, draw_scene, write_dataset

SMALL = {"train": 3, "val": 2, "height": 32, "width": 64}
ROAD, SKY = (CITYSCAPES.names.index(name) for name in ("road", "sky"))


def scene(number: int, weather: str = "clear") -> tuple[np.ndarray, np.ndarray]:
    return draw_scene(np.random.default_rng([7, number]), 48, 96, weather)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.png")}


def test_every_class_occurs_and_the_sky_is_above_the_road():
    labels = np.stack([scene(i)[1] for i in range(40)])
    assert labels.shape == (40, 48, 96) and labels.dtype == np.uint8
    assert set(np.unique(labels)) == {*range(19), 255}
    assert (labels[:, :5] == SKY).mean() > 0.2 and not (labels[:, 30:] == SKY).any()
    assert (labels[:, 34:42] == ROAD).mean() > 0.4 and not (labels[:, :12] == ROAD).any()


def test_colour_alone_does_not_tell_the_classes_apart():
    """The best guess from a pixel's colour, learned from other scenes, is far from the truth."""
    images, labels = (np.stack(arrays) for arrays in zip(*map(scene, range(60)), strict=True))
    cells = images // 16 @ np.array([256, 16, 1])  # 4096 colours
    counts = np.zeros((4096, 256))
    np.add.at(counts, (cells[:40].ravel(), labels[:40].ravel()), 1)
    assert (counts.argmax(1)[cells[40:]] == labels[40:]).mean() < 0.65


def test_weathers_differ_in_the_image_alone():
    brightness = []
    for i in range(5):
        images, labels = zip(*(scene(i, weather) for weather in WEATHERS), strict=True)
        assert all((other == labels[0]).all() for other in labels)
        brightness.append([image.mean() for image in images])
    clear, fog, night, rain, snow = np.mean(brightness, axis=0)
    assert 1.3 * night < rain < 0.9 * fog and night < 0.8 * clear < 0.8 * snow


def test_a_scene_is_the_same_however_it_is_drawn(tmp_path):
    few = files(write_dataset(tmp_path / "few", **SMALL))
    assert len(set(few.values())) == 10  # no scene twice
    several_processes = write_dataset(tmp_path / "many", **SMALL | {"train": 66})
    assert few.items() <= files(several_processes).items()
    lost, kept = (tmp_path / "few" / name for name in sorted(few)[:2])
    lost.unlink()
    written = kept.stat().st_mtime_ns
    assert files(write_dataset(tmp_path / "few", **SMALL)) == few
    assert kept.stat().st_mtime_ns == written
    assert few.items().isdisjoint(files(write_dataset(tmp_path / "seed", **SMALL, seed=1)).items())


@pytest.mark.parametrize(("dataset", "weathers"), [("cityscapes", 1), ("ACDC", 4)])
def test_images_and_labels_pair_up(tmp_path, dataset, weathers):
    train_ids = write_dataset(tmp_path / "train ids", dataset, **SMALL)
    label_ids = write_dataset(tmp_path / "label ids", dataset, **SMALL, label_ids=True)
    for split in ("train", "val"):
        roots = (train_ids, label_ids)
        first, second = (open_split(dataset, root, split).samples for root in roots)
        assert len(first) == SMALL[split] * weathers
        for one, other in zip(first, second, strict=True):
            expected = CITYSCAPES.table("train_ids")[np.asarray(Image.open(one.label))]
            found = CITYSCAPES.table("label_ids")[np.asarray(Image.open(other.label))]
            np.testing.assert_array_equal(found, expected)
