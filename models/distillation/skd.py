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

    As in the authors' code the maps are max-pooled first, by windows of half their height and width (2×2 places, 3
    where a side is odd), and the norms take no part in the gradient. Similarities don't depend on the width, so
    nothing has to be projected.

    Args:
        student, teacher: (B, C_S, h, w) and (B, C_T, h, w).
    """

    def similarities(x: Tensor) -> Tensor:
        window = max(x.shape[2] // 2, 1), max(x.shape[3] // 2, 1)
        x = F.max_pool2d(full_precision(x), window, ceil_mode=True).flatten(2)  # (B, C, N)
        x = x / x.norm(dim=1, keepdim=True).detach().clamp_min(1e-8)
        return x.transpose(1, 2) @ x  # (B, N, N)

    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(similarities(student), similarities(teacher))


class PairwiseDistiller(Distiller):
    """Which parts of the last feature map F4 look alike.

    The authors' code compares the map behind PSPNet's pooling module, which SegFormer has not; `weight` is that of its
    training script.
    """

    def __init__(
        self,
        student: SegmentationModel,
        class_weights: Sequence[float] | None,
        *,
        teacher: SegmentationModel,
        weight: float = 0.5,
    ) -> None:
        super().__init__(student, class_weights, teacher=teacher)
        self.weight = weight

    def distillation_losses(
        self, images: Tensor, student: SegmentationOutput, teacher: SegmentationOutput
    ) -> dict[str, Tensor]:
        return {
            "pairwise": self.weight
            * pairwise_similarity_loss(student.features[-1], teacher.features[-1])
        }
