"""IoU per class and mean of a model on Pascal VOC 2012 (21 classes).

    python eval/eval_VOC2012_iou.py --datadir /data/voc2012 --weights student.safetensors

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
    score("VOC2012", options)


if __name__ == "__main__":
    run(main, IoUOptions)
