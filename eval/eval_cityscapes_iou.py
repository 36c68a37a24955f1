"""IoU per class and mean of a model on Cityscapes.

    python eval/eval_cityscapes_iou.py --datadir data/cityscapes --weights student.safetensors

The default protocol is the paper's: quarter-size maps are compared. `--protocol full` compares at
the labels' own size, which is the figure to hold against other papers. `--json` keeps the result.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli
from eval.commands import IoUOptions, score


def main(options: IoUOptions) -> None:
    score("cityscapes", options)


if __name__ == "__main__":
    cli.run(main, IoUOptions)
