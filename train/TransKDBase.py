"""TransKD-Base: distil a large SegFormer into a small one by feature maps and patch embeddings.

Liu et al., "TransKD: Transformer Knowledge Distillation for Efficient Semantic Segmentation", arXiv 2202.13393.

    python train/TransKDBase.py --dataset cityscapes --datadir DIR --teacher-weights FILE

What is special about it:
    feature maps       Cross Selective Fusion (CSF), then the hierarchical context loss (HCL)
    patch embeddings   Patch Embedding Alignment (PEA), one Linear a stage, then mean squared error
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli
from models.distillation import CrossSelectiveFusion, Distiller, PatchEmbeddingAlignment
from train.engine import start, train
from train.options import DistillationOptions


@dataclass(kw_only=True)
class Options(DistillationOptions):
    """Train a student with TransKD-Base (CSF and PEA)."""

    method = "TransKDBase"


def main(options: Options) -> None:
    setup = start(options)
    student, teacher = options.student(setup.classes), options.teacher(setup.classes)
    channels = student.channels, teacher.channels
    distiller = Distiller(
        student,
        setup.classes.weights,
        teacher=teacher,
        fusion=CrossSelectiveFusion(*channels),
        alignment=PatchEmbeddingAlignment(*channels, options.stages) if options.stages else None,
        **options.losses(),
    )
    train(distiller, setup, options)


if __name__ == "__main__":
    cli.run(main, Options)
