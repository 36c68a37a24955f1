"""The pyramid vision transformer that MiT (SegFormer's encoder) and PVTv2 share.

MiT: Xie et al., "SegFormer", NeurIPS 2021. PVTv2: Wang et al., "PVT v2", CVMJ 2022. Both stack
four stages (overlapping patch embedding, N blocks, LayerNorm) at strides 4, 8, 16, 32, and they
differ in a few numbers only.

Shapes: B batch, H×W image, h×w a stage's map, N = h·w tokens, C channels, M reduced tokens.
Tokens (B, N, C) and the map (B, C, h, w) in channels_last order are the same memory, so going from
one to the other copies nothing. Parameters are named as in the published checkpoints.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.linear import Linear

MIN_HEIGHT = 64
"""Pixels of the smallest training image. Below, stage 4 has a single row, and CSF's BatchNorm may
have a single value to normalise; evaluation takes half as many."""


@dataclass(frozen=True)
class PyramidConfig:
    """The numbers in which the pyramid transformers differ, most of them one for each stage."""

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    mlp_ratios: tuple[int, int, int, int] = (4, 4, 4, 4)
    heads: tuple[int, int, int, int] = (1, 2, 5, 8)
    sr_ratios: tuple[int, int, int, int] = (8, 4, 2, 1)
    head_width: int = 256  # D, of SegFormer's decode head; PVTv2 has another head


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
        x = self.proj(x)  # (B, C, h, w)
        h, w = x.shape[-2:]
        return self.norm(to_tokens(x)), h, w


def patch_embeddings(
    in_channels: tuple[int, ...], channels: tuple[int, ...]
) -> list[OverlapPatchEmbed]:
    """One embedding for each stage: kernel 7, stride 4 first; kernel 3, stride 2 after that."""
    embeddings = []
    for i, (c_in, c_out) in enumerate(zip(in_channels, channels, strict=True)):
        kernel, stride = (7, 4) if i == 0 else (3, 2)
        embeddings.append(OverlapPatchEmbed(c_in, c_out, kernel, stride))
    return embeddings


class Attention(nn.Module):
    """Self-attention whose keys and values come from a map that is `sr_ratio` times smaller.

    With M = N / sr_ratio² reduced tokens it takes N·M products instead of N².
    """

    def __init__(self, channels: int, heads: int, sr_ratio: int, *, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.sr_ratio = sr_ratio
        self.q = Linear(channels, channels, bias)
        self.kv = Linear(channels, 2 * channels, bias)
        self.proj = Linear(channels, channels)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(channels, channels, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, h·w, C) -> (B, h·w, C)."""
        return self.attend(self.q(x), x, h, w)

    def attend(self, q: Tensor, x: Tensor, h: int, w: int) -> Tensor:
        """Queries and the tokens of keys and values, (B, h·w, C) both -> (B, h·w, C)."""
        q = q.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        if self.sr_ratio > 1:
            # A convolution whose kernel is its stride makes one token of each square of tokens.
            x = self.norm(to_tokens(self.sr(to_map(x, h, w))))  # (B, M, C)
        kv = self.kv(x).unflatten(2, (2, self.heads, -1))  # (B, M, 2, heads, d): all of k, then v
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, heads, M, d) each
        out = F.scaled_dot_product_attention(q, k, v)  # softmax(q·kᵀ/√d)·v: (B, heads, N, d)
        return self.proj(out.transpose(1, 2).flatten(2))


class DepthwiseConv(nn.Module):
    """Depthwise 3×3 convolution on tokens: what gives the transformer its sense of position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, h·w, C) -> (B, h·w, C)."""
        return to_tokens(self.dwconv(to_map(x, h, w)))


class Mlp(nn.Module):
    """Linear, depthwise 3×3, GELU, Linear."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(channels, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = Linear(hidden, channels)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, h·w, C) -> (B, h·w, C)."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), h, w)))


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a residual branch for some images of the batch."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C); what is kept is scaled up, so that the mean stays the same."""
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        # One number for each image: 0, or 1 / keep.
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    """Pre-norm transformer block of a stage, which is counted from 0."""

    def __init__(self, config: PyramidConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        channels = config.channels[stage]
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = Attention(channels, config.heads[stage], config.sr_ratios[stage])
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = Mlp(channels, channels * config.mlp_ratios[stage])

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, h·w, C) -> (B, h·w, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x), h, w))
        return x + self.drop_path(self.mlp(self.norm2(x), h, w))


class PyramidTransformer(nn.Module):
    """Four stages at strides 4, 8, 16, 32: the encoder of SegFormer and of PVTv2."""

    def __init__(self, config: PyramidConfig, drop_path_rate: float = 0.1) -> None:
        super().__init__()
        for i, embed in enumerate(patch_embeddings((3, *config.channels[:3]), config.channels)):
            setattr(self, f"patch_embed{i + 1}", embed)
        # Stochastic depth rises linearly over all blocks, from 0 to `drop_path_rate`.
        last_block = sum(config.depths) - 1
        rates = [drop_path_rate * k / last_block for k in range(last_block + 1)]
        for i in range(4):
            blocks = [Block(config, i, rates.pop(0)) for _ in range(config.depths[i])]
            setattr(self, f"block{i + 1}", nn.ModuleList(blocks))
            setattr(self, f"norm{i + 1}", nn.LayerNorm(config.channels[i], eps=1e-6))
        self.apply(init_weights)

    def forward(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Images (B, 3, H, W) -> features (B, C_i, h_i, w_i) and embeddings (B, h_i·w_i, C_i).

        A stage's embedding is what its patch embedding hands to its first block.
        """
        features, embeddings = [], []
        # Channels last, so that tokens and maps share memory through all four stages.
        x = images.contiguous(memory_format=torch.channels_last)
        for i in range(1, 5):
            tokens, h, w = getattr(self, f"patch_embed{i}")(x)
            embeddings.append(tokens)
            for block in getattr(self, f"block{i}"):
                tokens = block(tokens, h, w)
            x = to_map(getattr(self, f"norm{i}")(tokens), h, w)
            features.append(x)  # also the next stage's input
        return tuple(features), tuple(embeddings)


def init_weights(module: nn.Module) -> None:
    """Linear: truncated normal, deviation 0.02. Convolution: normal, variance 2 / fan_out."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels / module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
