"""Cross Selective Fusion (CSF), the feature-map distillation of TransKD.

Liu et al., arXiv 2202.13393, section III-B; the selection follows Selective Kernel Networks (Li et al., CVPR 2019).
From the deepest stage up, each student feature is fused with what came from below it and then
expanded to the teacher's width.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StageFusion(nn.Module):
    """One stage: squeeze to `mid` channels, fuse with the deeper stage's map, expand to the teacher's width."""

    def __init__(
        self, student_channels: int, teacher_channels: int, *, mid: int = 64, fuses: bool = True
    ) -> None:
        super().__init__()
        squeeze = nn.Conv2d(student_channels, mid, 1, bias=False)
        expand = nn.Conv2d(mid, teacher_channels, 3, padding=1, bias=False)
        nn.init.kaiming_uniform_(squeeze.weight, a=1)
        nn.init.kaiming_uniform_(expand.weight, a=1)
        self.conv1 = nn.Sequential(squeeze, nn.BatchNorm2d(mid))
        self.conv2 = nn.Sequential(expand, nn.BatchNorm2d(teacher_channels))
        if fuses:
            self.add_gates(mid)

    def add_gates(self, mid: int) -> None:
        """Make the modules that `fuse` needs; the deepest stage has none."""
        raise NotImplementedError

    def forward(self, feature: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """F_i (B, C_S, h, w) and the deeper stage's fused map -> (B, C_T, h, w) and the fused map (B, mid, h, w)."""
        x = self.conv1(feature)
        if deeper is not None:
            x = self.fuse(x, F.interpolate(deeper, x.shape[-2:], mode="nearest"))
        return self.conv2(x), x

    def fuse(self, x: Tensor, y: Tensor) -> Tensor:
        """This stage's map and the deeper one's, (B, mid, h, w) both -> the same shape."""
        raise NotImplementedError


class SelectiveKernelFusion(StageFusion):
    """One stage of CSF."""

    def add_gates(self, mid: int) -> None:
        reduced = mid // 2
        self.fc = nn.Sequential(
            nn.Conv2d(mid, reduced, 1, bias=False), nn.BatchNorm2d(reduced), nn.ReLU()
        )
        # A batch of one leaves BatchNorm a single value per channel and nothing to normalise; the published
        # code then takes this squeeze, with weights of its own.
        self.fc1 = nn.Sequential(nn.Conv2d(mid, reduced, 1, bias=False), nn.ReLU())
        self.fcs = nn.ModuleList([nn.Conv2d(reduced, mid, 1) for _ in range(2)])

    def fuse(self, x: Tensor, y: Tensor) -> Tensor:
        s = (x + y).mean((2, 3), keepdim=True)  # (B, mid, 1, 1)
        # SyncBatchNorm waits for every process: all take the usual squeeze, one with a single image too
        z = self.fc(s) if len(s) > 1 or isinstance(self.fc[1], nn.SyncBatchNorm) else self.fc1(s)
        a_x, a_y = torch.stack([fc(z) for fc in self.fcs]).softmax(0)  # they sum to one per channel
        return a_x * x + a_y * y


class TopDownFusion(nn.Module):
    """One `stage` each, stored deepest first under the published name."""

    stage: ClassVar[type[StageFusion]]
    stored_as: ClassVar[str]

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int]) -> None:
        super().__init__()
        pairs = list(zip(student_channels, teacher_channels, strict=True))[::-1]
        stages = nn.ModuleList(
            self.stage(c_s, c_t, fuses=i > 0) for i, (c_s, c_t) in enumerate(pairs)
        )
        self.add_module(self.stored_as, stages)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Student features F1..F4 (B, C_S, h_i, w_i) -> fused features 1..4 (B, C_T, h_i, w_i)."""
        fused, deeper = [], None
        for stage, feature in zip(getattr(self, self.stored_as), reversed(features), strict=True):
            out, deeper = stage(feature, deeper)
            fused.append(out)
        return tuple(reversed(fused))


class CrossSelectiveFusion(TopDownFusion):
    """CSF over all stages."""

    stage, stored_as = SelectiveKernelFusion, "skfs"
