"""IoU per class and mean of a model on ACDC: all conditions, then fog, night, rain and snow.

    python eval/eval_ACDC_iou.py --datadir /data/acdc --distillation-type TransKD_EA
    python eval/eval_ACDC_iou.py --datadir /data/acdc --weights student.safetensors

The overall figure counts the pixels of all conditions together; it is not the mean of the four.
Protocols and `--json` as in eval_cityscapes_iou.py.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cli import run
from eval.commands import score
from eval.options import IoUOptions


def main(options: IoUOptions) -> None:
    """Score a model on ACDC, overall and per condition."""
    score("ACDC", options)


if __name__ == "__main__":
    run(main, IoUOptions)
