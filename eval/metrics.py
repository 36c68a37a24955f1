"""Intersection over union from one confusion matrix, counted on the device.

Pixels whose truth is the ignore index are dropped. Predicting the ignore index (the 20th output)
on a pixel that counts is a false negative of the true class and a false positive of none.
"""

from math import isnan
from typing import Any

import torch
from torch import Tensor

from datasets.classes import Classes


class ConfusionMatrix:
    """Pixel counts of (true class, predicted class), from which every score is derived.

    `counts` is int64, (n + 1, n + 1) for n classes, rows truth, columns prediction, ignore last.
    Add matrices of several conditions, batches or processes: all scores are sums of counts.
    """

    def __init__(
        self, classes: Classes, device: torch.device | str = "cpu", *, counts: Tensor | None = None
    ) -> None:
        self.classes = classes
        size = classes.num_outputs
        self.counts = (
            torch.zeros(size, size, dtype=torch.int64, device=device) if counts is None else counts
        )

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Count a batch.

        `prediction`: class indices (B, h, w), or logits (B, C, h, w) of which the largest wins.
        `labels`: (B, h, w) of any integer type, 0..n-1, ignore = n; others are an error, which a GPU does not see.
        """
        size = self.classes.num_outputs
        if prediction.is_floating_point():
            if prediction.shape[1] > size:
                raise ValueError(
                    f"logits of {prediction.shape[1]} classes, where there are {size} with ignore"
                )
            prediction = prediction.max(dim=1).indices  # on the CPU 3 times faster than argmax
        if prediction.shape != labels.shape:
            raise ValueError(f"prediction {prediction.shape} and labels {labels.shape} differ")
        pairs = (labels.to(torch.int32) * size + prediction.to(torch.int32)).flatten()
        bins = size * size
        if pairs.is_cuda:  # bincount would wait for the device to know the largest value
            counts = torch.histc(pairs, bins, min=0, max=bins).to(torch.int64)
        else:
            counts = torch.bincount(pairs, minlength=bins)
        self.counts += counts.view(size, size)

    def __add__(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        return ConfusionMatrix(self.classes, counts=self.counts + other.counts)

    @property
    def _valid(self) -> Tensor:
        """(n, n + 1) float64 on the CPU: the rows that count."""
        return self.counts[: self.classes.num_classes].cpu().double()

    @property
    def tp(self) -> Tensor:
        """(n,) pixels of the class that are predicted as such."""
        return self._valid.diagonal()

    @property
    def fp(self) -> Tensor:
        """(n,) counted pixels predicted as the class that belong to another one."""
        return self._valid.sum(dim=0)[: self.classes.num_classes] - self.tp

    @property
    def fn(self) -> Tensor:
        """(n,) pixels of the class predicted as anything else, ignore included."""
        return self._valid.sum(dim=1) - self.tp

    @property
    def iou(self) -> Tensor:
        """(n,) tp / (tp + fp + fn), in 0..1; nan for a class that does not occur.

        A class occurs if it is in the truth or in a prediction that counts, which is the rule of
        cityscapesScripts: a class that is predicted where there is none scores 0, not nan.
        """
        return self.tp / (self.tp + self.fp + self.fn)

    @property
    def mean_iou(self) -> float:
        """Mean over the classes that occur; nan where no pixel was counted."""
        return float(self.iou.nanmean())

    @property
    def mean_iou_published(self) -> float:
        """Mean over all classes as the published code takes it: one that does not occur is 0."""
        return float(self.iou.nan_to_num(0.0).mean())

    def scores(self) -> dict[str, Any]:
        """`mean_iou`, `mean_iou_published` and `per_class` by name; fractions, None for nan."""
        mean, *iou = (None if isnan(x) else x for x in [self.mean_iou, *self.iou.tolist()])
        return {
            "mean_iou": mean,
            "mean_iou_published": self.mean_iou_published,
            "per_class": dict(zip(self.classes.names, iou, strict=True)),
        }


def percent(fraction: float | None) -> str:
    """0.6858 as 68.58; a dash where there is no score."""
    return "–" if fraction is None else f"{100 * fraction:.2f}"
