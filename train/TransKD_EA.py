"""TransKD-EA: TransKD-Base with an Embedding Assistant of the teacher's width.

Liu et al., "TransKD: Transformer Knowledge Distillation for Efficient Semantic Segmentation", arXiv 2202.13393.

    python train/TransKD_EA.py --dataset cityscapes --datadir DIR --teacher-weights FILE

What is special about it:
    feature maps       as TransKD-Base: CSF and HCL
    patch embeddings   EA: beside PEA's projection a second patch embedding, as wide as the teacher's, looks at
                       the student's features; a learned weighted sum of the two is compared with the teacher's
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli
from errors import UserError
from models.distillation import CrossSelectiveFusion, Distiller, EmbeddingAssistant
from train.engine import start, train
from train.options import DistillationOptions


@dataclass(kw_only=True)
class Options(DistillationOptions):
    """Train a student with TransKD-EA (CSF and Embedding Assistant)."""

    method = "TransKD_EA"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages:
            raise UserError(
                "--embed 0 leaves nothing for the Embedding Assistant to do; use TransKDBase.py"
            )


def main(options: Options) -> None:
    setup = start(options)
    student, teacher = options.student(setup.classes), options.teacher(setup.classes)
    channels = student.channels, teacher.channels
    distiller = Distiller(
        student,
        setup.classes.weights,
        teacher=teacher,
        fusion=CrossSelectiveFusion(*channels),
        alignment=EmbeddingAssistant(*channels, options.stages),
        **options.losses(),
    )
    train(distiller, setup, options)


if __name__ == "__main__":
    cli.run(main, Options)
