"""Structured knowledge distillation, its pairwise term: Liu et al., CVPR 2019 (arXiv 1903.04197).

The student learns which parts of a map look alike.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import SegmentationOutput
from models.distillation.distiller import Distiller
from models.distillation.losses import full_precision


def pairwise_similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of the cosine similarities between all pairs of places in a map.

    Maps are (B, C_S, h, w) and (B, C_T, h, w): similarities don't depend on the width, so nothing
    has to be projected.
    """
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(similarities(student), similarities(teacher))


def similarities(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, N, N) cosine similarities of N places."""
    # As in the authors' code: windows of half the height and width, so N is 2×2, with 3 for 2
    # where a side is odd; and no gradient through the norms.
    window = (max(x.shape[2] // 2, 1), max(x.shape[3] // 2, 1))
    x = F.max_pool2d(full_precision(x), window, ceil_mode=True).flatten(2)  # (B, C, N)
    x = x / x.norm(dim=1, keepdim=True).detach().clamp_min(1e-8)
    return x.transpose(1, 2) @ x


class PairwiseDistiller(Distiller):
    """total = CE + w · MSE(similarities(F4^S), similarities(F4^T))

    The authors' code compares the map behind PSPNet's pooling module, which SegFormer has not; the
    weight is that of its training script.
    """

    def __init__(self, *arguments: Any, weight: float = 0.5, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.weight = weight

    def distillation_losses(
        self, images: Tensor, student: SegmentationOutput, teacher: SegmentationOutput
    ) -> dict[str, Tensor]:
        loss = pairwise_similarity_loss(student.features[-1], teacher.features[-1])
        return {"pairwise": self.weight * loss}
