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
from errors import UserError
from models.distillation import Distiller
from models.factory import MODELS
from train.engine import start, train
from train.options import TrainingOptions, existing_weights, pretrained_path


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.from_scratch and self.teacher_weights is not None:
            raise UserError(
                "--from-scratch starts from no weights; leave it or --teacher-weights out"
            )

    def find_weights(self) -> None:
        self.teacher_start()

    def teacher_start(self) -> Path | None:
        """The weights to start from, if any. Raises UserError if they are missing."""
        if self.teacher_weights is not None:
            return existing_weights(self.teacher_weights, "--teacher-weights")
        if self.from_scratch:
            return None
        return pretrained_path(self.teacher_model, ", or start without them by --from-scratch")


def main(options: Options) -> None:
    setup = start(options)
    teacher = options.new_model(options.teacher_model, setup.classes)
    options.load_start(teacher, options.teacher_start())
    train(Distiller(teacher, setup.classes.weights), setup, options)


if __name__ == "__main__":
    cli.run(main, Options)
