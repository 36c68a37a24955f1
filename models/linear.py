"""Matrix products, by the faster of the two libraries that torch brings for them on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MANY = 16  # from this batch size on, torch hands every 1×1 convolution to oneDNN
WORTHWHILE = 20480  # input values; torch keeps smaller convolutions to itself


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: (…, C_in) · (C_out, C_in)ᵀ + (C_out,) -> (…, C_out).

    On a CPU F.linear calls MKL, which leaves processors other than Intel's at half their speed. A 1×1 convolution
    is the same product through oneDNN, forward and backward. How rows are dealt out to "images" doesn't matter.
    """
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or not torch.backends.mkldnn.is_available()
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or x.numel() < WORTHWHILE
        or (x.numel() // x.shape[-1]) % MANY
    ):
        return F.linear(x, weight, bias)
    images = x.reshape(MANY, 1, -1, x.shape[-1]).permute(
        0, 3, 1, 2
    )  # (16, C_in, 1, rows), channels_last
    return (
        F.conv2d(images, weight[:, :, None, None], bias)
        .permute(0, 2, 3, 1)
        .reshape(*x.shape[:-1], -1)
    )


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
