"""Lite Vision Transformer (Yang et al., CVPR 2022), TransKD's student of another architecture.

It has SegFormer's decode head. Stage 1 attends within windows by convolutional self-attention
(CSA), stages 2–4 by recursive atrous self-attention (RASA). Parameters are named as in the
published checkpoints. Shapes: as in `models.pyramid`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import SegmentationModel
from models.linear import Linear
from models.pyramid import (
    Attention,
    PyramidConfig,
    init_weights,
    patch_embeddings,
    to_map,
    to_tokens,
)
from models.segformer import AllMLPHead

CONFIGS = {
    "lvt": PyramidConfig(
        channels=(64, 64, 160, 256),
        depths=(2, 2, 2, 2),
        mlp_ratios=(4, 8, 4, 4),
        heads=(2, 2, 5, 8),
        sr_ratios=(1, 4, 2, 1),  # stage 1 has no reduction: it attends within windows
    )
}


class ConvolutionalSelfAttention(nn.Module):
    """CSA: within every k×k window each output position weighs all k² input positions.

    The scores come from the mean of 2×2 positions. Every position of a window has a value matrix
    of its own, as in a convolution.
    """

    KERNEL = 3

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        positions = self.KERNEL**2
        self.heads = heads
        self.attn = Linear(channels, positions**2 * heads)
        self.pool = nn.AvgPool2d(2, ceil_mode=True)
        width = positions * channels
        self.weight = nn.Conv2d(width, width, 1, groups=positions, bias=False)
        self.proj = Linear(channels, channels)
        nn.init.normal_(self.weight.weight, std=(2 / width) ** 0.5)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, h·w, C) -> (B, h·w, C); L windows, k² positions."""
        k, channels = self.KERNEL, x.shape[2]
        x_map = to_map(x, h, w)
        # One position of the pooled map for each window: its stride is the windows'.
        scores = self.attn(to_tokens(self.pool(x_map))).unflatten(2, (self.heads, k * k, k * k))
        scale = (channels // self.heads) ** -0.5
        scores = (scores * scale).softmax(-1)  # (B, L, heads, k² out, k² in)

        windows = F.unfold(x_map, k, padding=1, stride=2)  # (B, C·k², L)
        # The grouped convolution wants each position's channels together: (B, k²·C, L).
        windows = windows.unflatten(1, (channels, k * k)).transpose(1, 2).flatten(1, 2)
        values = self.weight(windows[..., None]).squeeze(-1)  # (B, k²·C, L)
        values = values.unflatten(1, (k * k, self.heads, -1))  # (B, k², heads, d, L)
        values = values.permute(0, 4, 2, 1, 3)  # (B, L, heads, k² in, d)

        out = scores @ values  # (B, L, heads, k² out, d)
        out = out.permute(0, 2, 4, 3, 1).flatten(1, 3)  # (B, C·k², L)
        # Where windows overlap, their outputs add up.
        out = F.fold(out, (h, w), k, padding=1, stride=2)
        return self.proj(to_tokens(out))


class DilatedDepthwise(nn.Module):
    """One depthwise 3×3 kernel at dilations 1, 3 and 5: sum of SiLU(conv)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, 3, 3))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        scales = []
        for d in (1, 3, 5):  # with as much padding as dilation the map keeps its size
            y = F.conv2d(x, self.weight, padding=d, dilation=d, groups=x.shape[1])
            scales.append(F.silu(y))
        return scales[0] + scales[1] + scales[2]


class RecursiveAtrousSelfAttention(Attention):
    """RASA: attention whose queries see several scales, applied twice with the same weights."""

    def __init__(self, channels: int, heads: int, sr_ratio: int) -> None:
        super().__init__(channels, heads, sr_ratio, bias=False)
        if sr_ratio > 1:
            init_weights(self.sr)
        self.ds = DilatedDepthwise(channels)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, h·w, C) -> (B, h·w, C)."""
        y = F.silu(self.attention(x, h, w))
        # The sum of what went in and what came out goes through the same weights again.
        return F.silu(self.attention(x + y, h, w))

    def attention(self, x: Tensor, h: int, w: int) -> Tensor:
        """One pass: (B, h·w, C) -> (B, h·w, C)."""
        q = to_tokens(self.ds(to_map(self.q(x), h, w)))
        return self.attend(q, x, h, w)


class LinearMlp(nn.Module):
    """Linear, GELU, Linear: stage 1."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(channels, hidden)
        self.fc2 = Linear(hidden, channels)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, h·w, C) -> (B, h·w, C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class ConvMlp(nn.Module):
    """1×1 convolution, depthwise 3×3, GELU, 1×1 convolution: stages 2–4."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.depconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, h·w, C) -> (B, h·w, C)."""
        return to_tokens(self.fc2(F.gelu(self.depconv(self.fc1(to_map(x, h, w))))))


class Block(nn.Module):
    """Pre-norm transformer block of a stage, which is counted from 0."""

    def __init__(self, config: PyramidConfig, stage: int) -> None:
        super().__init__()
        channels, heads = config.channels[stage], config.heads[stage]
        hidden = channels * config.mlp_ratios[stage]
        self.norm1 = nn.LayerNorm(channels, eps=1e-5)
        self.attn: nn.Module
        self.mlp: nn.Module
        if stage == 0:
            self.attn = ConvolutionalSelfAttention(channels, heads)
        else:
            self.attn = RecursiveAtrousSelfAttention(channels, heads, config.sr_ratios[stage])
        self.norm2 = nn.LayerNorm(channels, eps=1e-5)
        self.mlp = LinearMlp(channels, hidden) if stage == 0 else ConvMlp(channels, hidden)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, h·w, C) -> (B, h·w, C)."""
        x = x + self.attn(self.norm1(x), h, w)
        return x + self.mlp(self.norm2(x), h, w)


class LVTEncoder(nn.Module):
    """Four stages, each a pair of its patch embedding (0) and its blocks (1), as published."""

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        embeds = patch_embeddings((3, *config.channels[:3]), config.channels)
        for i, embed in enumerate(embeds):
            blocks = nn.ModuleList(Block(config, i) for _ in range(config.depths[i]))
            self.stages.append(nn.ModuleList([embed, blocks]))

    def forward(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Images (B, 3, H, W) -> features (B, C_i, h_i, w_i) and embeddings (B, h_i·w_i, C_i).

        As published, an embedding is the projection *before* its LayerNorm.
        """
        features, embeddings = [], []
        x = images.contiguous(memory_format=torch.channels_last)
        stages: Any = self.stages
        for embed, blocks in stages:
            x = embed.proj(x)  # (B, C_i, h_i, w_i)
            h, w = x.shape[-2:]
            embeddings.append(to_tokens(x))
            tokens = embed.norm(embeddings[-1])
            for block in blocks:
                tokens = block(tokens, h, w)
            x = to_map(tokens, h, w)
            features.append(x)
        return tuple(features), tuple(embeddings)


class LVT(SegmentationModel):
    """LVT with SegFormer's head. It has no stochastic depth: `drop_path_rate` has no effect."""

    published_names = (
        ("linear_pred.", "head.classifier."),
        ("linear_", "head.linear_"),
        ("backbone.", "encoder.stages."),
    )

    def __init__(self, name: str, num_classes: int, drop_path_rate: float, dropout: float) -> None:
        config = CONFIGS[name]
        encoder = LVTEncoder(config)
        head = AllMLPHead(config.channels, config.head_width, num_classes, dropout)
        super().__init__(name, config.channels, encoder, head)
        # As published: other convolutions start as torch makes them.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_weights(module)
