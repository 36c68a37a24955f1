"""IoU per class and mean of a model on NYUv2 (40 classes).

python eval/eval_NYUv2_iou.py --datadir data/nyuv2 --weights student.safetensors
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli
from eval.commands import IoUOptions, score


def main(options: IoUOptions) -> None:
    score("NYUv2", options)


if __name__ == "__main__":
    cli.run(main, IoUOptions)
