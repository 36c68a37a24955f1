"""The other side of the table: what the published code computes, as it computes it, and other libraries' SegFormers.

The networks are Hugging Face's: heads that resize, concatenate and then convolve, attention with an explicit
softmax or, as a peer, through `scaled_dot_product_attention`. Their weights are converted from ours.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

from models.base import SegmentationModel, SegmentationOutput
from models.distillation import Distiller
from models.distillation.losses import cross_entropy
from models.layouts.huggingface import huggingface_shape, to_huggingface


class HuggingFaceSegFormer(SegmentationModel):
    """Hugging Face's SegFormer with the weights, the LayerNorm eps and the outputs of one of ours.

    Args:
        attention: "eager" for the explicit softmax of the published code, or "sdpa".
    """

    def __init__(self, ours: SegmentationModel, attention: str) -> None:
        load_torchvision()
        from transformers import SegformerConfig, SegformerForSemanticSegmentation
        from transformers.utils import logging

        logging.disable_progress_bar()
        super().__init__()
        self.name, self.num_classes, self.channels = ours.name, ours.num_classes, ours.channels
        shape = huggingface_shape(ours.name) | {"num_labels": ours.num_classes}
        config = SegformerConfig(**shape)
        self.net: Any = SegformerForSemanticSegmentation.from_pretrained(
            None,
            config=config,
            state_dict=to_huggingface(ours.state_dict()),
            attn_implementation=attention,
        )
        for name, module in self.net.named_modules():
            if (
                isinstance(module, nn.LayerNorm)
                and "patch_embeddings" not in name
                and "reduction" not in name
            ):
                module.eps = 1e-6  # theirs is 1e-5 everywhere
        self.embeddings: list[Tensor] = []
        encoder_stages: Any = self.net.segformer.stages
        for stage in encoder_stages:
            stage.patch_embeddings.register_forward_hook(
                lambda *call: self.embeddings.append(call[-1][0])
            )
        self.train(ours.training)

    def forward(self, images: Tensor, logits: bool = True) -> SegmentationOutput:
        """As ours, with the head whether or not it is asked for."""
        output = self.net(images, output_hidden_states=True)
        embeddings, self.embeddings = tuple(self.embeddings), []
        return SegmentationOutput(output.logits, output.hidden_states, embeddings)


def published_step(
    distiller: Distiller, optimizer: Optimizer, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """One training step: the teacher's head runs too, and the losses' gradients flow back through its encoder.

    No optimizer ever sees those gradients: they only pile up beside the teacher's weights.
    """
    optimizer.zero_grad()
    teacher: Any = distiller.teacher
    target = teacher(images)
    student = distiller.student(images)
    losses = {"ce": cross_entropy(student.logits, labels, distiller.class_weights)}
    losses |= distiller.distillation_losses(images, student, target)
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    return losses


def one_hot_counts(
    prediction: Tensor, labels: Tensor, num_outputs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """tp, fp and fn (n,) of two int64 maps (B, H, W) by products of one-hot maps; the last index is ignored."""
    n = num_outputs - 1
    shape = (len(labels), num_outputs, *labels.shape[1:])
    p, t = (torch.zeros(shape).scatter_(1, indices[:, None], 1) for indices in (prediction, labels))
    p, t, counted = p[:, :n], t[:, :n], 1 - t[:, n:]
    tp, fp, fn = (product.sum((0, 2, 3)) for product in (p * t, p * (counted - t), (1 - p) * t))
    return tp, fp, fn


def colour_by_loop(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> Image.Image:
    """Class indices (H, W) to RGB: for every class a mask, and for every channel an assignment through it."""
    indices = torch.from_numpy(labels)
    out = torch.zeros(3, *labels.shape, dtype=torch.uint8)
    for index, colour in enumerate(palette):
        mask = indices == index
        for channel, value in enumerate(colour):
            out[channel][mask] = int(value)
    return Image.fromarray(out.permute(1, 2, 0).contiguous().numpy())


def read_sample(image: Path, label: Path, height: int, ignore: int) -> tuple[Tensor, Tensor]:
    """Decode a photograph and its train ids, resize to `height` and to a quarter of it, 255 becomes `ignore`."""
    photograph = Image.open(image).convert("RGB")
    width = int(height * photograph.width / photograph.height)
    pixels = np.array(photograph.resize((width, height), Image.Resampling.BILINEAR)).transpose(
        2, 0, 1
    )
    ids = np.array(
        Image.open(label).resize(
            (int(width / 4 + 0.5), int(height / 4 + 0.5)), Image.Resampling.NEAREST
        )
    )
    ids[ids == 255] = ignore
    return torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(ids)


def smp_segformer(num_classes: int) -> nn.Module:
    """segmentation_models_pytorch's SegFormer-B0."""
    load_torchvision()
    import segmentation_models_pytorch as smp

    return smp.Segformer("mit_b0", encoder_weights=None, classes=num_classes)


def load_torchvision() -> None:
    """Import torchvision, which smp needs and Hugging Face takes where it is, if it is installed.

    Its CUDA build looks for operators that it doesn't bring along on a CPU; nothing here calls them.
    """
    if find_spec("torchvision"):
        try:
            import_module("torchvision")
        except RuntimeError:
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            import_module("torchvision")  # now, as the definitions go with `library`
