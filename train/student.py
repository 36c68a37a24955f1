"""The student alone, without a teacher: what distillation has to beat.

    python train/student.py --dataset cityscapes --datadir DIR

The paper's row is trained from scratch; the published script starts from ImageNet weights by
default (here: --student-pretrained). Published: 500 epochs at batch size 4.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli
from models.distillation import Distiller
from train.engine import train
from train.flags import RecipeOptions, StudentOptions
from train.networks import new_student
from train.options import TrainingOptions
from train.setup import start


@dataclass(kw_only=True)
class Options(TrainingOptions):
    """Train a student alone, with cross entropy."""

    method = "student"
    published_batch_size = 4

    recipe: RecipeOptions = field(
        default_factory=lambda: RecipeOptions(num_epochs=500, batch_size=4)
    )
    student: StudentOptions = field(default_factory=StudentOptions)


def main(options: Options) -> None:
    run = start(options)
    student = new_student(options.student, options.recipe, run.classes)
    # A distiller without a teacher: cross entropy alone.
    train(Distiller(student, run.class_weights()), run)


if __name__ == "__main__":
    cli.run(main, Options)
