"""TransKD-EA: TransKD-Base with an Embedding Assistant of the teacher's width.

Liu et al., "TransKD: Transformer Knowledge Distillation for Efficient Semantic Segmentation",
arXiv 2202.13393.

    python train/TransKD_EA.py --dataset cityscapes --datadir DIR --teacher-weights FILE

What is special about it:
    feature maps       as TransKD-Base: CSF and HCL
    patch embeddings   EA: beside PEA's projection a second patch embedding, as wide as the
                       teacher's, looks at the student's features; a learned weighted sum of the two
                       is compared with the teacher's
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli
from models.distillation.methods import METHODS
from train.engine import train
from train.networks import load_teacher, new_student
from train.options import DistillingOptions
from train.setup import start


@dataclass(kw_only=True)
class Options(DistillingOptions):
    """Train a student with TransKD-EA (CSF and Embedding Assistant)."""

    method = "TransKD_EA"


def main(options: Options) -> None:
    run = start(options)
    # The student is built first: one seed gives every method the same one.
    student = new_student(options.student, options.recipe, run.classes)
    teacher = load_teacher(options.distillation, options.data.dataset, run.classes)
    # CSF and the Embedding Assistant, beside the student. They learn with it and are not deployed.
    method = METHODS["transkd_ea"]
    weights = run.class_weights()
    distiller = method.build(student, teacher.channels, weights, options.distillation)
    train(distiller, run, teacher)


if __name__ == "__main__":
    cli.run(main, Options)
