"""How weights change from step to step: AdamW's parameter groups, the learning rate's schedule, averaged weights."""

import copy
import math
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import PolynomialLR

from models.base import SegmentationModel
from train.options import TrainingOptions


@dataclass(frozen=True)
class Plan:
    """How long a run is."""

    steps_per_epoch: int
    epochs: int
    """Passes over the training images."""
    limit: int
    """Most steps."""
    recipe_epoch: int | None = None
    """With `--keep-steps`: the steps of an epoch at the recipe's batch, which count for the schedule."""

    @staticmethod
    def of(options: TrainingOptions, images: int, steps_per_epoch: int) -> "Plan":
        """For a number of training images; `--keep-steps` repeats epochs until the recipe's steps are done."""
        epochs, limit, recipe_epoch = options.num_epochs, options.max_steps or sys.maxsize, None
        if options.keep_steps:
            recipe_epoch = math.ceil(images / options.recipe_batch_size)
            limit = min(limit, epochs * recipe_epoch)
            epochs = math.ceil(epochs * recipe_epoch / steps_per_epoch)
        return Plan(steps_per_epoch, epochs, limit, recipe_epoch)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return min(self.epochs * self.steps_per_epoch, self.limit)

    def total_steps(self, epoch: int, batch: int, step: int) -> int:
        """The number of the last step, for a run that has done `batch` steps of `epoch`, and `step` steps in all.

        What is left is counted by this plan; what was done may have been by another, with a batch of another size.
        """
        if self.recipe_epoch:  # `epoch` may have been counted by other steps
            return self.limit
        of_epoch = max(self.steps_per_epoch - batch, 0)
        left = (
            (self.epochs - epoch) * self.steps_per_epoch + of_epoch if epoch <= self.epochs else 0
        )
        return min(step + left, self.limit)


def new_optimizer(distiller: nn.Module, options: TrainingOptions) -> AdamW:
    """AdamW on every parameter; with `--decay matrices`, those of one dimension (norms, biases) form a second group."""
    parameters = list(distiller.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if options.decay == "matrices":
        groups = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    return AdamW(
        groups,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=True,
    )


class Schedule:
    """The learning rate of every step.

    By epoch, as published: epoch e has lr·(1 − e/1500), for the published schedule makes its first step before the
    training does. By step: lr·(1 − s/S) after s of S steps. A linear warm-up multiplies either.

    Attributes:
        lr: the rate in force.
    """

    def __init__(self, optimizer: Optimizer, options: TrainingOptions, plan: Plan) -> None:
        self.lr = options.lr
        self.optimizer, self.options, self.plan = optimizer, options, plan
        stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=options.lr)
        self.by_epoch = PolynomialLR(
            stand_in, total_iters=options.lr_decay_epochs, power=options.lr_power
        )

    def set(self, epoch: int, step: int) -> None:
        """Give the optimizer the rate of the next step, after `step` steps, in `epoch`."""
        if self.options.schedule == "epoch":
            lr = self._of_epoch(
                1 + step // self.plan.recipe_epoch if self.plan.recipe_epoch else epoch
            )
        else:
            lr = self.options.lr * max(1 - step / self.plan.steps, 0) ** self.options.lr_power
        lr *= min((step + 1) / max(self.options.warmup_steps, 1), 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.lr = lr

    def _of_epoch(self, epoch: int) -> float:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Detected call of `lr_scheduler.step", UserWarning
            )  # a stand-in's
            while self.by_epoch.last_epoch < epoch:
                self.by_epoch.step()
        return float(self.by_epoch.get_last_lr()[0])


class AveragedWeights:
    """An exponential moving average of a network: a ← d·a + (1 − d)·w with d = min(decay, (1 + t) / (10 + t)).

    d grows with the steps t, so that the average forgets the initial weights. BatchNorm's statistics are averaged
    likewise, its counters copied.
    """

    def __init__(self, network: SegmentationModel, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        ours, theirs = self.network.state_dict(), network.state_dict()
        pairs = [(ours[key], theirs[key]) for key in ours]
        self.averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self.copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        ours: list[Tensor] = [a for a, _ in self.averaged]
        torch._foreach_lerp_(ours, [w for _, w in self.averaged], 1 - decay)
        for count, new in self.copied:
            count.copy_(new)
