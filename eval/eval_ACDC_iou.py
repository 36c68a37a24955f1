"""IoU per class and mean of a model on ACDC: all conditions, then fog, night, rain and snow.

    python eval/eval_ACDC_iou.py --datadir data/ACDC --weights student.safetensors

The overall figure counts the pixels of all conditions together; it is not the mean of the four.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli
from eval.commands import IoUOptions, score


def main(options: IoUOptions) -> None:
    score("ACDC", options)


if __name__ == "__main__":
    cli.run(main, IoUOptions)
