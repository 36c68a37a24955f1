"""How weights change from step to step: AdamW, its learning rate, and how many steps there are."""

import math
import sys
from typing import Any

from torch import nn
from torch.optim import AdamW

from train.flags import RecipeOptions


def new_optimizer(distiller: nn.Module, recipe: RecipeOptions) -> AdamW:
    """AdamW on every parameter that learns; `--decay matrices` spares norms and biases."""
    parameters = list(distiller.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if recipe.decay == "matrices":
        groups = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    # Fused: one kernel for all parameters, on a GPU and on a CPU.
    return AdamW(groups, recipe.lr, recipe.betas, recipe.eps, recipe.weight_decay, fused=True)


class Plan:
    """How long a run is, and the learning rate of each of its steps.

    The training images are seen in `steps_per_epoch` steps. With `--keep-steps`, epochs are
    repeated until as many steps are done as the published batch size would give.
    """

    def __init__(
        self, recipe: RecipeOptions, published_batch_size: int, images: int, steps_per_epoch: int
    ) -> None:
        self.recipe = recipe
        self.steps_per_epoch = steps_per_epoch
        self.epochs = recipe.num_epochs
        # The run ends after this many steps even if epochs are left.
        self.limit = recipe.max_steps or sys.maxsize
        self.published_steps_per_epoch = math.ceil(images / published_batch_size)
        if recipe.keep_steps:
            kept = recipe.num_epochs * self.published_steps_per_epoch
            self.epochs = math.ceil(kept / steps_per_epoch)
            self.limit = min(self.limit, kept)
        # From beginning to end; the learning rate falls over them where it falls once a step.
        self.steps = min(self.epochs * steps_per_epoch, self.limit)

    def total_steps(self, epoch: int, batch: int, step: int) -> int:
        """The number of the last step of a run that is continued by this plan.

        `step` steps are done, `batch` of them in `epoch`, which is the one under way.
        """
        if self.recipe.keep_steps:
            return self.limit
        # The steps that are done, perhaps with another batch size, and those left by this plan.
        left = (self.epochs - epoch) * self.steps_per_epoch + max(self.steps_per_epoch - batch, 0)
        return min(step + max(left, 0), self.limit)

    def learning_rate(self, epoch: int, step: int) -> float:
        """The learning rate of the next step, after `step` steps, in `epoch` (from 1).

        By epoch, as published: lr·(1 − e/1500) in epoch e. By step: lr·(1 − s/S) after s of S
        steps. A linear warm-up multiplies either.
        """
        recipe = self.recipe
        if recipe.schedule == "step":
            done = step / self.steps
        else:
            if recipe.keep_steps:  # epochs are counted as the published batch size has them
                epoch = 1 + step // self.published_steps_per_epoch
            # The published scheduler steps once as it is built: epoch 1 is 1/1500 below lr.
            done = epoch / recipe.lr_decay_epochs
        warmup = min((step + 1) / max(recipe.warmup_steps, 1), 1)
        return recipe.lr * max(1 - done, 0) ** recipe.lr_power * warmup
