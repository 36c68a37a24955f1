"""The procedural scenes: what they promise to training, to the tests and to the readers of their files."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.classes import CITYSCAPES
from datasets.synthetic import Options, main, write_dataset
from datasets.synthetic.canvas import Canvas
from datasets.synthetic.palette import IGNORE, POLE, ROAD, SKY
from datasets.synthetic.scene import draw_scene
from datasets.synthetic.shading import Pixels
from datasets.synthetic.street import Street
from datasets.synthetic.weather import WEATHERS
from errors import UserError

COUNTS = {"train": 3, "val": 2, "height": 32, "width": 64}


@cache
def scene(
    number: int, weather: str = "clear", height: int = 64, width: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    return draw_scene(np.random.default_rng([7, number]), height, width, weather)


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.png"))}


@pytest.mark.parametrize("size", [(64, 128), (45, 77)])
def test_scene_is_an_image_and_train_ids_and_depends_on_the_seed_alone(size):
    image, labels = scene(0, "clear", *size)
    again, labels_again = draw_scene(np.random.default_rng([7, 0]), *size)
    assert image.dtype == labels.dtype == np.uint8
    assert image.shape == (*size, 3) and labels.shape == size
    assert set(np.unique(labels)) <= {*range(19), IGNORE}
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(labels, labels_again)
    assert (image != scene(1, "clear", *size)[0]).mean() > 0.5


def test_every_class_occurs_and_the_common_ones_nearly_always():
    occurs = np.zeros((120, 256), bool)
    for i in range(120):
        occurs[i, np.unique(scene(i)[1])] = True
    seldom = {CITYSCAPES.names[k]: occurs[:, k].sum() for k in range(19) if occurs[:, k].sum() < 5}
    assert not seldom
    for name in ("road", "sidewalk", "building", "pole", "vegetation", "sky", "car"):
        assert occurs[:, CITYSCAPES.names.index(name)].mean() > 0.85, name
    assert occurs[:, IGNORE].mean() > 0.2


def test_scenes_are_laid_out_as_a_camera_in_a_street_sees_them():
    labels = np.stack([scene(i)[1] for i in range(40)])
    assert (labels[:, :6] == SKY).mean() > 0.2 and (labels[:, 40:] == SKY).mean() == 0
    assert (labels[:, 40:52] == ROAD).mean() > 0.4 and (labels[:, :16] == ROAD).mean() == 0


def test_colour_alone_does_not_tell_the_classes_apart():
    """The best guess from a pixel's colour, learned from other scenes, is far from the truth."""
    counts = np.zeros((4096, 256))
    right = total = 0
    for i in range(60):
        image, labels = scene(i)
        cell = (image // 16 @ np.array([256, 16, 1])).ravel()
        if i < 40:
            np.add.at(counts, (cell, labels.ravel()), 1)
        else:
            right += (counts.argmax(1)[cell] == labels.ravel()).sum()
            total += labels.size
    assert right / total < 0.65


def test_the_same_scene_looks_different_in_every_weather():
    looks = {
        weather: np.mean([scene(i, weather)[0].mean() for i in range(6)]) for weather in WEATHERS
    }
    assert looks["night"] < 0.9 * looks["rain"] and looks["rain"] < 0.8 * looks["fog"]
    assert looks["night"] < 0.75 * looks["clear"]
    for i in range(3):
        assert all((scene(i, weather)[1] == scene(i)[1]).all() for weather in WEATHERS)
    ground = [scene(i, weather)[0][40:54].mean() for weather in ("snow", "clear") for i in range(6)]
    assert np.mean(ground[:6]) > np.mean(ground[6:]) + 15  # it lies white


def test_fog_swallows_what_is_far():
    c = Canvas(np.random.default_rng([7, 1]), 128, 256, "fog")
    Street(c).paint()
    pixels = Pixels(c)
    pixels.shade()
    seen, distance = pixels.labels != IGNORE, np.abs(pixels.colour - c.air).mean(axis=2)
    near, middle, far = (
        distance[seen & (pixels.z > a) & (pixels.z < b)] for a, b in ((5, 10), (30, 50), (70, 131))
    )
    assert near.mean() > 1.5 * middle.mean() > 3 * far.mean()
    assert far.max() < 1.2 * np.exp(-c.fog * 70)


def test_a_pole_is_as_deep_and_as_tall_as_it_was_put():
    c = Canvas(np.random.default_rng(3), 256, 512, "clear")
    c.bend = c.at = 0.0
    c.upright(-0.1, 0.1, 0.0, 2.0, 10.0, (0.5, 0.5, 0.5), POLE)
    pixels = Pixels(c)
    rows, columns = np.nonzero(pixels.labels == POLE)
    np.testing.assert_allclose(pixels.z[rows, columns], 10, rtol=1e-5)
    assert np.ptp(rows) == pytest.approx(c.focal * 2.0 / 10, abs=2)
    assert pixels.v[rows.max(), columns[0]] == pytest.approx(
        0, abs=0.05
    )  # its foot is on the ground
    assert pixels.v[rows.min(), columns[0]] == pytest.approx(2, abs=0.05)


def test_cityscapes_layout_pairs_and_repeats(tmp_path):
    root = write_dataset(tmp_path / "a", **COUNTS)
    drawn = files(root)
    images = {name for name in drawn if name.startswith("leftImg8bit/")}
    wanted = {
        n.replace("leftImg8bit/", "gtFine/").replace("leftImg8bit.", "gtFine_labelTrainIds.")
        for n in images
    }
    assert set(drawn) - images == wanted
    assert [sum(f"/{split}/" in name for name in images) for split in ("train", "val")] == [3, 2]
    assert "leftImg8bit/val/hafen/hafen_000001_000019_leftImg8bit.png" in images
    assert len(set(drawn.values())) == 10  # no scene twice
    with Image.open(root / min(images)) as image, Image.open(root / min(wanted)) as label:
        assert (image.mode, image.size, label.mode, label.size) == ("RGB", (64, 32), "L", (64, 32))

    more = files(write_dataset(tmp_path / "b", **COUNTS | {"train": 5}, workers=2))
    assert drawn.items() <= more.items()  # neither other counts nor processes change a scene
    assert drawn.items().isdisjoint(
        files(write_dataset(tmp_path / "c", **COUNTS | {"seed": 1})).items()
    )


def test_acdc_layout(tmp_path):
    drawn = files(write_dataset(tmp_path, "ACDC", **COUNTS))
    assert len(drawn) == 2 * 4 * 5
    assert len({Path(name).name for name in drawn}) == len(drawn)
    for drive, condition in (
        ("GOPR1001", "fog"),
        ("GOPR2001", "night"),
        ("GOPR3001", "rain"),
        ("GOPR4001", "snow"),
    ):
        assert f"rgb_anon/{condition}/train/{drive}/{drive}_frame_000041_rgb_anon.png" in drawn
        assert f"gt/{condition}/train/{drive}/{drive}_frame_000041_gt_labelTrainIds.png" in drawn


def test_label_ids_say_the_same_as_train_ids(tmp_path):
    name = "gtFine/train/altstadt/altstadt_000000_000019_gtFine_"
    train_ids = np.asarray(
        Image.open(write_dataset(tmp_path / "a", **COUNTS) / f"{name}labelTrainIds.png")
    )
    root = write_dataset(tmp_path / "b", **COUNTS, label_ids=True)
    label_ids = np.asarray(Image.open(root / f"{name}labelIds.png"))
    assert not list(root.rglob("*TrainIds*"))
    assert (label_ids[train_ids == ROAD] == 7).all() and (label_ids[train_ids == SKY] == 23).all()
    expected = np.where(train_ids == IGNORE, CITYSCAPES.ignore, train_ids)
    np.testing.assert_array_equal(CITYSCAPES.table("label_ids")[label_ids], expected)


def test_the_command_passes_every_option_on(tmp_path, capsys):
    options = Options(
        tmp_path, "ACDC", train=1, val=0, height=32, width=48, seed=5, label_ids=True, workers=1
    )
    main(options)
    drawn = files(tmp_path)
    assert len(drawn) == 8 and all(
        name.endswith(("rgb_anon.png", "gt_labelIds.png")) for name in drawn
    )
    image = np.asarray(
        Image.open(tmp_path / "rgb_anon/snow/train/GOPR4001/GOPR4001_frame_000041_rgb_anon.png")
    )
    seed = (5, 0, WEATHERS.index("snow"), 0)
    np.testing.assert_array_equal(image, draw_scene(np.random.default_rng(seed), 32, 48, "snow")[0])
    assert "4 scenes, 4 of them new" in capsys.readouterr().out


def test_a_second_call_draws_what_lacks_and_other_settings_are_refused(tmp_path):
    root = write_dataset(tmp_path / "a", **COUNTS)
    before = files(root)
    lost, kept = (root / name for name in sorted(before)[:2])
    lost.unlink()
    note = root / "dataset.json"
    written = kept.stat().st_mtime_ns, note.stat().st_mtime_ns
    write_dataset(root, **COUNTS)
    # nor is the note touched: another process that reads it meanwhile would find half of it
    assert files(root) == before and (kept.stat().st_mtime_ns, note.stat().st_mtime_ns) == written
    assert json.loads(note.read_text())["train"] == 3
    with pytest.raises(UserError, match="something else"):
        write_dataset(root, **COUNTS | {"seed": 1})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="something else"):
        write_dataset(tmp_path / "b", **COUNTS)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "wrong", [{"height": 8}, {"train": -1}, {"workers": 0}, {"dataset": "camvid"}]
)
def test_senseless_settings_are_refused(tmp_path, wrong):
    with pytest.raises(UserError, match="choose"):
        write_dataset(tmp_path / "a", **COUNTS | wrong)
    assert not (tmp_path / "a").exists()
