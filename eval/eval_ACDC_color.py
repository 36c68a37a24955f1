"""Segmentations of ACDC images as pictures, under the data set's own paths.

    python eval/eval_ACDC_color.py --datadir data/ACDC --weights student.safetensors
    python eval/eval_ACDC_color.py --datadir data/ACDC --subset test --train-ids --flat

The last one writes what the benchmark server takes: train ids, all in one folder.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli
from eval.commands import ColorOptions, render


def main(options: ColorOptions) -> None:
    render("ACDC", options)


if __name__ == "__main__":
    cli.run(main, ColorOptions)
