"""NYUv2, Pascal VOC 2012 and BDD100K on small trees of their layouts: from files to scores."""

import json
from importlib import import_module
from typing import get_type_hints

import numpy as np
import pytest
from PIL import Image

from datasets import LAYOUTS, open_split
from datasets.classes import NYU40, VOC2012, colormap
from models import load_model
from tests.runs import options_of
from tests.trees import write
from train import student

# The values that label files hold, and what they mean.
VALUES = {
    "NYUv2": ([0, 1, 40], [40, 0, 39]),
    "VOC2012": ([0, 1, 20, 255], [0, 1, 20, 21]),
    "BDD100K": ([0, 18, 255], [0, 18, 19]),
}


@pytest.fixture(scope="module", params=VALUES)
def data(request, tmp_path_factory):
    """Layout and folder of a data set; VOC and others have images of different sizes."""
    root, rng = tmp_path_factory.mktemp(request.param), np.random.default_rng(0)
    layout = LAYOUTS[request.param]
    for subset, names in (("train", ["2007_1", "2007_2", "2007_3"]), ("val", ["2008_1", "2008_2"])):
        images, labels = (root / x.format(subset=subset) for x in (layout.images, layout.labels))
        for i, name in enumerate(names):
            size = (70 + 10 * i, 90)
            write(images / f"{name}.jpg", rng.integers(0, 256, (*size, 3)))
            write(labels / f"{name}.png", rng.choice(VALUES[layout.name][0], size))
        if layout.list_file:
            listed = root / layout.list_file.format(subset=subset)
            listed.parent.mkdir(parents=True, exist_ok=True)
            listed.write_text("\n".join(names))
    return layout, root


def test_labels_mean_their_classes(data) -> None:
    layout, root = data
    dataset = open_split(layout.name, root, "val", height=64)
    assert [sample.image.stem for sample in dataset.samples] == ["2008_1", "2008_2"]
    for index, sample in enumerate(dataset.samples):
        raw = np.asarray(Image.open(sample.label))
        for value, meaning in zip(*VALUES[layout.name], strict=True):
            assert (dataset.full_label(index)[raw == value] == meaning).all()


def test_colours_of_the_challenge() -> None:
    """The first and the last of the colours that VOC's development kit gives."""
    colours = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [0, 64, 128]]
    assert colormap(21)[[0, 1, 2, 15, 20]].tolist() == colours
    assert len(VOC2012.palette) == 22 and len(NYU40.palette) == 41


def test_train_evaluate_and_render(data, tmp_path) -> None:
    (layout, root), classes = data, data[0].classes
    weights = tmp_path / "student.safetensors"
    student.main(options_of(student, root, tmp_path, dataset=layout.name, max_steps=1))
    assert load_model(weights).class_names == classes.output_names

    common = {"datadir": root, "weights": weights, "num_workers": 0}
    scripts = f"eval.eval_{layout.name}_"
    if layout.name == "BDD100K":  # which has no scripts of its own
        scripts, common["dataset"] = "eval.eval_", layout.name
    score, paint = import_module(f"{scripts}iou"), import_module(f"{scripts}color")
    scores = tmp_path / "iou.json"
    score.main(get_type_hints(score.main)["options"](**common, json=scores, protocol="full"))
    written = json.loads(scores.read_text())
    assert list(written["per_class"]) == list(classes.names) and written["height"] == 64
    paint.main(get_type_hints(paint.main)["options"](**common, output_dir=tmp_path / "colour"))
    assert len(list((tmp_path / "colour").rglob("*.png"))) == 2
