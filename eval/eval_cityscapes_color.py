"""Segmentations of Cityscapes images as pictures, under the data set's own paths.

    python eval/eval_cityscapes_color.py --datadir data/cityscapes --weights student.safetensors
    python eval/eval_cityscapes_color.py --datadir data/cityscapes --overlay 0.5
    python eval/eval_cityscapes_color.py --datadir data/cityscapes --subset test --label-ids

The last one writes what the benchmark server takes. No labels are needed.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli
from eval.commands import ColorOptions, render


def main(options: ColorOptions) -> None:
    render("cityscapes", options)


if __name__ == "__main__":
    cli.run(main, ColorOptions)
