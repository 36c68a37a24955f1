"""IoU per class and mean of a model on NYUv2 (40 classes).

    python eval/eval_NYUv2_iou.py --datadir /data/nyuv2 --weights student.safetensors

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
    score("NYUv2", options)


if __name__ == "__main__":
    run(main, IoUOptions)
