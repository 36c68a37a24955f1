"""The losses of TransKD: Liu et al., arXiv 2202.13393, section III-D.

Shapes: B batch, K classes, (h, w) a stage's map, C channels. Every loss is a scalar, a mean over the batch.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Class-weighted cross entropy, averaged over the weights of the pixels that count.

    Args:
        logits: (B, K, h, w).
        labels: (B, h, w) integers below K. Where they are of another size, the logits are upsampled to it (bilinear).
        weight: (K,); 0 for the ignore index. A batch without a pixel that counts gives 0.
    """
    labels, logits = labels.long(), full_precision(logits)
    if labels.shape[1:] != logits.shape[2:]:
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, labels, weight, reduction="sum")
    return total / weight[labels].sum().clamp_min(torch.finfo(weight.dtype).tiny)


def hierarchical_context_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """HCL (Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021), summed over the stages.

    Per stage: mean squared error of the maps, plus that of both maps average-pooled to 4×4, 2×2 and 1×1. A pooled
    level at least as large as the map's height is left out; the weight starts at 1 and halves with each level used.

    Args:
        student, teacher: maps (B, C, h_i, w_i) of equal shapes, one a stage.
    """
    total = student[0].new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        s, t = full_precision(s), full_precision(t)
        loss, weight, weights = F.mse_loss(s, t), 1.0, 1.0
        difference = s - t  # pooling is linear: pool the difference once instead of both maps
        for level in (4, 2, 1):
            if level >= s.shape[2]:
                continue
            weight /= 2
            weights += weight
            if any(side % level for side in difference.shape[2:]):
                pooled = F.adaptive_avg_pool2d(difference, level)
            else:  # torch takes means of channels_last maps faster; and of even windows the next level's are made
                pooled = difference = (
                    difference.unflatten(2, (level, -1)).unflatten(4, (level, -1)).mean((3, 5))
                )
            loss = loss + weight * pooled.square().mean()
        total = total + loss / weights
    return total


def channel_wise_divergence(
    student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float = 1.0
) -> Tensor:
    """`CWloss`: KL(teacher‖student) of each channel's softmax over space (Shu et al., ICCV 2021), summed over stages.

    Args:
        student, teacher: maps (B, C, h_i, w_i) of equal shapes, one a stage.
        temperature: T; the loss is multiplied by T² so that gradients keep their scale.
    """
    flat = [(s.flatten(2), t.flatten(2)) for s, t in zip(student, teacher, strict=True)]
    return _divergence(flat, dim=2, temperature=temperature)


def pixel_wise_divergence(
    student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float = 1.0
) -> Tensor:
    """`KL`: KL(teacher‖student) of each pixel's softmax over channels, summed over stages. Arguments as above."""
    return _divergence(list(zip(student, teacher, strict=True)), dim=1, temperature=temperature)


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two embeddings (B, N, C)."""
    return F.mse_loss(full_precision(student), full_precision(teacher))


def full_precision(x: Tensor) -> Tensor:
    """Losses are computed in float32 at least, also where the networks run in bfloat16."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _divergence(pairs: Sequence[tuple[Tensor, Tensor]], dim: int, temperature: float) -> Tensor:
    """Sum over pairs of KL along `dim`, averaged over all other dimensions, times T²."""
    total = pairs[0][0].new_zeros(())
    for s, t in pairs:
        # log-softmax: the published log of a softmax underflows to NaN
        log_s, log_t = ((full_precision(x) / temperature).log_softmax(dim) for x in (s, t))
        divergence = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
        total = total + divergence / (s.numel() / s.shape[dim])
    return total * temperature**2


FEATURE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "hcl": hierarchical_context_loss,
    "CWloss": channel_wise_divergence,
    "KL": pixel_wise_divergence,
}
