"""Lite Vision Transformer (Yang et al., "Lite Vision Transformer with Enhanced Self-Attention", CVPR 2022).

TransKD's student of another architecture, with SegFormer's decode head. Stage 1 attends within windows by
convolutional self-attention (CSA), stages 2–4 by recursive atrous self-attention (RASA). Parameters are named as in
the published checkpoints. Shapes as in `models.pyramid`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.linear import Linear
from models.pyramid import (
    OverlapPatchEmbed,
    PyramidConfig,
    init_weights,
    patch_embeddings,
    to_map,
    to_tokens,
)
from models.segformer import AllMLPHead

HEAD_WIDTH = 256
# Stage 1 has no reduction: it attends within windows.
CONFIGS = {
    "lvt": PyramidConfig(
        (64, 64, 160, 256),
        (2, 2, 2, 2),
        mlp_ratios=(4, 8, 4, 4),
        heads=(2, 2, 5, 8),
        sr_ratios=(1, 4, 2, 1),
    )
}


class ConvolutionalSelfAttention(nn.Module):
    """CSA: within every k×k window each output position weighs all input positions, by scores from the window's mean.

    Every position of the window has a value matrix of its own, as in a convolution. Windows overlap and add up.
    """

    KERNEL, STRIDE, PADDING = 3, 2, 1

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        positions = self.KERNEL**2
        self.heads = heads
        self.attn = Linear(channels, positions**2 * heads)
        self.pool = nn.AvgPool2d(self.STRIDE, ceil_mode=True)
        self.weight = nn.Conv2d(
            positions * channels, positions * channels, 1, groups=positions, bias=False
        )
        self.proj = Linear(channels, channels)
        nn.init.normal_(self.weight.weight, std=(2 / (positions * channels)) ** 0.5)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        k, channels = self.KERNEL, x.shape[2]
        x_map = to_map(x, h, w)
        scores = self.attn(to_tokens(self.pool(x_map))).unflatten(2, (self.heads, k * k, k * k))
        scores = (scores * (channels // self.heads) ** -0.5).softmax(
            -1
        )  # (B, L windows, heads, k² out, k² in)
        windows = F.unfold(x_map, k, padding=self.PADDING, stride=self.STRIDE)  # (B, C·k², L)
        windows = (
            windows.unflatten(1, (channels, k * k)).transpose(1, 2).flatten(1, 2)
        )  # (B, k²·C, L)
        values = self.weight(windows[..., None]).squeeze(-1).unflatten(1, (k * k, self.heads, -1))
        out = scores @ values.permute(0, 4, 2, 1, 3)  # (B, L, heads, k², d)
        out = out.permute(0, 2, 4, 3, 1).flatten(1, 3)  # (B, C·k², L)
        out = F.fold(out, (h, w), k, padding=self.PADDING, stride=self.STRIDE)
        return self.proj(to_tokens(out))


class DilatedDepthwise(nn.Module):
    """One depthwise 3×3 kernel at dilations 1, 3 and 5: sum of SiLU(conv)."""

    DILATIONS = (1, 3, 5)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, 3, 3))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        one, three, five = (
            F.silu(F.conv2d(x, self.weight, padding=d, dilation=d, groups=len(self.weight)))
            for d in self.DILATIONS
        )
        return one + three + five


class RecursiveAtrousSelfAttention(nn.Module):
    """RASA: attention whose queries see several scales, applied twice with the same weights."""

    RECURSIONS = 2

    def __init__(self, channels: int, heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.heads, self.sr_ratio = heads, sr_ratio
        self.q = Linear(channels, channels, bias=False)
        self.kv = Linear(channels, 2 * channels, bias=False)
        self.proj = Linear(channels, channels)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(channels, channels, sr_ratio, sr_ratio)
            init_weights(self.sr)
            self.norm = nn.LayerNorm(channels, eps=1e-5)
        self.ds = DilatedDepthwise(channels)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        y = F.silu(self.attention(x, h, w))
        for _ in range(self.RECURSIONS - 1):
            y = F.silu(self.attention(x + y, h, w))
        return y

    def attention(self, x: Tensor, h: int, w: int) -> Tensor:
        q = to_tokens(self.ds(to_map(self.q(x), h, w)))
        q = q.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        if self.sr_ratio > 1:
            x = self.norm(to_tokens(self.sr(to_map(x, h, w))))  # (B, M, C)
        k, v = (
            self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (B, heads, M, d) each
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class LinearMlp(nn.Module):
    """Linear, GELU, Linear: stage 1."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(channels, hidden)
        self.fc2 = Linear(hidden, channels)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ConvMlp(nn.Module):
    """1×1 convolution, depthwise 3×3, GELU, 1×1 convolution: stages 2–4."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.depconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        return to_tokens(self.fc2(F.gelu(self.depconv(self.fc1(to_map(x, h, w))))))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, channels: int, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-5)
        self.attn = attention
        self.norm2 = nn.LayerNorm(channels, eps=1e-5)
        self.mlp = mlp

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        x = x + self.attn(self.norm1(x), h, w)
        return x + self.mlp(self.norm2(x), h, w)


class Stage(nn.ModuleList):
    """A patch embedding and its blocks, numbered 0 and 1 as in the published checkpoints."""

    def __init__(self, embed: OverlapPatchEmbed, blocks: list[Block]) -> None:
        super().__init__([embed, nn.ModuleList(blocks)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C_in, H, W) -> feature (B, C, h, w) and embedding (B, h·w, C), as published *before* its LayerNorm."""
        embed: Any
        blocks: Any
        embed, blocks = self
        x = embed.proj(x)
        h, w = x.shape[-2:]
        embedding = to_tokens(x)
        tokens = embed.norm(embedding)
        for block in blocks:
            tokens = block(tokens, h, w)
        return to_map(tokens, h, w), embedding


class LVT(AllMLPHead):
    """LVT with SegFormer's head. It has no stochastic depth: `drop_path_rate` is there for the other models' sake."""

    def __init__(
        self, name: str, num_classes: int = 20, *, drop_path_rate: float = 0.0, dropout: float = 0.1
    ) -> None:
        super().__init__()
        config = CONFIGS[name]
        self.name, self.num_classes, self.channels = name, num_classes, config.channels
        stages = zip(
            patch_embeddings((3, *config.channels[:3]), config.channels),
            config.channels,
            config.depths,
            config.heads,
            config.mlp_ratios,
            config.sr_ratios,
            strict=True,
        )
        self.backbone = nn.ModuleList()
        for i, (embed, channels, depth, heads, mlp_ratio, sr_ratio) in enumerate(stages):
            blocks = []
            for _ in range(depth):
                if i == 0:
                    attention: nn.Module = ConvolutionalSelfAttention(channels, heads)
                    mlp: nn.Module = LinearMlp(channels, channels * mlp_ratio)
                else:
                    attention = RecursiveAtrousSelfAttention(channels, heads, sr_ratio)
                    mlp = ConvMlp(channels, channels * mlp_ratio)
                blocks.append(Block(channels, attention, mlp))
            self.backbone.append(Stage(embed, blocks))
        self.add_head(config.channels, HEAD_WIDTH, num_classes, dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_weights(module)

    def encode(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        features, embeddings = [], []
        x = images.contiguous(memory_format=torch.channels_last)
        for stage in self.backbone:
            x, embedding = stage(x)
            features.append(x)
            embeddings.append(embedding)
        return tuple(features), tuple(embeddings)
