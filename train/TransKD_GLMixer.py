"""TransKD-GL: TransKD-Base with a Global-Local context Mixer on the deepest patch embedding.

Liu et al., "TransKD: Transformer Knowledge Distillation for Efficient Semantic Segmentation",
arXiv 2202.13393.

    python train/TransKD_GLMixer.py --dataset cityscapes --datadir DIR --teacher-weights FILE

What is special about it:
    feature maps       as TransKD-Base: CSF and HCL
    patch embeddings   GL-Mixer: self-attention (global) and a gated convolution (local) mix the
                       stage-4 embedding before PEA projects it
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
    """Train a student with TransKD-GL (CSF and GL-Mixer)."""

    method = "TransKD_GL"

    add: bool = False
    """Add the embedding itself to what the mixer makes of it."""


def main(options: Options) -> None:
    run = start(options)
    # The student is built first: one seed gives every method the same one.
    student = new_student(options.student, options.recipe, run.classes)
    teacher = load_teacher(options.distillation, options.data.dataset, run.classes)
    # CSF and GL-Mixer, beside the student. They learn with it and are not deployed.
    method = METHODS["transkd_gl_add" if options.add else "transkd_gl"]
    weights = run.class_weights()
    distiller = method.build(student, teacher.channels, weights, options.distillation)
    train(distiller, run, teacher)


if __name__ == "__main__":
    cli.run(main, Options)
