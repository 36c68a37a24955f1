"""Matrix products on a CPU, by the faster of the two libraries that torch brings for them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN_BATCH = 16
"""From this batch size on, torch hands every 1×1 convolution to oneDNN."""
ONEDNN_VALUES = 20480
"""torch keeps convolutions with fewer input values to itself."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: (…, C_in) · (C_out, C_in)ᵀ + (C_out,) -> (…, C_out).

    On a CPU F.linear calls MKL, which leaves processors other than Intel's at half their speed. A
    1×1 convolution is the same product through oneDNN, forward and backward: a training step of
    TransKD-Base takes 2.23 s instead of 2.66 s on an AMD EPYC (docs/PERFORMANCE.md). Anywhere else
    this is F.linear itself.
    """
    if not _onednn_is_faster(x):
        return F.linear(x, weight, bias)
    # Rows may be dealt out to the convolution's "images" in any way: (16, C_in, 1, rows / 16).
    images = x.reshape(ONEDNN_BATCH, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    out = F.conv2d(images, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _onednn_is_faster(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    rows = x.numel() // x.shape[-1]
    large = x.numel() >= ONEDNN_VALUES and rows % ONEDNN_BATCH == 0
    return large and torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
