"""Structured knowledge distillation, its pairwise term: Liu et al., CVPR 2019 (arXiv 1903.04197)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import SegmentationModel, SegmentationOutput
from models.distillation.distiller import Distiller
from models.distillation.losses import full_precision


def pairwise_similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of the cosine similarities between all pairs of places in a map.

    Similarities don't depend on the width, so nothing has to be projected.

    Args:
        student, teacher: (B, C_S, h, w) and (B, C_T, h, w).
    """

    def similarities(x: Tensor) -> Tensor:
        x = F.normalize(full_precision(x).flatten(2), dim=1)  # (B, C, N)
        return x.transpose(1, 2) @ x  # (B, N, N)

    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(similarities(student), similarities(teacher))


class PairwiseDistiller(Distiller):
    """Which places of the last feature map F4 look alike; `weight` is that of the paper."""

    def __init__(
        self,
        student: SegmentationModel,
        class_weights: Sequence[float] | None,
        *,
        teacher: SegmentationModel,
        weight: float = 10.0,
    ) -> None:
        super().__init__(student, class_weights, teacher=teacher)
        self.weight = weight

    def distillation_losses(
        self, images: Tensor, student: SegmentationOutput, teacher: SegmentationOutput
    ) -> dict[str, Tensor]:
        return {"pairwise": self.weight * pairwise_similarity_loss(student.features[-1], teacher.features[-1])}
