"""Drawn road scenes in the layout of Cityscapes or ACDC: a data set without a download.

    python -m demo.scenes --output data/drawn --train 400 --val 80
    python -m demo.scenes --output data/weathers --dataset ACDC

A street is laid out at random (`demo.street`), painted in polygons, the far ones first, and lit
pixel by pixel (`demo.painting`). Colours are drawn anew for every thing, from palettes that classes
share: shape and place tell what it is. A call that was interrupted continues where it stopped.
"""

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
from PIL import Image

import cli
from datasets.classes import CITYSCAPES
from demo.painting import Canvas, shade
from demo.street import paint_street
from errors import UserError
from files import atomic_write, read_json, write_json
from progress import track

WEATHERS = ("clear", "fog", "night", "rain", "snow")
CITIES = {"train": ("altstadt", "neustadt", "weststadt"), "val": ("hafen",)}


@dataclass(frozen=True)
class Options:
    output: Path  # folder of the data set
    dataset: Literal["cityscapes", "ACDC"] = "cityscapes"  # ACDC: in fog, night, rain and snow
    train: int = 64  # scenes in the train split (ACDC: of each weather)
    val: int = 16  # scenes in the val split (ACDC: of each weather)
    height: int = 128  # of the images, in pixels
    width: int = 256  # of the images, in pixels
    seed: int = 0  # a scene depends on it, on split, weather and number, and on nothing else
    label_ids: bool = False  # write *_labelIds.png, as the archives have, not *_labelTrainIds.png


def draw_scene(
    rng: np.random.Generator, height: int, width: int, weather: str = "clear"
) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 (height, width, 3) and labels uint8 (height, width): train ids, 255 is ignored.

    Another weather changes the image only: the same things stand in the same places.
    """
    # Twice as large: the image is averaged down, of the labels every other pixel is kept.
    canvas = Canvas(Random(int(rng.integers(2**63))), 2 * height, 2 * width)
    paint_street(canvas)
    colour = np.clip(shade(canvas, weather) * canvas.random.uniform(0.9, 1.2), 0, 1)
    image = np.asarray(Image.fromarray((colour * 255).astype(np.uint8)).reduce(2))
    image = image + rng.normal(0, canvas.random.uniform(1.5, 4.5), (height, width, 1))
    labels = np.array([paint.label for paint in canvas.paints], np.uint8)
    return np.clip(image, 0, 255).astype(np.uint8), labels[np.asarray(canvas.numbers)[::2, ::2]]


def scenes(options: Options) -> Iterator[Any]:
    """Yield, for each scene, the files of its image and label, its weather, and its seed."""
    acdc = options.dataset == "ACDC"
    photo, truth = ("rgb_anon", "gt") if acdc else ("leftImg8bit", "gtFine")
    kind = "labelIds" if options.label_ids else "labelTrainIds"
    counts = {"train": options.train, "val": options.val}
    for split, weather in itertools.product(counts, WEATHERS[1:] if acdc else WEATHERS[:1]):
        for i in range(counts[split]):
            if acdc:  # no two drives have one name: the benchmark wants all images in one folder
                first = 1000 * WEATHERS.index(weather) + {"train": 1, "val": 501}[split]
                drive = f"GOPR{first + i // 100}"
                stem = f"{weather}/{split}/{drive}/{drive}_frame_{41 + i % 100 * 10:06}"
            else:
                city = CITIES[split][i % len(CITIES[split])]
                stem = f"{split}/{city}/{city}_{i:06}_000019"
            image = options.output / photo / f"{stem}_{photo}.png"
            label = options.output / truth / f"{stem}_{truth}_{kind}.png"
            yield image, label, weather, (options.seed, split == "val", WEATHERS.index(weather), i)


def draw_files(options: Options, scene: Any) -> None:
    """Draw a scene and write its two files, each aside and then in one step."""
    image_path, label_path, weather, seed = scene
    image, labels = draw_scene(np.random.default_rng(seed), options.height, options.width, weather)
    if options.label_ids:  # the last of them stands for what is ignored
        labels = np.take(np.array(CITYSCAPES.label_ids, np.uint8), labels, mode="clip")
    for path, pixels in ((label_path, labels), (image_path, image)):
        with atomic_write(path) as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG", compress_level=1)


def main(options: Options) -> None:
    # What is drawn is kept, so it must be what is asked for now. More may be added.
    record = options.output / "scenes.json"
    asked = asdict(options) | {"output": ""}
    before = read_json(record) or asked
    fewer = any(asked[split] < before[split] for split in CITIES)
    if fewer or asked != before | {split: asked[split] for split in CITIES}:
        raise UserError(f"{options.output} holds other scenes; remove it, or name another folder")
    write_json(asked, record)
    todo = [scene for scene in scenes(options) if not (scene[0].exists() and scene[1].exists())]
    workers = min(os.cpu_count() or 1, 1 + len(todo) // 64)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        draw = partial(draw_files, options)
        drawn = map(draw, todo) if workers == 1 else pool.map(draw, todo, chunksize=8)
        for _ in track(drawn, "drawing", total=len(todo), unit="scenes"):
            pass


def write_dataset(root: Path | str, dataset: Any = "cityscapes", **options: Any) -> Path:
    """Draw the data set of `Options(root, dataset, **options)`, and return its root."""
    main(Options(Path(root), dataset, **options))
    return Path(root)


if __name__ == "__main__":
    cli.run(main, Options)
