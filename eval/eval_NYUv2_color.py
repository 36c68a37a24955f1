"""Colour pictures of what a model predicts on NYUv2 (40 classes).

    python eval/eval_NYUv2_color.py --datadir /data/nyuv2 --weights student.safetensors

Flags as in eval_cityscapes_color.py.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cli import run
from eval.commands import paint
from eval.options import ColorOptions


def main(options: ColorOptions) -> None:
    paint("NYUv2", options)


if __name__ == "__main__":
    run(main, ColorOptions)
