"""The images that networks do worst and best on: photograph, truth, and what each network makes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

from datasets import SceneDataset, open_split, to_float
from datasets.classes import Classes
from errors import UserError
from eval.inference import upsample
from eval.metrics import percent
from eval.rendering import colorize, legend, side_by_side, stack
from models import load_model

HEIGHT = 256  # pixels of a panel; a report must stay small enough to send
NEEDED = {"dataset", "datadir", "subset", "height", "weights", "per_image"}  # of an evaluation


@dataclass
class Example:
    """One image: its `panels` are photograph, truth and a prediction for each network, all titled."""

    kind: str
    """worst or best"""
    name: str
    """The image's path below the data folder."""
    classes: Classes
    panels: list[tuple[str, Image.Image]]
    present: set[int] = field(default_factory=set)
    """Classes that can be seen in some panel."""

    def picture(self) -> Image.Image:
        """All of it in one picture, with the classes' legend."""
        row = side_by_side(self.panels, HEIGHT)
        return stack([row, legend(self.classes, row.width, self.present)])


def choose(scores: Sequence[Mapping[str, float | None]], count: int) -> tuple[list[str], list[str]]:
    """The `count` images with the lowest, and those with the highest mean over the networks' scores, extreme first.

    Only images that every network has a score for; none is in both lists.
    """
    means: dict[str, float] = {}
    for name in scores[0] if scores else ():
        values = [value for score in scores if (value := score.get(name)) is not None]
        if len(values) == len(scores):
            means[name] = fmean(values)
    ranked = sorted(means, key=lambda name: (means[name], name))
    worst = ranked[:count]
    return worst, ranked[len(worst) :][: -count - 1 : -1] if count else []


@torch.inference_mode()
def find_examples(
    evaluations: Mapping[str, dict[str, Any]],
    *,
    count: int = 3,
    datadir: Path | None = None,
    device: torch.device | str = "cpu",
) -> tuple[list[Example], list[str]]:
    """The `count` worst and best images, and in words what could not be shown.

    `evaluations`: by name, what an IoU script's --json wrote; it names weights and data. `datadir` is where the data
    are now, if they have moved.
    """
    if not count:
        return [], []
    scored = {
        name: evaluation for name, evaluation in evaluations.items() if evaluation.keys() >= NEEDED
    }
    notes = [
        f"Worst and best images of {name}: its evaluation has no scores for each image, or doesn't say of which data; "
        "evaluate it by the IoU script's --json, or with --evaluate where there is no eval.json."
        for name in evaluations
        if name not in scored
    ]
    worst, best = choose([evaluation["per_image"] for evaluation in scored.values()], count)
    if scored and not worst:
        notes.append("Worst and best images: the evaluations have no image in common.")
    found: dict[str, Example] = {}
    for name, evaluation in scored.items() if worst else ():
        try:
            data = open_split(
                evaluation["dataset"],
                datadir or Path(evaluation["datadir"]),
                evaluation["subset"],
                height=evaluation["height"],
                cache=False,
            )
            places = {sample.name: place for place, sample in enumerate(data.samples)}
            if missing := [image for image in (*worst, *best) if image not in places]:
                raise UserError(f"{missing[0]} is not among the data")
            model = load_model(Path(evaluation["weights"])).to(device).eval()
        except UserError as error:
            notes.append(f"Worst and best images of {name}: {error}.")
            continue
        for image in (*worst, *best):
            place = places[image]
            if image not in found:
                found[image] = _begin("worst" if image in worst else "best", data, place)
            pixels = to_float(data[place].image[None].to(device))
            height, width = data.full_label(place).shape
            labels = upsample(model(pixels).logits[0], (height, width)).max(0).indices.cpu().numpy()
            _add(found[image], f"{name}: {percent(evaluation['per_image'][image])}", labels)
    return [found[image] for image in (*worst, *best) if image in found], notes


def _begin(kind: str, data: SceneDataset, place: int) -> Example:
    """An example with photograph and truth."""
    example = Example(
        kind, data.samples[place].name, data.classes, [("image", _fit(data.photograph(place)))]
    )
    _add(example, "truth", data.full_label(place))
    return example


def _add(example: Example, title: str, labels: np.ndarray) -> None:
    example.panels.append((title, _fit(colorize(labels, example.classes))))
    example.present |= set(np.unique(labels).tolist())


def _fit(picture: Image.Image) -> Image.Image:
    """At most `HEIGHT` high."""
    width = max(1, round(picture.width * HEIGHT / picture.height))
    return (
        picture
        if picture.height <= HEIGHT
        else picture.resize((width, HEIGHT), Image.Resampling.LANCZOS)
    )
