"""The student alone, without a teacher: what distillation has to beat.

    python train/student.py --dataset cityscapes --datadir DIR

Published: 500 epochs at batch 4, from scratch (`--student-pretrained` starts from ImageNet weights).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli
from models.distillation import Distiller
from train.engine import start, train
from train.options import StudentOptions


@dataclass(kw_only=True)
class Options(StudentOptions):
    """Train a student alone, with cross entropy."""

    method = "student"

    num_epochs: int = 500
    """Passes over the training images."""
    batch_size: int = 4
    """Images a step. A larger batch at the same number of epochs means fewer steps."""


def main(options: Options) -> None:
    setup = start(options)
    student = options.student(setup.classes)
    train(Distiller(student, setup.classes.weights), setup, options)


if __name__ == "__main__":
    cli.run(main, Options)
