"""The teacher: a large SegFormer, fine-tuned from ImageNet weights with cross entropy.

    python train/teacher.py --dataset cityscapes --datadir DIR

It starts from `ckpt_pretrained/` (`--teacher-weights` names other weights, `--from-scratch` none)
and writes teacher.safetensors (last) and teacher_best.safetensors, for `--teacher-weights` of the
distillation scripts.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli
from models.distillation import Distiller
from train.engine import train
from train.flags import Model, RecipeOptions, local
from train.networks import new_network
from train.options import TrainingOptions
from train.setup import start


@dataclass(kw_only=True)
class TeacherOptions:
    """The network that learns."""

    teacher_model: Model = "segformer_b2"
    """Architecture: segformer_b0 … b5, pvt_v2_b0 … b5, or lvt."""
    teacher_weights: Path | None = local(None)
    """Start from these weights (an ImageNet encoder or a whole network; a file, or a name of the
    Hugging Face hub) instead of ckpt_pretrained/."""
    from_scratch: bool = False
    """Start from random weights."""


@dataclass(kw_only=True)
class Options(TrainingOptions):
    """Train a teacher."""

    method = "teacher"
    network = "teacher"
    published_batch_size = 8

    recipe: RecipeOptions = field(default_factory=lambda: RecipeOptions(batch_size=8))
    teacher: TeacherOptions = field(default_factory=TeacherOptions)


def main(options: Options) -> None:
    run = start(options)
    chosen = options.teacher
    network = new_network(
        chosen.teacher_model,
        options.recipe,
        run.classes,
        chosen.teacher_weights,
        pretrained=not chosen.from_scratch,
    )
    # A distiller without a teacher: cross entropy alone.
    train(Distiller(network, run.class_weights()), run)


if __name__ == "__main__":
    cli.run(main, Options)
