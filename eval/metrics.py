"""Scores from one confusion matrix, counted on the device.

Pixels whose truth is the ignore index are dropped. Predicting the ignore index (the 20th output) on
a pixel that counts is a false negative of the true class and a false positive of none.
"""

from math import isnan
from typing import Any

import torch
from torch import Tensor

from datasets.classes import Classes


class ConfusionMatrix:
    """Pixel counts of (true class, predicted class), from which every score is derived.

    `counts` is int64, (n + 1, n + 1) for n classes, rows truth, columns prediction, ignore last; it
    is added to in place where it is given. Counts of images, conditions and processes add up.
    """

    def __init__(
        self, classes: Classes, device: torch.device | str = "cpu", counts: Tensor | None = None
    ) -> None:
        self.classes = classes
        if counts is None:
            size = classes.num_outputs
            counts = torch.zeros(size, size, dtype=torch.int64, device=device)
        self.counts = counts

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Count class indices (B, h, w), or logits (B, C, h, w) of which the largest wins.

        The labels (B, h, w), of any integer type, are 0..n-1, ignore = n; others are an error,
        which a GPU does not see.
        """
        size = self.classes.num_outputs
        if prediction.is_floating_point():
            if prediction.shape[1] > size:
                raise ValueError(f"logits of {prediction.shape[1]} classes, where there are {size}")
            prediction = prediction.max(dim=1).indices  # on a CPU 3 times faster than argmax
        if prediction.shape != labels.shape:
            raise ValueError(f"prediction {prediction.shape} and labels {labels.shape} differ")
        pairs = (labels.to(torch.int32) * size + prediction.to(torch.int32)).flatten()
        bins = size * size
        if pairs.is_cuda:  # bincount would wait for the device to know the largest value
            counts = torch.histc(pairs, bins, min=0, max=bins).to(torch.int64)
        else:
            counts = torch.bincount(pairs, minlength=bins)
        self.counts += counts.view(size, size)

    @property
    def valid(self) -> Tensor:
        """(n, n + 1) float64 on the CPU: the rows that count."""
        return self.counts[: self.classes.num_classes].cpu().double()

    @property
    def tp(self) -> Tensor:
        """(n,) pixels of the class that are predicted as such."""
        return self.valid.diagonal()

    @property
    def fp(self) -> Tensor:
        """(n,) counted pixels predicted as the class that belong to another one."""
        return self.valid.sum(dim=0)[: self.classes.num_classes] - self.tp

    @property
    def fn(self) -> Tensor:
        """(n,) pixels of the class predicted as anything else, ignore included."""
        return self.valid.sum(dim=1) - self.tp

    def scores(self) -> dict[str, Any]:
        """All scores as fractions, None for what does not occur; `per_class` is the IoU by name.

        A class occurs if it is in the truth or in a prediction that counts, which is the rule of
        cityscapesScripts: a class that is predicted where there is none scores 0, not None.

        `mean_iou` is the mean over the classes that occur; in `mean_iou_published`, as the
        published code has it, those that do not occur count as 0. `pixel_accuracy` and
        `mean_accuracy` are mmsegmentation's aAcc and mAcc.
        """
        iou = self.tp / (self.tp + self.fp + self.fn)  # NaN, which is 0 / 0, where none occurs
        accuracy = self.tp / (self.tp + self.fn)
        per_class = zip(self.classes.names, iou.tolist(), strict=True)
        return {
            "mean_iou": _known(float(iou.nanmean())),
            "mean_iou_published": float(iou.nan_to_num(0.0).mean()),
            "pixel_accuracy": _known(float(self.tp.sum() / self.valid.sum())),
            "mean_accuracy": _known(float(accuracy.nanmean())),
            "per_class": {name: _known(value) for name, value in per_class},
        }


def _known(value: float) -> float | None:
    return None if isnan(value) else value


def percent(fraction: float | None) -> str:
    """0.6858 as 68.58; a dash where there is no score."""
    return "–" if fraction is None else f"{100 * fraction:.2f}"
