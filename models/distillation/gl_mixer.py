"""Global-Local context Mixer (GL-Mixer) of TransKD-GL: Liu et al., arXiv 2202.13393, III-C."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from models.base import SegmentationOutput, use_published_names
from models.distillation.pea import ALL_STAGES, PatchEmbeddingAlignment
from models.linear import Linear

MIXED_STAGE = 4


class SelfAttention(nn.Module):
    """Plain multi-head self-attention over tokens: the global context."""

    def __init__(self, channels: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(channels, 3 * channels, bias=False)
        self.proj = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mixer(nn.Module):
    """w_a · attention(E) + w_c · conv1(E) · sigmoid(conv2(E)), and E itself where `add`.

    The two learnable scalars start at 1; the published code leaves them uninitialised.
    """

    def __init__(self, channels: int, *, add: bool) -> None:
        super().__init__()
        self.add = add
        self.attn4 = SelfAttention(channels)
        self.conv1 = nn.Conv1d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=1)
        self.atten_weight = nn.Parameter(torch.ones(1))
        self.conv_weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        # The local context is that of the token sequence: neighbours in a row of the map.
        sequence = x.transpose(1, 2)  # (B, C, N)
        local = self.conv1(sequence) * torch.sigmoid(self.conv2(sequence))
        # Every token has seen all others in attn4, and its two neighbours in the convolutions.
        mixed = self.atten_weight * self.attn4(x) + self.conv_weight * local.transpose(1, 2)
        return mixed + x if self.add else mixed


class GLMixer(nn.Module):
    """PEA whose stage-4 embedding is mixed first.

    Raises UserError if stage 4 is not among `stages`.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        stages: Sequence[int] = ALL_STAGES,
        *,
        add: bool = False,
    ) -> None:
        if MIXED_STAGE not in stages:
            raise UserError("GL-Mixer mixes the embedding of stage 4; align that stage, or all")
        super().__init__()
        self.pea = PatchEmbeddingAlignment(student_channels, teacher_channels, stages)
        self.mixer = Mixer(student_channels[MIXED_STAGE - 1], add=add)
        use_published_names(self, (("embed", "pea.embed"), ("", "mixer.")))

    def forward(self, images: Tensor, student: SegmentationOutput) -> dict[int, Tensor]:
        """The student's output -> P_i (B, h_i·w_i, C_T) by stage i, for every aligned stage."""
        # Stages 1 to 3 are aligned as they are.
        *others, last = student.embeddings
        mixed = student._replace(embeddings=(*others, self.mixer(last)))
        return self.pea(images, mixed)
