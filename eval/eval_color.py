"""Segmentations of any data set's images as pictures, under its own paths; your own data included.

python eval/eval_color.py --dataset mine --datadir data/mine --weights student.safetensors
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli
from datasets import DATASETS
from eval.commands import ColorOptions, render


@dataclass(kw_only=True)
class Options(ColorOptions):
    dataset: Literal[DATASETS]  # type: ignore[valid-type]
    """The data set: its layout, classes and labels."""


def main(options: Options) -> None:
    render(options.dataset, options)


if __name__ == "__main__":
    cli.run(main, Options)
