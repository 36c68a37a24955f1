"""Global-Local context Mixer (GL-Mixer) of TransKD-GL: Liu et al., arXiv 2202.13393, section III-C."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from models.base import SegmentationOutput
from models.distillation.pea import ALL_STAGES, PatchEmbeddingAlignment
from models.linear import Linear


class SelfAttention(nn.Module):
    """Plain multi-head self-attention over tokens: the global context."""

    def __init__(self, channels: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(channels, 3 * channels, bias=False)
        self.proj = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (B, heads, N, d) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GLMixer(PatchEmbeddingAlignment):
    """PEA whose stage-4 embedding is first mixed: w_a·global + w_c·local, `add` also keeps the embedding itself.

    Global is self-attention, local a gated convolution over the token sequence. The two learnable scalars start
    at 1; the published code leaves them uninitialised.

    Raises:
        UserError: stage 4 is not among `stages`.
    """

    MIXED_STAGE = 4

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        stages: Sequence[int] = ALL_STAGES,
        *,
        add: bool = False,
    ) -> None:
        if self.MIXED_STAGE not in stages:
            raise UserError(
                f"GL-Mixer mixes stage {self.MIXED_STAGE}, which is not aligned; use --embed 4 or 5"
            )
        super().__init__(student_channels, teacher_channels, stages)
        channels = student_channels[self.MIXED_STAGE - 1]
        self.add = add
        self.attn4 = SelfAttention(channels)
        self.conv1 = nn.Conv1d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=1)
        self.atten_weight = nn.Parameter(torch.ones(1))
        self.conv_weight = nn.Parameter(torch.ones(1))

    def embedding(self, stage: int, student: SegmentationOutput) -> Tensor:
        x = super().embedding(stage, student)
        return self.mix(x) if stage == self.MIXED_STAGE else x

    def mix(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        sequence = x.transpose(1, 2)  # (B, C, N)
        local = self.conv1(sequence) * torch.sigmoid(self.conv2(sequence))
        mixed = self.atten_weight * self.attn4(x) + self.conv_weight * local.transpose(1, 2)
        return mixed + x if self.add else mixed
