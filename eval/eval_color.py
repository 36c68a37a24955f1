"""Segmentations of any data set's images as pictures, under its own paths; your own data included.

    python eval/eval_color.py --dataset mine --datadir /data/mine --weights student.safetensors --output-dir pictures

Sizes, overlays and id maps as in eval_cityscapes_color.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):  # run from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cli import run
from datasets import DATASETS
from eval.commands import paint
from eval.options import ColorOptions


@dataclass(kw_only=True)
class Options(ColorOptions):
    dataset: Literal[DATASETS]  # type: ignore[valid-type]
    """The data set: its layout, classes and labels."""


def main(options: Options) -> None:
    paint(options.dataset, options)


if __name__ == "__main__":
    run(main, Options)
