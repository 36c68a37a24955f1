"""SegFormer B0–B5: the Mix Transformer with an all-MLP decode head (Xie et al., NeurIPS 2021).

As in the published TransKD code the network takes RGB in [0, 1] and predicts at a quarter of the image's size.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import SegmentationModel
from models.linear import Linear, linear
from models.pyramid import PyramidConfig, PyramidTransformer

CONFIGS: dict[str, tuple[PyramidConfig, int]] = {  # encoder, width D of the decode head
    "segformer_b0": (PyramidConfig((32, 64, 160, 256), (2, 2, 2, 2)), 256),
    "segformer_b1": (PyramidConfig((64, 128, 320, 512), (2, 2, 2, 2)), 256),
    "segformer_b2": (PyramidConfig((64, 128, 320, 512), (3, 4, 6, 3)), 768),
    "segformer_b3": (PyramidConfig((64, 128, 320, 512), (3, 4, 18, 3)), 768),
    "segformer_b4": (PyramidConfig((64, 128, 320, 512), (3, 8, 27, 3)), 768),
    "segformer_b5": (PyramidConfig((64, 128, 320, 512), (3, 6, 40, 3)), 768),
}


class StageProjection(nn.Module):
    """The head's Linear of one stage, under its published name."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = Linear(channels, width)


class Fuse(nn.Module):
    """The head's 1×1 convolution over the concatenated stages, and its BatchNorm, under their published names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4 * width, width, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")


class AllMLPHead(SegmentationModel):
    """The part of a model that is SegFormer's decode head; its layers lie beside the encoder's, as published."""

    def add_head(
        self, channels: tuple[int, ...], width: int, num_classes: int, dropout: float
    ) -> None:
        """Build the layers for stages of these channels; `width` is D, `dropout` of whole channels."""
        for i in range(4, 0, -1):
            setattr(self, f"linear_c{i}", StageProjection(channels[i - 1], width))
        self.linear_fuse = Fuse(width)
        self.dropout = nn.Dropout2d(dropout)
        self.linear_pred = nn.Conv2d(width, num_classes, 1)

    def decode(self, features: tuple[Tensor, ...]) -> Tensor:
        """F1..F4 -> logits (B, classes, h_1, w_1).

        The head is: Linear per stage to D channels, bilinear resize to stride 4, concatenation (stage 4 first),
        1×1 convolution to D, BatchNorm, ReLU, classifier. Everything before BatchNorm is linear and resizing
        commutes with it, so the two matrices are multiplied first, (D×D)·(D×C_i), and the product is applied at
        each stage's own resolution: the same numbers for a fraction of the arithmetic. In evaluation BatchNorm,
        linear too, goes into the product.
        """
        bn = self.linear_fuse.bn
        weights, bias = self._fused_weights()
        size = features[0].shape[-2:]

        def stage(i: int, bias: Tensor | None = None) -> Tensor:
            y = linear(features[i].permute(0, 2, 3, 1), weights[i], bias).permute(
                0, 3, 1, 2
            )  # (B, D, h_i, w_i)
            return y if i == 0 else F.interpolate(y, size, mode="bilinear", align_corners=False)

        out = stage(3, bias)
        for i in (2, 1, 0):
            out += stage(i)
        if self.training:
            out = bn(out)
        out = self.dropout(F.relu(out, inplace=True)).permute(0, 2, 3, 1)
        return linear(out, self.linear_pred.weight.flatten(1), self.linear_pred.bias).permute(
            0, 3, 1, 2
        )

    def _fused_weights(self) -> tuple[list[Tensor], Tensor]:
        """Per stage, finest first, the (D, C_i) product of the head's two matrices; and one bias (D,) for all.

        Resizing leaves a constant as it is, so the stages' biases add up, and the coarsest map can bring the sum.
        In evaluation BatchNorm is folded in.
        """
        bn = self.linear_fuse.bn
        device = bn.weight.device.type
        mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with (
            torch.autocast(device, enabled=False) if mixed else nullcontext()
        ):  # tiny, and worth full precision
            fuse = self.linear_fuse.conv.weight.flatten(1)  # (D, 4·D), stage 4 first
            bias = torch.zeros_like(bn.bias)
            if not self.training and bn.running_mean is not None and bn.running_var is not None:
                scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
                fuse = fuse * scale[:, None]
                bias = bn.bias - bn.running_mean * scale
            weights = []
            for i, part in enumerate(reversed(fuse.chunk(4, dim=1)), start=1):
                projection: nn.Linear = getattr(self, f"linear_c{i}").proj
                weights.append(part @ projection.weight)
                bias = bias + part @ projection.bias
        return weights, bias


class SegFormer(PyramidTransformer, AllMLPHead):
    """SegFormer; parameters are named as in the published checkpoints."""

    def __init__(
        self, name: str, num_classes: int = 20, *, drop_path_rate: float = 0.1, dropout: float = 0.1
    ) -> None:
        config, width = CONFIGS[name]
        super().__init__(config, drop_path_rate)
        self.name, self.num_classes, self.channels = name, num_classes, config.channels
        self.add_head(config.channels, width, num_classes, dropout)


class ConvBatchNorm(nn.Module):
    """1×1 convolution, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class ReLUHead(nn.Module):
    """mmsegmentation's variant of the decode head, in its names: BatchNorm and ReLU on every stage; stage 1 first."""

    def __init__(
        self, channels: tuple[int, ...], width: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvBatchNorm(c, width) for c in channels)
        self.fusion_conv = ConvBatchNorm(len(channels) * width, width)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        """F1..F4 -> logits (B, classes, h_1, w_1). As in `AllMLPHead` the fusion's matrix comes before the resize."""
        size = features[0].shape[-2:]
        parts = self.fusion_conv.conv.weight.chunk(len(features), dim=1)
        first, *coarser = (
            F.conv2d(conv(x), part)
            for conv, x, part in zip(self.convs, features, parts, strict=True)
        )
        for y in coarser:
            first = first + F.interpolate(y, size, mode="bilinear", align_corners=False)
        return self.conv_seg(self.dropout(F.relu(self.fusion_conv.bn(first))))


class ReLUHeadSegFormer(PyramidTransformer, SegmentationModel):
    """SegFormer as mmsegmentation trains it; for weights that come from there. `width` is the decode head's."""

    def __init__(
        self,
        name: str,
        num_classes: int = 20,
        *,
        width: int = 256,
        drop_path_rate: float = 0.1,
        dropout: float = 0.1,
    ) -> None:
        config, _ = CONFIGS[name]
        super().__init__(config, drop_path_rate)
        self.name, self.num_classes, self.channels = name, num_classes, config.channels
        self.decode_head = ReLUHead(config.channels, width, num_classes, dropout)

    def decode(self, features: tuple[Tensor, ...]) -> Tensor:
        return self.decode_head(features)
