"""The pyramid vision transformer that MiT (SegFormer's encoder) and PVTv2 share.

MiT: Xie et al., "SegFormer", NeurIPS 2021. PVTv2: Wang et al., "PVT v2", CVMJ 2022. Both stack four stages
(overlapping patch embedding, N blocks, LayerNorm) at strides 4, 8, 16, 32 and differ in a few numbers only.

Shapes: B batch, H×W image, h×w a stage's map, N = h·w tokens, C channels, M reduced tokens. Tokens (B, N, C) and
the map (B, C, h, w) in channels_last order are the same memory, so going from one to the other copies nothing.
Parameter names are those of the published checkpoints.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.linear import Linear

MIN_HEIGHT = 64  # of an image: stage 4 then has two rows


@dataclass(frozen=True)
class PyramidConfig:
    """The numbers in which the pyramid transformers differ, one entry per stage."""

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    mlp_ratios: tuple[int, int, int, int] = (4, 4, 4, 4)
    heads: tuple[int, int, int, int] = (1, 2, 5, 8)
    sr_ratios: tuple[int, int, int, int] = (8, 4, 2, 1)


def to_map(tokens: Tensor, h: int, w: int) -> Tensor:
    """(B, h·w, C) -> (B, C, h, w), a channels_last view."""
    return tokens.unflatten(1, (h, w)).permute(0, 3, 1, 2)


def to_tokens(feature_map: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h·w, C), a view when the map is channels_last."""
    return feature_map.permute(0, 2, 3, 1).flatten(1, 2)


class OverlapPatchEmbed(nn.Module):
    """Overlapping patch embedding: strided convolution, then LayerNorm over channels."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        """(B, C_in, H, W) -> tokens (B, h·w, C), h, w."""
        x = self.proj(x)
        h, w = x.shape[-2:]
        return self.norm(to_tokens(x)), h, w


def patch_embeddings(
    in_channels: tuple[int, ...], channels: tuple[int, ...]
) -> list[OverlapPatchEmbed]:
    """One embedding a stage: kernel 7, stride 4 first; kernel 3, stride 2 after that."""
    return [
        OverlapPatchEmbed(c_in, c, *((7, 4) if i == 0 else (3, 2)))
        for i, (c_in, c) in enumerate(zip(in_channels, channels, strict=True))
    ]


class Attention(nn.Module):
    """Self-attention whose keys and values come from a map reduced `sr_ratio` times in both directions."""

    def __init__(self, channels: int, heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.heads, self.sr_ratio = heads, sr_ratio
        self.q = Linear(channels, channels)
        self.kv = Linear(channels, 2 * channels)
        self.proj = Linear(channels, channels)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(channels, channels, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        if self.sr_ratio > 1:
            x = self.norm(to_tokens(self.sr(to_map(x, h, w))))  # (B, M, C)
        k, v = (
            self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (B, heads, M, d) each
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class DepthwiseConv(nn.Module):
    """Depthwise 3×3 convolution on tokens: what gives the transformer its sense of position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        return to_tokens(self.dwconv(to_map(x, h, w)))


class Mlp(nn.Module):
    """Linear, depthwise 3×3, GELU, Linear."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(channels, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = Linear(hidden, channels)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), h, w)))


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole samples while training."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self, channels: int, heads: int, sr_ratio: int, mlp_ratio: int, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = Attention(channels, heads, sr_ratio)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = Mlp(channels, channels * mlp_ratio)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), h, w))
        return x + self.drop_path(self.mlp(self.norm2(x), h, w))


class PyramidTransformer(nn.Module):
    """Four stages at strides 4, 8, 16, 32."""

    def __init__(self, config: PyramidConfig, drop_path_rate: float = 0.1) -> None:
        super().__init__()
        self.config = config
        blocks_before_last = sum(config.depths) - 1
        rates = [drop_path_rate * k / blocks_before_last for k in range(blocks_before_last + 1)]
        for i, embed in enumerate(
            patch_embeddings((3, *config.channels[:3]), config.channels), start=1
        ):
            setattr(self, f"patch_embed{i}", embed)
        stages = zip(
            config.channels,
            config.depths,
            config.heads,
            config.sr_ratios,
            config.mlp_ratios,
            strict=True,
        )
        for i, (channels, depth, heads, sr_ratio, mlp_ratio) in enumerate(stages, start=1):
            blocks = [
                Block(channels, heads, sr_ratio, mlp_ratio, rates.pop(0)) for _ in range(depth)
            ]
            setattr(self, f"block{i}", nn.ModuleList(blocks))
            setattr(self, f"norm{i}", nn.LayerNorm(channels, eps=1e-6))
        self.apply(init_weights)

    def encode(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Images (B, 3, H, W) -> features F1..F4 (B, C_i, h_i, w_i) and embeddings E1..E4 (B, h_i·w_i, C_i).

        The embedding is what the patch embedding hands to the stage's first block.
        """
        features, embeddings = [], []
        x = images.contiguous(memory_format=torch.channels_last)
        for i in range(1, 5):
            tokens, h, w = getattr(self, f"patch_embed{i}")(x)
            embeddings.append(tokens)
            for block in getattr(self, f"block{i}"):
                tokens = block(tokens, h, w)
            x = to_map(getattr(self, f"norm{i}")(tokens), h, w)
            features.append(x)
        return tuple(features), tuple(embeddings)


def settle(frozen: nn.Module, *, bf16: bool) -> None:
    """Do once what every call of a frozen network would do again: bring convolutions into their inputs' order and,
    where autocast rounds the matrices of its blocks to `bf16`, round them.
    """
    frozen.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for block in frozen.modules():
        if bf16 and isinstance(block, OverlapPatchEmbed | Block):
            for layer in block.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    layer.to(torch.bfloat16)


def init_weights(module: nn.Module) -> None:
    """The transformers' initialisation: Linear truncated normal 0.02, convolutions normal sqrt(2 / fan_out)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels / module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
