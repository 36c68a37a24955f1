"""What all segmentation models have in common."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Normalisation(NamedTuple):
    """(image - mean) / std of each channel, RGB in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> the same shape."""
        return torch.stack([(images[:, c] - self.mean[c]) / self.std[c] for c in range(3)], dim=1)


class SegmentationOutput(NamedTuple):
    """What every segmentation model of this project returns."""

    logits: Tensor | None  # (B, classes, ceil(H/4), ceil(W/4)); None when they were not asked for
    features: tuple[Tensor, ...]  # F1..F4, (B, C_i, h_i, w_i)
    embeddings: tuple[Tensor, ...]  # E1..E4, (B, h_i·w_i, C_i)


class SegmentationModel(nn.Module):
    """An encoder of four stages at strides 4, 8, 16, 32 and a decode head."""

    name: str
    num_classes: int
    channels: tuple[int, ...]  # C_1..C_4
    class_names: tuple[str, ...] | None = None  # of every output, where the weights tell them
    normalisation: Normalisation | None = (
        None  # what weights trained elsewhere expect; the paper's models take none
    )

    def encode(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Images (B, 3, H, W) -> features F1..F4 (B, C_i, h_i, w_i) and embeddings E1..E4 (B, h_i·w_i, C_i)."""
        raise NotImplementedError

    def decode(self, features: tuple[Tensor, ...]) -> Tensor:
        """F1..F4 -> logits (B, classes, h_1, w_1)."""
        raise NotImplementedError

    def forward(self, images: Tensor, logits: bool = True) -> SegmentationOutput:
        """Images (B, 3, H, W), RGB in [0, 1], any size -> logits, features, embeddings.

        With `logits=False` the decode head does not run: a teacher's logits enter no loss of TransKD.
        """
        features, embeddings = self.encode(
            self.normalisation(images) if self.normalisation else images
        )
        return SegmentationOutput(self.decode(features) if logits else None, features, embeddings)
