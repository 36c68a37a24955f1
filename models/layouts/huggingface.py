"""Hugging Face's SegformerForSemanticSegmentation, -ForImageClassification and bare SegformerModel, as their files are.

What is k and v there is one kv here. Their LayerNorms all have an eps of 1e-5, where SegFormer's blocks and stages
have 1e-6, and their image processor normalises by ImageNet's mean and deviation unless told not to; ours takes RGB in
[0, 1].
"""

from typing import Any

import torch

from models import segformer
from models.layouts import State, rename, swapped

TABLE = (  # ours, theirs
    ("patch_embed{i}.proj", "segformer.encoder.patch_embeddings.{i}.proj"),
    ("patch_embed{i}.norm", "segformer.encoder.patch_embeddings.{i}.layer_norm"),
    ("block{i}.{j}.norm1", "segformer.encoder.block.{i}.{j}.layer_norm_1"),
    ("block{i}.{j}.attn.q", "segformer.encoder.block.{i}.{j}.attention.self.query"),
    ("block{i}.{j}.attn.k", "segformer.encoder.block.{i}.{j}.attention.self.key"),
    ("block{i}.{j}.attn.v", "segformer.encoder.block.{i}.{j}.attention.self.value"),
    ("block{i}.{j}.attn.proj", "segformer.encoder.block.{i}.{j}.attention.output.dense"),
    ("block{i}.{j}.attn.sr", "segformer.encoder.block.{i}.{j}.attention.self.sr"),
    ("block{i}.{j}.attn.norm", "segformer.encoder.block.{i}.{j}.attention.self.layer_norm"),
    ("block{i}.{j}.norm2", "segformer.encoder.block.{i}.{j}.layer_norm_2"),
    ("block{i}.{j}.mlp.fc1", "segformer.encoder.block.{i}.{j}.mlp.dense1"),
    ("block{i}.{j}.mlp.dwconv.dwconv", "segformer.encoder.block.{i}.{j}.mlp.dwconv.dwconv"),
    ("block{i}.{j}.mlp.fc2", "segformer.encoder.block.{i}.{j}.mlp.dense2"),
    ("norm{i}", "segformer.encoder.layer_norm.{i}"),
    ("linear_c{i}.proj", "decode_head.linear_c.{i}.proj"),
    ("linear_fuse.conv", "decode_head.linear_fuse"),
    ("linear_fuse.bn", "decode_head.batch_norm"),
    ("linear_pred", "decode_head.classifier"),
    ("head", "classifier"),  # ImageNet's
)

BARE = (
    "encoder.block.",
    "encoder.patch_embeddings.",
    "encoder.layer_norm.",
)  # SegformerModel's, which is no one's part


def matches(state: State) -> bool:
    return any(key.startswith(("segformer.", *BARE)) for key in state)


def huggingface_shape(name: str) -> dict[str, Any]:
    """The arguments of transformers' SegformerConfig that give a SegFormer of ours its shape."""
    encoder, width = segformer.CONFIGS[name]
    return {
        "hidden_sizes": list(encoder.channels),
        "depths": list(encoder.depths),
        "num_attention_heads": list(encoder.heads),
        "sr_ratios": list(encoder.sr_ratios),
        "mlp_ratios": list(encoder.mlp_ratios),
        "decoder_hidden_size": width,
    }


def to_huggingface(state: State) -> State:
    """Our state dict under the names of Hugging Face's SegFormer files; the weights stay as they are."""
    split: State = {}
    for key, value in state.items():
        if ".attn.kv." in key:
            k, v = value.chunk(2)
            split |= {key.replace(".kv.", ".k."): k, key.replace(".kv.", ".v."): v}
        else:
            split[key] = value
    return rename(split, TABLE, stage=-1)


def from_huggingface(state: State) -> State:
    """`to_huggingface` undone. A network trained on normalised images still expects these."""
    prefixed = {
        f"segformer.{key}" if key.startswith(BARE) else key: value for key, value in state.items()
    }
    renamed = rename(prefixed, swapped(TABLE), stage=1)
    merged = dict(renamed)
    for k in renamed:
        v = k.replace(".attn.k.", ".attn.v.")
        if v != k and v in renamed and renamed[v].shape == renamed[k].shape:
            merged[k.replace(".attn.k.", ".attn.kv.")] = torch.cat([merged.pop(k), merged.pop(v)])
    return merged
