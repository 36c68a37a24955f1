"""The other side of the table: what the original implementation does, and other libraries.

The original's networks are ours without what makes them fast: attention with an explicit softmax,
the decode head as the paper has it, plain `nn.Linear`. A step runs the teacher's head and carries
the losses' gradients back through its encoder, for the original freezes nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from types import MethodType

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

from models import SegmentationModel
from models.distillation import Distiller
from models.layouts.huggingface import architecture, to_huggingface
from models.linear import Linear
from models.pyramid import Attention, to_map, to_tokens
from models.segformer import AllMLPHead


def slowed(model: SegmentationModel) -> SegmentationModel:
    """A SegFormer of ours as the original implementation computes it, in place."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.forward = MethodType(explicit_attention, module)  # type: ignore[method-assign]
        elif isinstance(module, AllMLPHead):
            module.forward = module.plain  # type: ignore[method-assign]
    for module in model.modules():
        if isinstance(module, Linear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
    return model


def explicit_attention(self: Attention, x: Tensor, h: int, w: int) -> Tensor:
    """`Attention.forward` with the table of scores written out."""
    q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
    if self.sr_ratio > 1:
        x = self.norm(to_tokens(self.sr(to_map(x, h, w))))
    k, v = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    out = scores.softmax(dim=-1) @ v
    return self.proj(out.transpose(1, 2).flatten(2))


def published_step(
    distiller: Distiller, teacher: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """One training step. Gradients pile up beside the teacher's weights; no optimizer sees them."""
    optimizer.zero_grad()
    losses = distiller(images, labels, teacher(images))
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    return losses


def huggingface_segformer(ours: SegmentationModel) -> nn.Module:
    """Hugging Face's SegFormer with the weights of one of ours, for evaluation."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape = architecture(ours.name) | {"num_labels": ours.num_classes}
    return SegformerForSemanticSegmentation.from_pretrained(
        None,
        config=SegformerConfig(**shape),
        state_dict=to_huggingface(ours.state_dict()),
        attn_implementation="sdpa",
    ).eval()


def one_hot_counts(prediction: Tensor, labels: Tensor, num_outputs: int) -> list[Tensor]:
    """tp, fp and fn (n,) of int64 maps (B, H, W) by products of one-hot maps.

    The last of the outputs is ignored.
    """
    n = num_outputs - 1
    shape = (len(labels), num_outputs, *labels.shape[1:])
    p = torch.zeros(shape).scatter_(1, prediction[:, None], 1)[:, :n]
    t = torch.zeros(shape).scatter_(1, labels[:, None], 1)
    t, counted = t[:, :n], 1 - t[:, n:]
    return [x.sum((0, 2, 3)) for x in (p * t, p * (counted - t), (1 - p) * t)]


def colour_by_loop(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> Image.Image:
    """Class indices (H, W) to RGB: a mask for each class, and an assignment for each channel."""
    indices = torch.from_numpy(labels)
    out = torch.zeros(3, *labels.shape, dtype=torch.uint8)
    for index, colour in enumerate(palette):
        mask = indices == index
        for channel, value in enumerate(colour):
            out[channel][mask] = value
    return Image.fromarray(out.permute(1, 2, 0).contiguous().numpy())


def read_sample(image: Path, label: Path, height: int, ignore: int) -> tuple[Tensor, Tensor]:
    """Decode a photograph and its train ids, resize to `height` and to a quarter of it."""
    photograph = Image.open(image).convert("RGB")
    width = int(height * photograph.width / photograph.height)
    pixels = np.array(photograph.resize((width, height), Image.Resampling.BILINEAR))
    size = (int(width / 4 + 0.5), int(height / 4 + 0.5))
    ids = np.array(Image.open(label).resize(size, Image.Resampling.NEAREST))
    ids[ids == 255] = ignore
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), torch.from_numpy(ids)
