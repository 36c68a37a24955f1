"""Scenes in files: names and folders of Cityscapes or ACDC, drawn by several processes."""

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from datasets.classes import CITYSCAPES
from datasets.synthetic.scene import draw_scene
from datasets.synthetic.weather import WEATHERS
from errors import UserError
from files import atomic_write

GENERATOR = 1  # raise it when the same settings give other pictures
CITIES = {"train": ("altstadt", "neustadt", "weststadt"), "val": ("hafen",)}


@dataclass(frozen=True)
class Options:
    """Draws a procedural road-scene data set in the layout of Cityscapes or ACDC."""

    output: Path
    """Root of the data set: new or empty, or drawn before with the same options (only what lacks is drawn)."""
    dataset: Literal["cityscapes", "ACDC"] = "cityscapes"
    """Whose folders and file names; ACDC comes in fog, night, rain and snow."""
    train: int = 64
    """Images in the train split (ACDC: of each condition)."""
    val: int = 16
    """Images in the val split (ACDC: of each condition)."""
    height: int = 128
    """Image height in pixels."""
    width: int = 256
    """Image width in pixels."""
    seed: int = 0
    """Images depend on the seed, their split, condition and number, and on nothing else."""
    label_ids: bool = False
    """Write *_labelIds.png, as the archives have, instead of *_labelTrainIds.png."""
    workers: int | None = None
    """Processes that draw; by default as many as there are cores."""


class Scene(NamedTuple):
    image: Path
    label: Path
    weather: str
    seed: tuple[int, ...]


def scenes(options: Options) -> list[Scene]:
    """The scenes of the data set, whether drawn already or not."""
    acdc, kind = options.dataset == "ACDC", "labelIds" if options.label_ids else "labelTrainIds"
    root, found = options.output, []
    for split, count in (("train", options.train), ("val", options.val)):
        for weather, i in itertools.product(WEATHERS[1:] if acdc else WEATHERS[:1], range(count)):
            if acdc:
                # no two drives have one name: the benchmark server wants all images in one folder
                number = (
                    1000 * WEATHERS.index(weather) + i // 100 + (1 if split == "train" else 501)
                )
                drive = f"GOPR{number:04}"
                stem = f"{weather}/{split}/{drive}/{drive}_frame_{41 + i % 100 * 10:06}"
                image, label = (
                    root / f"rgb_anon/{stem}_rgb_anon.png",
                    root / f"gt/{stem}_gt_{kind}.png",
                )
            else:
                city = CITIES[split][i % len(CITIES[split])]
                stem = f"{split}/{city}/{city}_{i:06}_000019"
                image, label = (
                    root / f"leftImg8bit/{stem}_leftImg8bit.png",
                    root / f"gtFine/{stem}_gtFine_{kind}.png",
                )
            found.append(
                Scene(
                    image,
                    label,
                    weather,
                    (options.seed, int(split == "val"), WEATHERS.index(weather), i),
                )
            )
    return found


def draw_files(scene: Scene, height: int, width: int, label_ids: bool) -> None:
    image, labels = draw_scene(np.random.default_rng(scene.seed), height, width, scene.weather)
    if label_ids:
        # 255 is beyond the end, where the label id for ignore stands
        labels = np.take(np.array(CITYSCAPES.label_ids, np.uint8), labels, mode="clip")
    for path, pixels in ((scene.label, labels), (scene.image, image)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as aside:
            Image.fromarray(pixels).save(aside, format="PNG")


def write_dataset(
    root: Path | str, dataset: Literal["cityscapes", "ACDC"] = "cityscapes", **settings: Any
) -> Path:
    """Draw the data set that `Options(root, dataset, **settings)` describes, and return its root.

    Files that are there already stay. Raises `UserError` if `root` holds anything but this very data set
    (whose settings stand in its `dataset.json`), and for counts and sizes that make no sense.
    """
    return draw_dataset(Options(Path(root), dataset, **settings), progress=False)


def draw_dataset(options: Options, progress: bool) -> Path:
    check(options)
    claim(options)
    wanted = scenes(options)
    todo = [scene for scene in wanted if not (scene.image.exists() and scene.label.exists())]
    start = time.perf_counter()
    for i, _ in enumerate(draw_all(todo, options), 1):
        if progress and (i == len(todo) or (i % 10 == 0 and sys.stderr.isatty())):
            rate, end = i / (time.perf_counter() - start), "\n" if i == len(todo) else ""
            print(
                f"\r{i} of {len(todo)} scenes drawn, {rate:.1f} a second ",
                end=end,
                file=sys.stderr,
                flush=True,
            )
    if progress:
        print(f"{options.output}: {len(wanted)} scenes, {len(todo)} of them new")
    return options.output


def check(options: Options) -> None:
    numbers, workers = (options.train, options.val, options.seed), options.workers
    if (
        min(options.height, options.width) < 32
        or min(numbers) < 0
        or (workers is not None and workers < 1)
    ):
        raise UserError(
            "height and width start at 32, train, val and seed at 0, workers at 1; choose larger ones"
        )
    if options.dataset not in ("cityscapes", "ACDC"):
        raise UserError(f"there is no data set {options.dataset!r}; choose cityscapes or ACDC")


def claim(options: Options) -> None:
    """Write the settings into the folder, unless something else is there."""
    root = options.output
    settings = {
        key: value for key, value in asdict(options).items() if key not in ("output", "workers")
    }
    text = json.dumps({"generator": GENERATOR, **settings}, indent=2) + "\n"
    note = root / "dataset.json"
    empty = not root.exists() or (root.is_dir() and not any(root.iterdir()))
    if not empty and not (note.is_file() and note.read_text() == text):
        raise UserError(
            f"{root} holds something else than this data set; empty it or choose another folder"
        )
    if empty:
        root.mkdir(parents=True, exist_ok=True)
        note.write_text(text)


def draw_all(todo: list[Scene], options: Options) -> Iterator[None]:
    """Draw the scenes, and yield after each."""
    draw = partial(
        draw_files, height=options.height, width=options.width, label_ids=options.label_ids
    )
    processes = options.workers or min(os.cpu_count() or 1, 1 + len(todo) // 64)
    if processes == 1:
        yield from map(draw, todo)
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            yield from pool.map(draw, todo, chunksize=8)
