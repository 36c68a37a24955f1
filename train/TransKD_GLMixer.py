"""TransKD-GL: TransKD-Base with a Global-Local context Mixer on the deepest patch embedding.

Liu et al., "TransKD: Transformer Knowledge Distillation for Efficient Semantic Segmentation", arXiv 2202.13393.

    python train/TransKD_GLMixer.py --dataset cityscapes --datadir DIR --teacher-weights FILE

What is special about it:
    feature maps       as TransKD-Base: CSF and HCL
    patch embeddings   GL-Mixer: self-attention (global) and a gated convolution (local) mix the stage-4
                       embedding before PEA projects it
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli
from errors import UserError
from models.distillation import CrossSelectiveFusion, Distiller, GLMixer
from train.engine import start, train
from train.options import DistillationOptions


@dataclass(kw_only=True)
class Options(DistillationOptions):
    """Train a student with TransKD-GL (CSF and GL-Mixer)."""

    method = "TransKD_GL"

    add: bool = False
    """Add the embedding itself to what the mixer makes of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if GLMixer.MIXED_STAGE not in self.stages:
            raise UserError(
                f"--embed {self.embed} leaves out stage 4, the one that GL-Mixer mixes; use 4 or 5"
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
        alignment=GLMixer(*channels, options.stages, add=options.add),
        **options.losses(),
    )
    train(distiller, setup, options)


if __name__ == "__main__":
    cli.run(main, Options)
