"""Cross Selective Fusion (CSF), the feature-map distillation of TransKD.

Liu et al., arXiv 2202.13393, section III-B; the selection follows Selective Kernel Networks (Li et
al., CVPR 2019). From the deepest stage up, each student feature is fused with the map that came
from below it, and then expanded to the teacher's width.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MID_CHANNELS = 64


class GlobalAverage(nn.AdaptiveAvgPool2d):
    """(B, C, h, w) -> (B, C, 1, 1), by a mean.

    torch's own gives the same values in another order in memory, with which the convolutions behind
    it round differently. It is a pooling by its class, so that `models.info` counts it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


def squeeze_and_expand(in_channels: int, channels: int) -> tuple[nn.Sequential, nn.Sequential]:
    """1×1 convolution to 64 channels and 3×3 convolution from them, each with BatchNorm."""
    squeeze = nn.Conv2d(in_channels, MID_CHANNELS, 1, bias=False)
    expand = nn.Conv2d(MID_CHANNELS, channels, 3, padding=1, bias=False)
    nn.init.kaiming_uniform_(squeeze.weight, a=1)
    nn.init.kaiming_uniform_(expand.weight, a=1)
    return (
        nn.Sequential(squeeze, nn.BatchNorm2d(MID_CHANNELS)),
        nn.Sequential(expand, nn.BatchNorm2d(channels)),
    )


class SelectiveKernelFusion(nn.Module):
    """One stage: squeeze to 64 channels, fuse with the deeper stage's map, expand.

    Modules are named as in the published checkpoints. The deepest stage fuses with nothing and has
    no `fc`, `fc1`, `fcs`.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, fuses: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = squeeze_and_expand(student_channels, teacher_channels)
        if fuses:
            mid, reduced = MID_CHANNELS, MID_CHANNELS // 2
            self.pool = GlobalAverage(1)
            self.fc = nn.Sequential(
                nn.Conv2d(mid, reduced, 1, bias=False), nn.BatchNorm2d(reduced), nn.ReLU()
            )
            # A batch of one leaves BatchNorm a single value per channel and nothing to normalise;
            # the published code then takes this squeeze, with weights of its own.
            self.fc1 = nn.Sequential(nn.Conv2d(mid, reduced, 1, bias=False), nn.ReLU())
            self.fcs = nn.ModuleList([nn.Conv2d(reduced, mid, 1), nn.Conv2d(reduced, mid, 1)])

    def forward(self, feature: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """F_i (B, C_S, h, w), the deeper stage's fused map (B, 64, h', w') or None.

        Returns the expanded map (B, C_T, h, w) and the fused map (B, 64, h, w).
        """
        x = self.conv1(feature)
        if deeper is not None:
            x = self.fuse(x, F.interpolate(deeper, x.shape[-2:], mode="nearest"))
        return self.conv2(x), x

    def fuse(self, x: Tensor, y: Tensor) -> Tensor:
        """This stage's map and the deeper one's, (B, 64, h, w) both -> a_x·x + a_y·y."""
        s = self.pool(x + y)  # (B, 64, 1, 1)
        # SyncBatchNorm waits for every process, so all of them take the same squeeze, also one
        # that has a single image.
        if len(s) > 1 or isinstance(self.fc[1], nn.SyncBatchNorm):
            z = self.fc(s)  # (B, 32, 1, 1)
        else:
            z = self.fc1(s)
        scores = torch.stack([fc(z) for fc in self.fcs])  # (2, B, 64, 1, 1)
        a_x, a_y = scores.softmax(0)  # they sum to one for each channel
        return a_x * x + a_y * y


def fuse_stages(stages: Iterable[nn.Module], features: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Features F1..F4 through stages that are stored deepest first -> expanded maps 1..4."""
    expanded = []
    deeper = None
    for stage, feature in zip(stages, reversed(features), strict=True):
        out, deeper = stage(feature, deeper)
        expanded.append(out)
    return tuple(reversed(expanded))


class CrossSelectiveFusion(nn.Module):
    """CSF over all stages. Its modules are stored deepest first: `skfs.0` serves stage 4."""

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int]) -> None:
        super().__init__()
        pairs = zip(reversed(student_channels), reversed(teacher_channels), strict=True)
        self.skfs = nn.ModuleList(
            SelectiveKernelFusion(*pair, fuses=i > 0) for i, pair in enumerate(pairs)
        )

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Student features F1..F4 (B, C_S, h_i, w_i) -> fused 1..4 (B, C_T, h_i, w_i)."""
        return fuse_stages(self.skfs, features)
