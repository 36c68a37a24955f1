"""Segmentations of NYUv2 images (40 classes) as pictures.

python eval/eval_NYUv2_color.py --datadir data/nyuv2 --weights student.safetensors
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli
from eval.commands import ColorOptions, paint


def main(options: ColorOptions) -> None:
    paint("NYUv2", options)


if __name__ == "__main__":
    cli.run(main, ColorOptions)
