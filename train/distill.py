"""Any method by its name, the paper's baselines and ablations among them, under one recipe.

python train/distill.py --method reviewkd --dataset cityscapes --datadir DIR

- student            alone, without a teacher
- transkd_base       as by TransKDBase.py
- transkd_gl         as by TransKD_GLMixer.py
- transkd_gl_add     GL-Mixer that keeps the embedding
- transkd_ea         as by TransKD_EA.py
- gl_ea              GL-Mixer with EA
- csf, pea, ea       one part alone; --embed 1 … 4 aligns one stage alone
- reviewkd           Knowledge Review
- response           class probabilities
- cwd, cwd_logits    channel-wise, on features and on logits
- skd                pairwise similarities
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli
from models.distillation import Distiller
from models.distillation.methods import METHODS
from train.engine import train
from train.networks import load_teacher, new_student
from train.options import DistillingOptions
from train.setup import start

ALONE = "student"


@dataclass(kw_only=True)
class Options(DistillingOptions):
    """Train a student with any method."""

    method: Literal[(ALONE, *METHODS)]  # type: ignore[valid-type, misc]
    """The method."""


def main(options: Options) -> None:
    run = start(options)
    # The student is built first: one seed gives every method the same one.
    student = new_student(options.student, options.recipe, run.classes)
    if options.method == ALONE:
        train(Distiller(student, run.class_weights()), run)
        return
    # The teacher's classes must be the data set's where its logits are compared.
    method = METHODS[options.method]
    by_logits = method.compares_logits
    teacher = load_teacher(options.distillation, options.data.dataset, run.classes, by_logits)
    weights = run.class_weights()
    distiller = method.build(student, teacher.channels, weights, options.distillation)
    train(distiller, run, teacher)


if __name__ == "__main__":
    cli.run(main, Options)
