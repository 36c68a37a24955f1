"""NYUv2, Pascal VOC 2012 and BDD100K on small trees of their layouts: from files to scores."""

import json

import numpy as np
import pytest

from datasets import LAYOUTS
from datasets.classes import colormap
from eval import eval_color, eval_iou
from models import load_model
from tests.runs import options_of
from tests.trees import write
from train import student

VALUES = {  # which label files hold
    "NYUv2": [0, 1, 40],
    "VOC2012": [0, 1, 20, 255],
    "BDD100K": [0, 18, 255],
}


def test_colours_of_the_challenge() -> None:
    """The first and the last of the colours that VOC's development kit gives."""
    colours = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [0, 64, 128]]
    assert colormap(21)[[0, 1, 2, 15, 20]].tolist() == colours


@pytest.mark.parametrize("name", VALUES)
def test_train_evaluate_and_render(name, tmp_path) -> None:
    """Images of different sizes, as VOC's are."""
    root, rng, layout = tmp_path / "data", np.random.default_rng(0), LAYOUTS[name]
    for subset, images in (("train", ["1", "2", "3"]), ("val", ["4", "5"])):
        for i, image in enumerate(images):
            size = (70 + 10 * i, 90)
            photograph = root / layout.images.format(subset=subset) / f"{image}.jpg"
            write(photograph, rng.integers(0, 256, (*size, 3)))
            label = root / layout.labels.format(subset=subset) / f"{image}.png"
            write(label, rng.choice(VALUES[name], size))
        if layout.list_file:
            listed = root / layout.list_file.format(subset=subset)
            listed.parent.mkdir(parents=True, exist_ok=True)
            listed.write_text("\n".join(images))

    student.main(options_of(student, root, tmp_path / "run", dataset=name, max_steps=1))
    weights = tmp_path / "run" / "student.safetensors"
    assert load_model(weights).class_names == layout.classes.output_names

    common = {"dataset": name, "datadir": root, "weights": weights, "num_workers": 0}
    scores = tmp_path / "iou.json"
    eval_iou.main(eval_iou.Options(**common, json=scores, protocol="full"))
    written = json.loads(scores.read_text())
    assert list(written["per_class"]) == list(layout.classes.names) and written["height"] == 64
    eval_color.main(eval_color.Options(**common, output_dir=tmp_path / "colour"))
    assert len(list((tmp_path / "colour").rglob("*.png"))) == 2
