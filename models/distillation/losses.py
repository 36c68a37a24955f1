"""The losses of TransKD: Liu et al., arXiv 2202.13393, section III-D.

Shapes: B batch, K classes, (h, w) a stage's map, C channels. Every loss is a scalar, a mean over
the batch. Those between feature maps are of one stage; the stages' are added up.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Class-weighted cross entropy, averaged over the weights of the pixels that count.

    Logits are (B, K, h, w), weights (K,), 0 for the ignore index. Labels are (B, h', w') integers
    below K. Where their size is not that of the logits, these are upsampled to it (bilinear).
    """
    labels = labels.long()
    logits = full_precision(logits)
    if labels.shape[1:] != logits.shape[2:]:
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, labels, weight, reduction="sum")
    # torch's own mean would divide by 0 where every pixel is ignored; this gives 0.
    return total / weight[labels].sum().clamp_min(torch.finfo(weight.dtype).tiny)


def hierarchical_context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """HCL (Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021).

    Mean squared error of two maps (B, C, h, w), plus that of both maps average-pooled to 4×4, 2×2
    and 1×1. The weight starts at 1 and halves with each level used. The sum is divided by the sum
    of the weights.
    """
    s, t = full_precision(student), full_precision(teacher)
    loss = F.mse_loss(s, t)
    weight = weights = 1.0
    # Pooling is linear: mean(s) − mean(t) = mean(s − t). One map is pooled instead of two.
    difference = s - t
    for level in (4, 2, 1):
        if level >= s.shape[2]:  # no smaller than the map itself
            continue
        weight /= 2
        weights += weight
        pooled = average_pool(difference, level)
        if not any(side % level for side in s.shape[2:]):
            difference = pooled  # the next level's windows are made of these, all equal
        loss = loss + weight * pooled.square().mean()
    return loss / weights


def average_pool(x: Tensor, level: int) -> Tensor:
    """(B, C, h, w) -> (B, C, level, level): adaptive average pooling.

    Windows of equal size are means over two axes, which torch takes twice as fast of channels_last
    maps: all of HCL's pooling 121 ms instead of 284 ms, forward and backward (docs/PERFORMANCE.md).
    """
    if any(side % level for side in x.shape[2:]):
        return F.adaptive_avg_pool2d(x, level)
    return x.unflatten(2, (level, -1)).unflatten(4, (level, -1)).mean((3, 5))


def channel_wise_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """`CWloss`: KL(teacher‖student) of each channel's softmax over space.

    Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021. Maps are
    (B, C, h, w). The loss is multiplied by the temperature's square, so that gradients keep their
    scale.
    """
    return divergence(student.flatten(2), teacher.flatten(2), dim=2, temperature=temperature)


def pixel_wise_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """`KL`: KL(teacher‖student) of each pixel's softmax over channels. Arguments as above."""
    return divergence(student, teacher, dim=1, temperature=temperature)


def divergence(student: Tensor, teacher: Tensor, dim: int, temperature: float) -> Tensor:
    """T² · KL(teacher‖student) of softmaxes along `dim`, averaged over all other dimensions."""
    # The published code takes the logarithm of a softmax, which underflows to NaN.
    log_s = (full_precision(student) / temperature).log_softmax(dim)
    log_t = (full_precision(teacher) / temperature).log_softmax(dim)
    total = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
    return total / (student.numel() / student.shape[dim]) * temperature**2


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two embeddings (B, N, C)."""
    return F.mse_loss(full_precision(student), full_precision(teacher))


def full_precision(x: Tensor) -> Tensor:
    """Losses are computed in float32 at least, also where the networks run in 16 bits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


FEATURE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "hcl": hierarchical_context_loss,
    "CWloss": channel_wise_divergence,
    "KL": pixel_wise_divergence,
}
