"""Segmentations of ACDC images as pictures, under the data set's own paths.

    python eval/eval_ACDC_color.py --datadir /data/acdc --output-dir pictures
    python eval/eval_ACDC_color.py --datadir /data/acdc --subset test --train-ids --flat

Flags as in eval_cityscapes_color.py; the second line writes what the benchmark server takes: train
ids, where Cityscapes' server takes label ids, all in one folder.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cli import run
from eval.commands import paint
from eval.options import ColorOptions


def main(options: ColorOptions) -> None:
    """Render a model's predictions on ACDC."""
    paint("ACDC", options)


if __name__ == "__main__":
    run(main, ColorOptions)
