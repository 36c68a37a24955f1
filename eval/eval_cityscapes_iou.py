"""IoU per class and mean of a model on Cityscapes.

    python eval/eval_cityscapes_iou.py --datadir /data/cityscapes --distillation-type TransKDBase
    python eval/eval_cityscapes_iou.py --datadir /data/cityscapes --weights student.safetensors

The default protocol is the paper's: quarter-size maps are compared. `--protocol full` compares at
the labels' own size, which is the figure to hold against other papers. `--json` keeps the result.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cli import run
from eval.commands import score
from eval.options import IoUOptions


def main(options: IoUOptions) -> None:
    """Score a model on Cityscapes."""
    score("cityscapes", options)


if __name__ == "__main__":
    run(main, IoUOptions)
