"""timm's PVTv2: an ImageNet encoder and its classifier."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.layouts import Checkpoint, StateDict, rename

TABLE = (  # ours, theirs
    ("patch_embed1.{rest}", "patch_embed.{rest}"),
    ("patch_embed{i}.{rest}", "stages.{i}.downsample.{rest}"),
    ("block{i}.{j}.mlp.dwconv.dwconv", "stages.{i}.blocks.{j}.mlp.dwconv"),
    ("block{i}.{j}.{rest}", "stages.{i}.blocks.{j}.{rest}"),
    ("norm{i}", "stages.{i}.norm"),
)


def matches(state: StateDict) -> bool:
    """Whether these are its names."""
    return any(key.startswith("stages.0.blocks.") for key in state)


def read(checkpoint: Checkpoint, metadata: Mapping[str, Any]) -> Checkpoint:
    """Under our names. What an encoder that starts a training is given, the training decides."""
    return replace(checkpoint, state=rename(checkpoint.state, TABLE))
