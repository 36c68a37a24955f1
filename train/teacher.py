"""The teacher: a large SegFormer, fine-tuned from ImageNet weights with cross entropy.

    python train/teacher.py --dataset cityscapes --datadir DIR

It starts from `ckpt_pretrained/` (`--teacher-weights FILE` names other weights, `--from-scratch` none) and writes
teacher.safetensors (last) and teacher_best.safetensors, for `--teacher-weights` of the distillation scripts.
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
from train.options import TrainingOptions, pretrained_path


@dataclass(kw_only=True)
class Options(TrainingOptions):
    """Train a teacher."""

    method = "teacher"
    network = "teacher"

    batch_size: int = 8
    """Images a step."""
    teacher_model: Literal[MODELS] = "segformer_b2"  # type: ignore[valid-type]
    """Architecture."""
    teacher_weights: Path | None = None
    """Start from these weights (an ImageNet encoder or a whole network) instead of ckpt_pretrained/."""
    from_scratch: bool = False
    """Start from random weights."""


def main(options: Options) -> None:
    setup = start(options)
    teacher = options.new_model(options.teacher_model, setup.classes)
    start_from = None if options.from_scratch else options.teacher_weights or pretrained_path(options.teacher_model)
    options.load_start(teacher, start_from)
    train(Distiller(teacher, setup.classes.weights), setup, options)


if __name__ == "__main__":
    cli.run(main, Options)
