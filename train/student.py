"""The student alone, without a teacher: what distillation has to beat.

    python train/student.py --dataset cityscapes --datadir DIR

Published: 500 epochs at batch 4, from scratch (`--student-pretrained` starts from ImageNet weights).
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli
from models.distillation import Distiller
from models.factory import MODELS
from train.engine import start, train
from train.options import TrainingOptions, new_student


@dataclass(kw_only=True)
class Options(TrainingOptions):
    """Train a student alone, with cross entropy."""

    method = "student"

    num_epochs: int = 500
    """Passes over the training images."""
    batch_size: int = 4
    """Images a step. A larger batch at the same number of epochs means fewer steps."""
    student_model: Literal[MODELS] = "segformer_b0"  # type: ignore[valid-type]
    """Architecture."""
    student_weights: Path | None = None
    """Start from these weights (an ImageNet encoder or a whole network) instead of from scratch."""
    student_pretrained: bool = False
    """Start from the ImageNet encoder in ckpt_pretrained/."""


def main(options: Options) -> None:
    setup = start(options)
    student = new_student(options, setup.classes.num_outputs)
    train(Distiller(student, setup.classes.weights), setup, options)


if __name__ == "__main__":
    cli.run(main, Options)
