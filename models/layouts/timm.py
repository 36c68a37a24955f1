"""timm's PVTv2: an ImageNet encoder and its classifier."""

from models.layouts import State, rename, swapped

TABLE = (  # ours, theirs
    ("patch_embed1.proj", "patch_embed.proj"),
    ("patch_embed1.norm", "patch_embed.norm"),
    ("patch_embed{i}.proj", "stages.{i}.downsample.proj"),
    ("patch_embed{i}.norm", "stages.{i}.downsample.norm"),
    ("block{i}.{j}.norm1", "stages.{i}.blocks.{j}.norm1"),
    ("block{i}.{j}.attn.q", "stages.{i}.blocks.{j}.attn.q"),
    ("block{i}.{j}.attn.kv", "stages.{i}.blocks.{j}.attn.kv"),
    ("block{i}.{j}.attn.proj", "stages.{i}.blocks.{j}.attn.proj"),
    ("block{i}.{j}.attn.sr", "stages.{i}.blocks.{j}.attn.sr"),
    ("block{i}.{j}.attn.norm", "stages.{i}.blocks.{j}.attn.norm"),
    ("block{i}.{j}.norm2", "stages.{i}.blocks.{j}.norm2"),
    ("block{i}.{j}.mlp.fc1", "stages.{i}.blocks.{j}.mlp.fc1"),
    ("block{i}.{j}.mlp.dwconv.dwconv", "stages.{i}.blocks.{j}.mlp.dwconv"),
    ("block{i}.{j}.mlp.fc2", "stages.{i}.blocks.{j}.mlp.fc2"),
    ("norm{i}", "stages.{i}.norm"),
)


def matches(state: State) -> bool:
    return any(key.startswith("stages.0.blocks.") for key in state)


def from_timm(state: State) -> State:
    return rename(state, swapped(TABLE), stage=1)
