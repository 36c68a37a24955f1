"""PVTv2 B0–B5 (Wang et al., "PVT v2", CVMJ 2022) with a feature pyramid neck and head.

Neck: Lin et al., "Feature Pyramid Networks", CVPR 2017. Head: Kirillov et al., "Panoptic Feature Pyramid Networks",
CVPR 2019. As in the published TransKD code the network takes RGB in [0, 1] and predicts at a quarter of the image's
size; parameters are named as in its checkpoints.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.base import SegmentationModel
from models.pyramid import PyramidConfig, PyramidTransformer

NECK_CHANNELS, HEAD_CHANNELS = 256, 128
MLP_RATIOS = (8, 8, 4, 4)
CONFIGS: dict[str, PyramidConfig] = {
    "pvt_v2_b0": PyramidConfig((32, 64, 160, 256), (2, 2, 2, 2), MLP_RATIOS),
    "pvt_v2_b1": PyramidConfig((64, 128, 320, 512), (2, 2, 2, 2), MLP_RATIOS),
    "pvt_v2_b2": PyramidConfig((64, 128, 320, 512), (3, 4, 6, 3), MLP_RATIOS),
    "pvt_v2_b3": PyramidConfig((64, 128, 320, 512), (3, 4, 18, 3), MLP_RATIOS),
    "pvt_v2_b4": PyramidConfig((64, 128, 320, 512), (3, 8, 27, 3), MLP_RATIOS),
    "pvt_v2_b5": PyramidConfig((64, 128, 320, 512), (3, 6, 40, 3)),
}


class ConvModule(nn.Module):
    """Convolution that keeps the map's size and, where `relu`, ReLU; named as in the published checkpoints."""

    def __init__(self, in_channels: int, channels: int, kernel: int, *, relu: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]  # it has one
        self.activate = nn.ReLU(inplace=True) if relu else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.activate is None else self.activate(x)


class FPN(nn.Module):
    """Feature pyramid: every stage to one width, the deeper stages added to the finer ones, then smoothed."""

    def __init__(self, in_channels: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvModule(c, channels, 1) for c in in_channels)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in in_channels)

    def forward(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        """F1..F4 (B, C_i, h_i, w_i) -> (B, channels, h_i, w_i) each."""
        levels = [conv(feature) for conv, feature in zip(self.lateral_convs, features, strict=True)]
        for i in (2, 1, 0):
            levels[i] = levels[i] + F.interpolate(
                levels[i + 1], levels[i].shape[-2:], mode="nearest"
            )
        return [conv(level) for conv, level in zip(self.fpn_convs, levels, strict=True)]


class FPNHead(nn.Module):
    """Brings every level to stride 4 by convolutions and ×2 resizes, sums them and classifies."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.scale_heads = nn.ModuleList()
        for doublings in range(4):  # level at stride 4·2^doublings
            layers: list[nn.Module] = []
            for k in range(max(1, doublings)):
                layers.append(ConvModule(channels if k else in_channels, channels, 3, relu=True))
                if doublings:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*layers))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Four levels (B, C, h_i, w_i) -> logits (B, classes, h_1, w_1)."""
        size = levels[0].shape[-2:]
        out = self.scale_heads[0](levels[0])
        for scale, level in zip(self.scale_heads[1:], levels[1:], strict=True):
            # changes nothing unless a stage's size was odd; no `if`, which an exported graph could not follow
            out = out + F.interpolate(scale(level), size, mode="bilinear", align_corners=False)
        return self.conv_seg(self.dropout(out))


class PVTv2(SegmentationModel):
    """PVTv2 with FPN neck and head."""

    def __init__(
        self, name: str, num_classes: int = 20, *, drop_path_rate: float = 0.1, dropout: float = 0.1
    ) -> None:
        super().__init__()
        config = CONFIGS[name]
        self.name, self.num_classes, self.channels = name, num_classes, config.channels
        self.backbone = PyramidTransformer(config, drop_path_rate)
        self.neck = FPN(config.channels, NECK_CHANNELS)
        self.head = FPNHead(NECK_CHANNELS, HEAD_CHANNELS, num_classes, dropout)

    def encode(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return self.backbone.encode(images)

    def decode(self, features: tuple[Tensor, ...]) -> Tensor:
        return self.head(self.neck(features))
