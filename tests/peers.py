"""Other libraries' SegFormers; mmsegmentation's is written out plainly."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.segformer import CONFIGS


def with_segformers_eps(peer: nn.Module) -> nn.Module:
    """Every LayerNorm of theirs has eps 1e-5; SegFormer's blocks and stages have 1e-6."""
    for name, module in peer.named_modules():
        own = "patch_embeddings" in name or "sequence_reduction" in name
        if isinstance(module, nn.LayerNorm) and not own:
            module.eps = 1e-6
    return peer


def randomise(module: nn.Module) -> nn.Module:
    """Weights of their own kind of randomness for every entry, BatchNorm's statistics included."""
    generator = torch.Generator().manual_seed(0)
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            fan_in = value[0].numel() if value.dim() > 1 else 25
            value.copy_(1 + noise.abs() if key.endswith("running_var") else noise / fan_in**0.5)
            if value.dim() == 1 and key.endswith("weight"):
                value += 1
    return module.eval()


def tokens_of(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h·w, C)."""
    return x.flatten(2).transpose(1, 2)


def norm_map(norm: nn.Module, x: Tensor) -> Tensor:
    """LayerNorm over the channels of (B, C, h, w)."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MMSegBlock(nn.Module):
    """A block of mmsegmentation's MixVisionTransformer, on maps (B, C, h, w)."""

    def __init__(self, c: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c, 1e-6), nn.LayerNorm(c, 1e-6)
        self.attn, self.ffn = nn.Module(), nn.Module()
        self.attn.attn = nn.MultiheadAttention(c, heads, batch_first=True)
        if reduction > 1:
            self.attn.sr = nn.Conv2d(c, c, reduction, reduction)
            self.attn.norm = nn.LayerNorm(c, 1e-6)
        depthwise = nn.Conv2d(4 * c, 4 * c, 3, padding=1, groups=4 * c)
        first, last = nn.Conv2d(c, 4 * c, 1), nn.Conv2d(4 * c, c, 1)
        self.ffn.layers = nn.Sequential(first, depthwise, nn.GELU(), nn.Dropout(0), last)

    def forward(self, x: Tensor) -> Tensor:
        y = norm_map(self.norm1, x)
        keys = norm_map(self.attn.norm, self.attn.sr(y)) if hasattr(self.attn, "sr") else y
        keys = tokens_of(keys)
        attended, _ = self.attn.attn(tokens_of(y), keys, keys, need_weights=False)
        x = x + attended.transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.ffn.layers(norm_map(self.norm2, x))


def conv_module(c_in: int, c_out: int) -> nn.Module:
    conv, bn = nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
    return nn.Sequential(OrderedDict(conv=conv, bn=bn, activate=nn.ReLU()))


class MMSegNetwork(nn.Module):
    """mmsegmentation 1.2.2's SegFormer with its parameters' names; images are normalised before."""

    def __init__(self, name: str, width: int, num_classes: int) -> None:
        super().__init__()
        encoder = CONFIGS[name]
        self.backbone, self.decode_head = nn.Module(), nn.Module()
        self.backbone.layers = nn.ModuleList()
        for i, c in enumerate(encoder.channels):
            embed = nn.Module()
            kernel, stride = (3, 2) if i else (7, 4)
            c_in = encoder.channels[i - 1] if i else 3
            embed.projection = nn.Conv2d(c_in, c, kernel, stride, padding=kernel // 2)
            embed.norm = nn.LayerNorm(c, 1e-6)
            numbers = c, encoder.heads[i], encoder.sr_ratios[i]
            blocks = nn.ModuleList(MMSegBlock(*numbers) for _ in range(encoder.depths[i]))
            self.backbone.layers.append(nn.ModuleList([embed, blocks, nn.LayerNorm(c, 1e-6)]))
        self.decode_head.convs = nn.ModuleList(conv_module(c, width) for c in encoder.channels)
        self.decode_head.fusion_conv = conv_module(4 * width, width)
        self.decode_head.conv_seg = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, classes, h, w)."""
        maps: list[Tensor] = []
        stages = zip(self.backbone.layers, self.decode_head.convs, strict=True)
        for (embed, blocks, norm), conv in stages:
            x = norm_map(embed.norm, embed.projection(x))
            for block in blocks:
                x = block(x)
            x = norm_map(norm, x)
            size = maps[0].shape[2:] if maps else x.shape[2:]
            maps.append(F.interpolate(conv(x), size, mode="bilinear"))
        return self.decode_head.conv_seg(self.decode_head.fusion_conv(torch.cat(maps, 1)))
