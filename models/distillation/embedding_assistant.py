"""Embedding Assistant (EA) of TransKD-EA: Liu et al., arXiv 2202.13393, section III-C."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.base import SegmentationOutput, use_published_names
from models.distillation.gl_mixer import GLMixer
from models.distillation.pea import ALL_STAGES, PatchEmbeddingAlignment
from models.pyramid import init_weights, patch_embeddings


class EmbeddingAssistant(nn.Module):
    """P_i = u_i · PEA_i(E_i) + v_i · EA_i(F_{i-1}).

    EA_i is a second patch embedding, as wide as the teacher's; EA_1 sees the image. With `mix`,
    GL-Mixer takes the place of PEA.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        stages: Sequence[int] = ALL_STAGES,
        *,
        mix: bool = False,
    ) -> None:
        super().__init__()
        alignment = GLMixer if mix else PatchEmbeddingAlignment
        self.pea = alignment(student_channels, teacher_channels, stages)
        embeds = patch_embeddings((3, *student_channels[:3]), tuple(teacher_channels))
        for stage in stages:
            setattr(self, f"patch_embed{stage}", embeds[stage - 1].apply(init_weights))
        # u_1..u_4 and v_1..v_4, 0.1, 0.2, … 0.8 at first. All eight are there whichever stages
        # are aligned, for the released weights hold them.
        self.fuse_weights = nn.ParameterList(torch.full((1,), 0.1 * (k + 1)) for k in range(8))
        # EA's own keep their names; every other name is PEA's.
        own = (("patch_embed", "patch_embed"), ("fuse_weights", "fuse_weights"))
        use_published_names(self, (*own, ("", "pea.")))

    def forward(self, images: Tensor, student: SegmentationOutput) -> dict[int, Tensor]:
        """Images (B, 3, H, W) and the student's output -> P_i (B, h_i·w_i, C_T) by stage i."""
        inputs = (images, *student.features[:3])  # what each stage's patch embedding is given
        aligned = {}
        for stage, projected in self.pea(images, student).items():
            assistant, _, _ = getattr(self, f"patch_embed{stage}")(inputs[stage - 1])
            u, v = self.fuse_weights[stage - 1], self.fuse_weights[stage + 3]
            aligned[stage] = u * projected + v * assistant
        return aligned
