"""NYUv2 and Pascal VOC 2012 on tiny trees of their layouts: nothing assumes 19 classes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import open_split
from datasets.classes import CITYSCAPES, NYU40, VOC2012, colormap
from errors import UserError
from models import create_model, load_model, save_model
from tests.conftest import Command
from tests.test_training import SMALL, records
from train.TransKDBase import Options, main

RNG = np.random.default_rng(0)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def nyu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nyu")
    for subset, names in (("train", "abcd"), ("val", "ef")):
        (root / f"{subset}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            write(root / "images" / f"{name}.jpg", RNG.integers(0, 256, (70, 90, 3), np.uint8))
            write(root / "labels40" / f"{name}.png", RNG.integers(0, 41, (70, 90), np.uint8))
    return root


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of different sizes, as VOC has them."""
    root = tmp_path_factory.mktemp("voc")
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for subset, names in (("train", ["2007_1", "2007_2", "2007_3"]), ("val", ["2008_1", "2008_2"])):
        (root / "ImageSets" / "Segmentation" / f"{subset}.txt").write_text("\n".join(names))
        for i, name in enumerate(names):
            size = (70 + 10 * i, 90)
            write(root / "JPEGImages" / f"{name}.jpg", RNG.integers(0, 256, (*size, 3), np.uint8))
            label = RNG.integers(0, 22, size).astype(np.uint8)
            label[label == 21] = 255
            write(root / "SegmentationClassAugRaw" / f"{name}.png", label)
    return root


def test_labels_are_shifted_by_one(nyu: Path) -> None:
    """0 is unlabelled and k means class k - 1."""
    dataset = open_split("NYUv2", nyu, "train", height=70, cache=False)
    raw = np.asarray(Image.open(nyu / "labels40" / "a.png")).astype(int)
    np.testing.assert_array_equal(dataset.full_label(0), np.where(raw == 0, 40, raw - 1))


def test_void_is_ignored(voc: Path) -> None:
    dataset = open_split("VOC2012", voc, "val", height=64, cache=False)
    raw = np.asarray(Image.open(voc / "SegmentationClassAugRaw" / "2008_1.png"))
    np.testing.assert_array_equal(dataset.full_label(0), np.where(raw == 255, 21, raw))


def test_colours_of_the_challenge() -> None:
    """The first and the last of the colours that the challenge's development kit gives."""
    assert colormap(21)[[0, 1, 2, 15, 20]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [0, 64, 128],
    ]  # fmt: skip
    assert len(VOC2012.palette) == 22 and len(NYU40.palette) == 41


def test_a_list_that_names_what_is_not_there(nyu: Path) -> None:
    (nyu / "test.txt").write_text("a\nzebra\n")
    with pytest.raises(UserError, match=r"1 images that are not in .*zebra"):
        open_split("NYUv2", nyu, "test", cache=False)


@pytest.mark.parametrize("dataset", ["NYUv2", "VOC2012"])
def test_train_evaluate_and_render(
    dataset: str, nyu: Path, voc: Path, command: Command, tmp_path: Path
) -> None:
    root, classes = (nyu, NYU40) if dataset == "NYUv2" else (voc, VOC2012)
    flags = (
        "--dataset",
        dataset,
        "--datadir",
        root,
        "--output-dir",
        tmp_path / "run",
        "--max-steps",
        2,
    )
    done = command("train/student.py", *flags, *SMALL)
    assert done.returncode == 0, done.stderr
    weights = tmp_path / "run" / "student.safetensors"
    assert load_model(weights).num_classes == classes.num_outputs
    common = ("--datadir", root, "--weights", weights, "--height", 64, "--num-workers", 0)
    done = command(
        f"eval/eval_{dataset}_iou.py",
        *common,
        "--json",
        tmp_path / "iou.json",
        "--protocol",
        "full",
    )
    assert done.returncode == 0, done.stderr
    assert list(json.loads((tmp_path / "iou.json").read_text())["per_class"]) == list(classes.names)
    done = command(f"eval/eval_{dataset}_color.py", *common, "--output-dir", tmp_path / "colour")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "colour").rglob("*.png"))) == 2


@pytest.mark.parametrize("dataset", ["NYUv2", "VOC2012"])
def test_distillation(dataset: str, nyu: Path, voc: Path, tmp_path: Path) -> None:
    """All classes weigh alike; a teacher of other classes (by number or name) is refused for its logits."""
    root, classes = (nyu, NYU40) if dataset == "NYUv2" else (voc, VOC2012)
    path = tmp_path / "teacher.safetensors"
    options = Options(
        dataset=dataset,
        datadir=root,
        output_dir=tmp_path / "run",
        teacher_model="segformer_b0",
        teacher_weights=path,
        logits_weight=1.0,
        height=64,
        max_steps=1,
        num_workers=0,
        tensorboard=False,
        device="cpu",
    )
    teacher = create_model("segformer_b0", classes.num_outputs)
    save_model(teacher, path)  # without names
    main(options)
    [step] = [r for r in records(tmp_path / "run") if r["event"] == "train"]
    assert {"ce", "hcl", "embed4", "logits"} < step["losses"].keys()
    assert load_model(tmp_path / "run" / "student.safetensors").class_names == classes.output_names
    with pytest.raises(UserError, match=r"predicts \d+ classes, Cityscapes has 19"):
        options.teacher(CITYSCAPES)
    teacher.class_names = tuple(f"{name} of another kind" for name in classes.output_names)
    save_model(teacher, path)
    with pytest.raises(UserError, match="predicts other classes"):
        options.teacher(classes)
    options.logits_weight = 0.0
    assert options.teacher(classes).num_classes == classes.num_outputs


def test_a_list_that_is_missing(command: Command, nyu: Path, tmp_path: Path) -> None:
    root = shutil.copytree(nyu, tmp_path / "nyu")
    (root / "train.txt").unlink()
    done = command("-m", "datasets.check", "--dataset", "NYUv2", "--datadir", root)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot read the list" in done.stdout + done.stderr
