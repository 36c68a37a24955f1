"""Knowledge Review, the baseline that CSF grew from: Chen et al., CVPR 2021 (arXiv 2104.09044).

Like CSF it goes from the deepest stage up, but what is fused is chosen pixel by pixel instead of
channel by channel. Its loss is HCL.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.distillation.csf import MID_CHANNELS, fuse_stages, squeeze_and_expand


class AttentionBasedFusion(nn.Module):
    """One stage (ABF): two gates in (0, 1) for each pixel, for this map and for the deeper one."""

    def __init__(self, student_channels: int, teacher_channels: int, *, fuses: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = squeeze_and_expand(student_channels, teacher_channels)
        if fuses:
            self.att_conv = nn.Sequential(nn.Conv2d(2 * MID_CHANNELS, 2, 1), nn.Sigmoid())

    def forward(self, feature: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """F_i (B, C_S, h, w) and the deeper fused map -> (B, C_T, h, w) and (B, 64, h, w)."""
        x = self.conv1(feature)
        if deeper is not None:
            # The deeper map has half the size; each of its values serves a block of pixels.
            y = F.interpolate(deeper, x.shape[-2:], mode="nearest")
            gates = self.att_conv(torch.cat([x, y], dim=1))
            g_x, g_y = gates.split(1, dim=1)  # (B, 1, h, w) each; they need not sum to one
            x = g_x * x + g_y * y
        return self.conv2(x), x


class ReviewFusion(nn.Module):
    """ABF over all stages, stored deepest first: `abfs.0` serves stage 4."""

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int]) -> None:
        super().__init__()
        pairs = zip(reversed(student_channels), reversed(teacher_channels), strict=True)
        self.abfs = nn.ModuleList(
            AttentionBasedFusion(*pair, fuses=i > 0) for i, pair in enumerate(pairs)
        )

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Student features F1..F4 (B, C_S, h_i, w_i) -> fused 1..4 (B, C_T, h_i, w_i)."""
        return fuse_stages(self.abfs, features)
