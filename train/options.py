"""The options of a training script: groups of flags, recipes, and the checks of their values.

They are saved as options.json in the run's folder.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from errors import UserError
from files import OUTPUTS
from train.flags import (
    DataOptions,
    DistillationOptions,
    HardwareOptions,
    RecipeOptions,
    RunOptions,
    StudentOptions,
)

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    # docs/RESULTS.md has what each part brings, and what brought nothing and is no part of it.
    "modern": {
        # SegFormer's own training scales by half to twice and crops; the crop then moves the image,
        # not a shift. It helps where images are seen hundreds of times, as in 1000 epochs.
        "scale": (0.5, 2.0),
        "shift": 0,
        # The ImageNet weights were trained with it.
        "normalisation": "auto",
        # A quarter-size label loses thin objects, and mIoU is scored at full size elsewhere.
        "loss_size": "full",
        # Decay pulls a norm's scale away from where it does nothing, and holds back no weight.
        "decay": "matrices",
        # The teacher's class probabilities say more than a label, and cost only its decode head.
        "logits_weight": 1.0,
        # Steps, not epochs, decide what is learned.
        "keep_steps": True,
    },
}


@dataclass(kw_only=True)
class TrainingOptions:
    """Flags of every training script.

    Attributes:
        method: its name; the run's folder is called after it.
        network: what the network that learns is called; weights are written as NETWORK.safetensors.
        published_batch_size: for `--keep-steps`.
    """

    method: ClassVar[str]
    network: ClassVar[str] = "student"
    published_batch_size: ClassVar[int] = 2

    data: DataOptions
    recipe: RecipeOptions = field(default_factory=RecipeOptions)
    run: RunOptions = field(default_factory=RunOptions)
    hardware: HardwareOptions = field(default_factory=HardwareOptions)

    def fields(self) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
        """Every field of every group, with its value."""
        for group in dataclasses.fields(self):
            part = getattr(self, group.name)
            if not dataclasses.is_dataclass(part):
                yield group, part
                continue
            for inner in dataclasses.fields(part):
                yield inner, getattr(part, inner.name)

    def preset(self) -> Self | None:
        """These options with the values of `--recipe`; None for the paper's, the defaults."""
        values = RECIPES[self.recipe.recipe]
        for group in dataclasses.fields(self):
            part = getattr(self, group.name)
            for name, value in values.items():
                if hasattr(part, name):
                    setattr(part, name, value)
        return self if values else None

    def validate(self) -> None:
        """Refuse what can't work before any work is done.

        Raises UserError if a value is out of range.
        """
        # The bounds stand at the fields, in train/flags.py.
        for option, value in self.fields():
            least, below = option.metadata.get("least", 0), option.metadata.get("below", math.inf)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not least <= number < below:
                    flag = option.name.replace("_", "-")
                    end = "" if below == math.inf else f", and less than {below:g}"
                    raise UserError(f"--{flag} is {number}; it must be at least {least:g}{end}")
        recipe = self.recipe
        problem = ""
        if recipe.schedule == "epoch" and recipe.num_epochs > recipe.lr_decay_epochs:
            problem = (
                f"--num-epochs {recipe.num_epochs} goes on after --lr-decay-epochs "
                f"{recipe.lr_decay_epochs}, where the learning rate is 0; raise the latter"
            )
        if recipe.scale[0] > recipe.scale[1]:
            problem = "--scale takes the smaller factor first: --scale 0.5 2"
        # Misaligned by four, image and label can't be scaled or cropped alike.
        quarter = recipe.scale == (1.0, 1.0) and not recipe.crop and recipe.loss_size == "quarter"
        if recipe.published_shift and not quarter:
            problem = "--published-shift goes with no --scale, --crop or --loss-size full"
        if problem:
            raise UserError(problem)

    @property
    def run_dir(self) -> Path:
        chosen = self.run.output_dir
        default = OUTPUTS / f"{self.method}_{self.data.dataset}"
        return default if chosen is None else chosen.expanduser()

    def as_json(self, *, without: str | None = None) -> dict[str, Any]:
        """The options as plain JSON values, method and network included.

        `without` leaves out the fields of a kind: "free" or "local".
        """
        # The names of all groups' fields are distinct, so the groups can be left out.
        values: dict[str, Any] = {"method": self.method, "network": self.network}
        for option, value in self.fields():
            if without is None or not option.metadata.get(without):
                values[option.name] = value
        if "datadir" in values:  # for those who read it in another folder
            values["datadir"] = Path(values["datadir"]).expanduser().absolute()
        return json.loads(json.dumps(values, default=str))


@dataclass(kw_only=True)
class DistillingOptions(TrainingOptions):
    """Flags of the distillation scripts."""

    student: StudentOptions = field(default_factory=StudentOptions)
    distillation: DistillationOptions = field(default_factory=DistillationOptions)
