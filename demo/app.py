"""A page to try networks on: drop a photograph, see what each makes of it, and how fast.

    pip install -r requirements/app.txt
    python demo/app.py --weights outputs/demo/student/student.safetensors FILE …

It listens on this machine alone, unless `--host 0.0.0.0` is given.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli  # isort: skip  # before torch

import numpy as np
from PIL import Image

from datasets import DATASETS
from errors import require
from eval.predictor import Predictor
from eval.rendering import legend


@dataclass(kw_only=True)
class Options:
    """Try networks in a browser."""

    weights: tuple[Path, ...]
    """Files or folders of any recognised kind, ONNX files, or names of the Hugging Face hub."""
    dataset: Literal[DATASETS] = "cityscapes"  # type: ignore[valid-type]
    """The data set whose classes the networks know."""
    height: int | None = None
    """Photographs are resized so that their shorter side has this many pixels. Default: what each
    network was trained with, or 512."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one. ONNX files run on the CPU."""
    host: str = "127.0.0.1"
    """The address to listen on."""
    port: int = 7860
    """The port to listen on."""


def predictions(
    predictors: dict[str, Predictor], photo: np.ndarray | None, share: float
) -> list[Any]:
    """Each network's picture with its caption, then the legend of the classes that were found.

    `photo` is (H, W, 3) uint8, `share` that of colour in the blend with it, 0 to 1.
    """
    if photo is None:
        return [[], None]
    picture = Image.fromarray(photo).convert("RGB")
    gallery, present = [], set()
    for name, predictor in predictors.items():
        start = time.perf_counter()
        labels, colours = predictor(picture)
        milliseconds = 1000 * (time.perf_counter() - start)
        present |= set(np.unique(labels).tolist())
        gallery.append((Image.blend(picture, colours, share), f"{name}: {milliseconds:.0f} ms"))
    classes = next(iter(predictors.values())).classes
    return [gallery, legend(classes, 900, present)]


def main(options: Options) -> None:
    require("gradio", "-r requirements/app.txt")
    import gradio

    predictors = {}
    for path in options.weights:
        name = "/".join(path.parts[-2:])
        predictors[name] = Predictor(
            path, dataset=options.dataset, height=options.height, device=options.device
        )
        predictors[name](np.zeros((64, 128, 3), np.uint8))  # the first call is slow
    with gradio.Blocks(title="TransKD") as page:
        gradio.Markdown("# TransKD\nDrop a photograph of a street.")
        with gradio.Row():
            photo = gradio.Image(type="numpy", label="photograph")
            share = gradio.Slider(0, 1, 0.6, step=0.05, label="share of colour")
        columns = min(len(predictors), 3)
        gallery = gradio.Gallery(label="predictions", columns=columns, object_fit="contain")
        colours = gradio.Image(show_label=False, buttons=[], interactive=False)

        def show(image: np.ndarray | None, blend: float) -> list[Any]:
            return predictions(predictors, image, blend)

        for change in (photo.change, share.release):
            change(show, [photo, share], [gallery, colours])
    page.launch(server_name=options.host, server_port=options.port, quiet=True)


if __name__ == "__main__":
    cli.run(main, Options)
