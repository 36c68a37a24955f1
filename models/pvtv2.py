"""PVTv2 B0–B5 (Wang et al., "PVT v2", CVMJ 2022) with a feature pyramid neck and head.

Neck: Lin et al., "Feature Pyramid Networks", CVPR 2017. Head: Kirillov et al., "Panoptic Feature
Pyramid Networks", CVPR 2019. As in the published TransKD code the network takes RGB in [0, 1] and
predicts at a quarter of the image's size.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from models.base import SegmentationModel
from models.pyramid import PyramidConfig, PyramidTransformer

NECK_CHANNELS = 256
HEAD_CHANNELS = 128
MLP_RATIOS = (8, 8, 4, 4)

CONFIGS: dict[str, PyramidConfig] = {
    "pvt_v2_b0": PyramidConfig((32, 64, 160, 256), (2, 2, 2, 2), MLP_RATIOS),
    "pvt_v2_b1": PyramidConfig((64, 128, 320, 512), (2, 2, 2, 2), MLP_RATIOS),
    "pvt_v2_b2": PyramidConfig((64, 128, 320, 512), (3, 4, 6, 3), MLP_RATIOS),
    "pvt_v2_b3": PyramidConfig((64, 128, 320, 512), (3, 4, 18, 3), MLP_RATIOS),
    "pvt_v2_b4": PyramidConfig((64, 128, 320, 512), (3, 8, 27, 3), MLP_RATIOS),
    "pvt_v2_b5": PyramidConfig((64, 128, 320, 512), (3, 6, 40, 3)),
}


def conv_module(in_channels: int, channels: int, kernel: int, *, relu: bool = False) -> nn.Module:
    """Convolution that keeps the map's size, and ReLU where `relu`; named as published."""
    conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # it has one
    activate = nn.ReLU(inplace=True) if relu else nn.Identity()
    return nn.Sequential(OrderedDict(conv=conv, activate=activate))


class FPN(nn.Module):
    """Feature pyramid: every stage to one width, deeper stages added to finer ones, smoothed."""

    def __init__(self, in_channels: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(conv_module(c, channels, 1) for c in in_channels)
        self.fpn_convs = nn.ModuleList(conv_module(channels, channels, 3) for _ in in_channels)

    def forward(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        """F1..F4 (B, C_i, h_i, w_i) -> (B, channels, h_i, w_i) each."""
        levels = [conv(x) for conv, x in zip(self.lateral_convs, features, strict=True)]
        # From the top down each level gets the sum of all the coarser ones.
        for i in (2, 1, 0):
            size = levels[i].shape[-2:]
            levels[i] = levels[i] + F.interpolate(levels[i + 1], size, mode="nearest")
        return [conv(level) for conv, level in zip(self.fpn_convs, levels, strict=True)]


class FPNHead(nn.Module):
    """Neck; every level to stride 4 by convolutions and ×2 resizes; their sum; classifier."""

    def __init__(self, in_channels: tuple[int, ...], num_classes: int, dropout: float) -> None:
        super().__init__()
        self.neck = FPN(in_channels, NECK_CHANNELS)
        self.scale_heads = nn.ModuleList()
        for doublings in range(4):  # the level at stride 4·2^doublings
            layers: list[nn.Module] = []
            for k in range(max(1, doublings)):
                width = NECK_CHANNELS if k == 0 else HEAD_CHANNELS
                layers.append(conv_module(width, HEAD_CHANNELS, 3, relu=True))
                if doublings:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*layers))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(HEAD_CHANNELS, num_classes, 1)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        """F1..F4 (B, C_i, h_i, w_i) -> logits (B, classes, h_1, w_1)."""
        levels = self.neck(features)  # (B, 256, h_i, w_i) each
        size = levels[0].shape[-2:]
        out = self.scale_heads[0](levels[0])
        for scale_head, level in zip(self.scale_heads[1:], levels[1:], strict=True):
            # This resize changes nothing unless a stage's size was odd. There is no `if` for it,
            # because an exported graph could not follow it.
            scaled = scale_head(level)
            out = out + F.interpolate(scaled, size, mode="bilinear", align_corners=False)
        return self.classifier(self.dropout(out))


class PVTv2(SegmentationModel):
    """PVTv2 with FPN neck and head."""

    published_names = (
        ("backbone.", "encoder."),
        ("neck.", "head.neck."),
        ("head.conv_seg.", "head.classifier."),
    )

    def __init__(self, name: str, num_classes: int, drop_path_rate: float, dropout: float) -> None:
        config = CONFIGS[name]
        encoder = PyramidTransformer(config, drop_path_rate)
        head = FPNHead(config.channels, num_classes, dropout)
        super().__init__(name, config.channels, encoder, head)
