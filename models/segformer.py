"""SegFormer B0–B5: the Mix Transformer with an all-MLP decode head (Xie et al., NeurIPS 2021).

As in the published TransKD code the network takes RGB in [0, 1] and predicts at a quarter of the
image's size. Shapes: as in `models.pyramid`; D is the width of the decode head.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import SegmentationModel
from models.linear import Linear, linear
from models.pyramid import PyramidConfig, PyramidTransformer, to_map, to_tokens

CONFIGS = {
    "segformer_b0": PyramidConfig((32, 64, 160, 256), (2, 2, 2, 2)),
    "segformer_b1": PyramidConfig((64, 128, 320, 512), (2, 2, 2, 2)),
    "segformer_b2": PyramidConfig((64, 128, 320, 512), (3, 4, 6, 3), head_width=768),
    "segformer_b3": PyramidConfig((64, 128, 320, 512), (3, 4, 18, 3), head_width=768),
    "segformer_b4": PyramidConfig((64, 128, 320, 512), (3, 8, 27, 3), head_width=768),
    "segformer_b5": PyramidConfig((64, 128, 320, 512), (3, 6, 40, 3), head_width=768),
}


def resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear.

    On a GPU F.interpolate adds its gradients up one by one, in an order that changes: a third of
    the time of a step's kernels (docs/PERFORMANCE.md). As two matrix products it does not.
    """
    if x.is_cuda and x.requires_grad:
        return resize_by_products(x, size)
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def resize_by_products(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """The same: (H, h) · x · (w, W), as bilinear interpolation is linear in rows and columns."""
    b, c, h, w = x.shape
    rows, columns = interpolation_matrix(h, size[0], x), interpolation_matrix(w, size[1], x)
    tall = torch.bmm(rows.expand(b, -1, -1), x.permute(0, 2, 3, 1).flatten(2))  # (B, H, w·C)
    tall = tall.view(-1, w, c)  # (B·H, w, C)
    wide = torch.bmm(columns.expand(len(tall), -1, -1), tall)  # (B·H, W, C)
    # Of a view, autograd would copy the whole whenever something is added to it in place.
    return wide.view(b, *size, c).permute(0, 3, 1, 2).clone()


def interpolation_matrix(length: int, target: int, like: Tensor) -> Tensor:
    """(target, length): times `length` values, it interpolates them to `target` values."""
    wide = torch.promote_types(like.dtype, torch.float32)
    identity = torch.eye(length, dtype=wide, device=like.device)
    matrix = F.interpolate(identity[None], target, mode="linear", align_corners=False)[0].T
    return matrix.to(like.dtype)


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1×1 convolution of (B, C, h, w) with a matrix (C_out, C) -> (B, C_out, h, w)."""
    return linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


class StageProjection(nn.Module):
    """The head's Linear of one stage, under its published name `proj`."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = Linear(channels, width)


class ConvBatchNorm(nn.Module):
    """1×1 convolution, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.activate = nn.ReLU()
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C, h, w)."""
        return self.activate(self.bn(self.conv(x)))


class AllMLPHead(nn.Module):
    """SegFormer's decode head: features F1..F4 -> logits (B, classes, h_1, w_1).

    Args:
        channels: C_1..C_4 of the features.
        width: D.
        dropout: share of channels that are dropped ahead of the classifier.
    """

    def __init__(
        self, channels: tuple[int, ...], width: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        # In the published order, which one seed's random weights depend on.
        self.linear_c4 = StageProjection(channels[3], width)
        self.linear_c3 = StageProjection(channels[2], width)
        self.linear_c2 = StageProjection(channels[1], width)
        self.linear_c1 = StageProjection(channels[0], width)
        self.linear_fuse = ConvBatchNorm(4 * width, width)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def plain(self, features: tuple[Tensor, ...]) -> Tensor:
        """The head as the paper has it; `forward` gives the same numbers sooner."""
        size = features[0].shape[-2:]
        projections = (self.linear_c1, self.linear_c2, self.linear_c3, self.linear_c4)
        maps = []
        for projection, feature in zip(projections, features, strict=True):
            projected = to_map(projection.proj(to_tokens(feature)), *feature.shape[-2:])
            resized = F.interpolate(projected, size, mode="bilinear", align_corners=False)
            maps.append(resized)  # (B, D, h_1, w_1)
        fused = self.linear_fuse(torch.cat(maps[::-1], dim=1))  # stage 4 comes first
        return self.classifier(self.dropout(fused))

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        """F1..F4 (B, C_i, h_i, w_i) -> logits (B, classes, h_1, w_1).

        Everything ahead of BatchNorm is linear, and resizing commutes with it. So the matrices of
        projection and fusion are multiplied first, (D×D)·(D×C_i), and each stage is multiplied
        by the product at its own resolution: for an image of 512×1024 the student then takes 9.2 G
        multiply-accumulates (`python -m models.info segformer_b0`), and 17.8 G with `plain`. In
        evaluation BatchNorm, linear too, goes into the product.
        """
        weights, bias = self._fused_weights()
        size = features[0].shape[-2:]
        # The biases are the same everywhere, which resizing keeps: the coarsest map brings the sum.
        out = resize(project(features[3], weights[3], bias), size)
        for i in (2, 1):
            out += resize(project(features[i], weights[i]), size)
        out += project(features[0], weights[0])  # (B, D, h_1, w_1)
        if self.training:  # the statistics are the batch's: nothing could be folded in before
            out = self.linear_fuse.bn(out)
        out = self.dropout(F.relu(out, inplace=True))
        return project(out, self.classifier.weight.flatten(1), self.classifier.bias)

    def _fused_weights(self) -> tuple[list[Tensor], Tensor]:
        """Per stage, finest first, the (D, C_i) product of its two matrices; the bias (D,) of all.

        In evaluation BatchNorm's scale and shift are folded in.
        """
        bn = self.linear_fuse.bn
        device = bn.weight.device.type  # "meta", where MACs are counted, has no autocast
        # The products are tiny, and worth full precision where autocast would round them.
        mixed = device != "meta" and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if mixed else nullcontext():
            fuse = self.linear_fuse.conv.weight.flatten(1)  # (D, 4·D), stage 4 first
            bias = torch.zeros_like(bn.bias)
            if not self.training and bn.running_mean is not None and bn.running_var is not None:
                # bn(x) = scale · x + (bn.bias − mean · scale)
                scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
                fuse = fuse * scale[:, None]
                bias = bn.bias - bn.running_mean * scale
            weights = []
            projections = (self.linear_c1, self.linear_c2, self.linear_c3, self.linear_c4)
            for projection, part in zip(projections, reversed(fuse.chunk(4, dim=1)), strict=True):
                # part · (W·x + b) = (part·W)·x + part·b
                weights.append(part @ projection.proj.weight)
                bias = bias + part @ projection.proj.bias
        return weights, bias


class SegFormer(SegmentationModel):
    """SegFormer as NVIDIA and TransKD publish it."""

    published_names = (
        ("linear_pred.", "head.classifier."),
        ("linear_", "head.linear_"),
        ("", "encoder."),
    )

    def __init__(self, name: str, num_classes: int, drop_path_rate: float, dropout: float) -> None:
        config = CONFIGS[name]
        encoder = PyramidTransformer(config, drop_path_rate)
        head = AllMLPHead(config.channels, config.head_width, num_classes, dropout)
        super().__init__(name, config.channels, encoder, head)


class ReLUHead(nn.Module):
    """mmsegmentation's variant of the head: BatchNorm and ReLU on every stage; stage 1 first."""

    def __init__(self, channels: tuple[int, ...], width: int, num_classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvBatchNorm(c, width) for c in channels)
        self.fusion_conv = ConvBatchNorm(4 * width, width)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        """F1..F4 (B, C_i, h_i, w_i) -> logits (B, classes, h_1, w_1)."""
        size = features[0].shape[-2:]
        # As in `AllMLPHead`, the fusion's matrix is multiplied before the resize.
        parts = self.fusion_conv.conv.weight.chunk(4, dim=1)
        fused: Tensor | float = 0.0
        for conv, feature, part in zip(self.convs, features, parts, strict=True):
            fused = fused + resize(F.conv2d(conv(feature), part), size)
        return self.classifier(F.relu(self.fusion_conv.bn(fused)))


class MMSegSegFormer(SegmentationModel):
    """SegFormer as mmsegmentation trains it, to evaluate and to teach with weights from there.

    `width` is its head's D, 256 for every size.
    """

    published_names = (
        ("decode_head.conv_seg.", "head.classifier."),
        ("decode_head.", "head."),
        ("", "encoder."),
    )

    def __init__(self, name: str, num_classes: int, width: int) -> None:
        config = CONFIGS[name]
        encoder = PyramidTransformer(config)
        head = ReLUHead(config.channels, width, num_classes)
        super().__init__(name, config.channels, encoder, head)
