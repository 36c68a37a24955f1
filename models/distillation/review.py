"""Knowledge Review, the baseline that CSF grew from: Chen et al., CVPR 2021 (arXiv 2104.09044).

Like CSF from the deepest stage up, but what is fused is chosen pixel by pixel instead of channel by channel.
"""

import torch
from torch import Tensor, nn

from models.distillation.csf import StageFusion, fuse_top_down


class AttentionBasedFusion(StageFusion):
    """One stage (ABF): two gates in (0, 1) per pixel, one for this stage's map and one for the deeper one's."""

    def __init__(self, student_channels: int, teacher_channels: int, *, mid: int = 64, fuses: bool = True) -> None:
        super().__init__(student_channels, teacher_channels, mid)
        if fuses:
            self.att_conv = nn.Sequential(nn.Conv2d(2 * mid, 2, 1), nn.Sigmoid())

    def fuse(self, x: Tensor, y: Tensor) -> Tensor:
        g_x, g_y = self.att_conv(torch.cat([x, y], dim=1)).split(1, dim=1)  # (B, 1, h, w) each
        return g_x * x + g_y * y


class ReviewFusion(nn.Module):
    """ABF over all stages; `abfs` is stored deepest stage first, as published. Its loss is HCL."""

    def __init__(self, student_channels: tuple[int, ...], teacher_channels: tuple[int, ...]) -> None:
        super().__init__()
        pairs = list(zip(student_channels, teacher_channels, strict=True))[::-1]
        self.abfs = nn.ModuleList(AttentionBasedFusion(c_s, c_t, fuses=i > 0) for i, (c_s, c_t) in enumerate(pairs))

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Student features F1..F4 (B, C_S, h_i, w_i) -> fused features 1..4 (B, C_T, h_i, w_i)."""
        return fuse_top_down(self.abfs, features)
