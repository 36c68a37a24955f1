"""Any method by its name, the paper's baselines and ablations among them, under one recipe.

python train/distill.py --method reviewkd --dataset cityscapes --datadir DIR --teacher-weights FILE

student                           alone, without a teacher
transkd_base, _gl, _ea            the paper's methods, as by their own scripts
transkd_gl_add, gl_ea             GL-Mixer that keeps the embedding; GL-Mixer with EA
csf, pea, ea                      one part alone; --embed 1 … 4 aligns one stage alone
reviewkd                          Knowledge Review
response, cwd, cwd_logits, skd    class probabilities; channel-wise on features, on logits; pairwise
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli
from errors import UserError
from models.distillation import Distiller
from models.distillation.methods import LOGITS, METHODS, Settings
from train.engine import start, train
from train.options import DistillationOptions, last_value

ALONE = "student"
NAMES = (ALONE, *METHODS)


@dataclass(kw_only=True)
class Options(DistillationOptions):
    """Train a student with any method."""

    method: Literal[NAMES]  # type: ignore[valid-type, misc]
    """The method."""
    kd_weight: float | None = None
    """Weight of the loss of response, cwd, cwd_logits, skd. Default: the method's own."""
    kd_temperature: float | None = None
    """Temperature of response, cwd, cwd_logits. Default: the method's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("kd_weight", least=0)
        self.require("kd_temperature", above=0)
        if self.method == ALONE:
            self.settings.refuse_others()
            for name in ("validate_teacher", "teacher_weights", "teacher_model"):
                if getattr(self, name) != getattr(DistillationOptions, name):
                    flag = f"--{name.replace('_', '-')}"
                    raise UserError(
                        f"{flag}: --method {ALONE} learns without a teacher; leave it out"
                    )
        if self.logits_weight and self.method in (ALONE, "response"):
            reason = (
                "learns without a teacher"
                if self.method == ALONE
                else "has this loss already, as --kd-weight"
            )
            raise UserError(
                f"--logits-weight is {self.logits_weight}; --method {self.method} {reason}"
            )

    @classmethod
    def defaults(cls, arguments: list[str]) -> Self | None:
        """As in other scripts, but a recipe's loss between logits is for methods that don't compare them already."""
        options = super().defaults(arguments)
        if options is not None and last_value(arguments, "--method") in (ALONE, *LOGITS):
            options.logits_weight = 0.0
        return options

    def find_weights(self) -> None:
        self.student_start() if self.method == ALONE else super().find_weights()

    @property
    def compares_logits(self) -> bool:
        return super().compares_logits or self.method in LOGITS

    @property
    def settings(self) -> Settings:
        own = {"weight": self.kd_weight, "temperature": self.kd_temperature}
        return Settings(
            self.stages,
            self.losses(),
            {name: value for name, value in own.items() if value is not None},
        )


def main(options: Options) -> None:
    setup = start(options)
    classes = setup.classes
    student = options.student(classes)
    if options.method == ALONE:
        distiller = Distiller(student, classes.weights)
    else:
        teacher = options.teacher(classes)
        distiller = METHODS[options.method](student, teacher, classes.weights, options.settings)
    train(distiller, setup, options)


if __name__ == "__main__":
    cli.run(main, Options)
