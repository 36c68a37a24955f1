"""Segmentations of Cityscapes images as pictures, under the data set's own paths.

    python eval/eval_cityscapes_color.py --datadir /data/cityscapes --output-dir pictures
    python eval/eval_cityscapes_color.py --datadir /data/cityscapes --overlay 0.5
    python eval/eval_cityscapes_color.py --datadir /data/cityscapes --subset test --label-ids

The last one writes what the benchmark server takes. Other splits need no labels.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cli import run
from eval.commands import paint
from eval.options import ColorOptions


def main(options: ColorOptions) -> None:
    """Render a model's predictions on Cityscapes."""
    paint("cityscapes", options)


if __name__ == "__main__":
    run(main, ColorOptions)
