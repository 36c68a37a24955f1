"""Knowledge Review, the baseline that CSF grew from: Chen et al., CVPR 2021 (arXiv 2104.09044).

Like CSF from the deepest stage up, but what is fused is chosen pixel by pixel instead of channel by channel.
"""

import torch
from torch import Tensor, nn

from models.distillation.csf import StageFusion, TopDownFusion


class AttentionBasedFusion(StageFusion):
    """One stage (ABF): two gates in (0, 1) per pixel, one for this stage's map and one for the deeper one's."""

    def add_gates(self, mid: int) -> None:
        self.att_conv = nn.Sequential(nn.Conv2d(2 * mid, 2, 1), nn.Sigmoid())

    def fuse(self, x: Tensor, y: Tensor) -> Tensor:
        g_x, g_y = self.att_conv(torch.cat([x, y], dim=1)).split(1, dim=1)  # (B, 1, h, w) each
        return g_x * x + g_y * y


class ReviewFusion(TopDownFusion):
    """ABF over all stages. Its loss is HCL."""

    stage, stored_as = AttentionBasedFusion, "abfs"
