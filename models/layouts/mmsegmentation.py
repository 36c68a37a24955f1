"""mmsegmentation's SegFormer: MixVisionTransformer with SegformerHead, as its checkpoints name them.

q, k and v are one matrix there, and the MLP's Linears are 1×1 convolutions. Its head has BatchNorm and ReLU on every
stage (`models.segformer.ReLUHead`, which keeps its names). Its LayerNorms all have an eps of 1e-6, where SegFormer's
patch embeddings and reductions have 1e-5.
"""

import re

import torch
from torch import Tensor

from models.layouts import State, rename, swapped

TABLE = (  # ours, theirs
    ("patch_embed{i}.proj", "backbone.layers.{i}.0.projection"),
    ("patch_embed{i}.norm", "backbone.layers.{i}.0.norm"),
    ("block{i}.{j}.norm1", "backbone.layers.{i}.1.{j}.norm1"),
    ("block{i}.{j}.attn.qkv", "backbone.layers.{i}.1.{j}.attn.attn.in_proj"),
    ("block{i}.{j}.attn.proj", "backbone.layers.{i}.1.{j}.attn.attn.out_proj"),
    ("block{i}.{j}.attn.sr", "backbone.layers.{i}.1.{j}.attn.sr"),
    ("block{i}.{j}.attn.norm", "backbone.layers.{i}.1.{j}.attn.norm"),
    ("block{i}.{j}.norm2", "backbone.layers.{i}.1.{j}.norm2"),
    ("block{i}.{j}.mlp.fc1", "backbone.layers.{i}.1.{j}.ffn.layers.0"),
    ("block{i}.{j}.mlp.dwconv.dwconv", "backbone.layers.{i}.1.{j}.ffn.layers.1"),
    ("block{i}.{j}.mlp.fc2", "backbone.layers.{i}.1.{j}.ffn.layers.4"),
    ("norm{i}", "backbone.layers.{i}.2"),
)
POINTWISE = re.compile(r"block\d\.\d+\.mlp\.fc[12]\.weight")  # Linear here, 1×1 convolution there
BATCHNORM_EPS = 1e-5


def matches(state: State) -> bool:
    return any(re.match(r"(backbone\.)?layers\.\d\.0\.projection\.", key) for key in state)


def from_mmseg(state: State) -> State:
    """Its names to ours; ImageNet encoders come without `backbone.`."""
    theirs = {
        re.sub(r"^layers\.", "backbone.layers.", key).replace(".in_proj_", ".in_proj."): value
        for key, value in state.items()
    }
    ours: State = {}
    for key, value in rename(theirs, swapped(TABLE), stage=1).items():
        if ".attn.qkv." in key and value.dim() and len(value) % 3 == 0:
            c = len(value) // 3
            ours |= {
                key.replace(".qkv.", ".q."): value[:c],
                key.replace(".qkv.", ".kv."): value[c:],
            }
        else:
            ours[key] = value.flatten(1) if POINTWISE.fullmatch(key) and value.dim() == 4 else value
    return ours


def to_mmseg(state: State) -> State:
    """A SegFormer of ours, with either head, under mmsegmentation's names."""
    if "linear_pred.weight" in state:
        head = ("linear_c", "linear_fuse.", "linear_pred.")
        state = {
            key: value for key, value in state.items() if not key.startswith(head)
        } | relu_head(state)
    merged: State = {}
    for key, value in state.items():
        if ".attn.q." in key:
            merged[key.replace(".q.", ".qkv.")] = torch.cat(
                [value, state[key.replace(".q.", ".kv.")]]
            )
        elif ".attn.kv." not in key:
            merged[key] = value[..., None, None] if POINTWISE.fullmatch(key) else value
    renamed = rename(merged, TABLE, stage=-1)
    return {key.replace(".in_proj.", ".in_proj_"): value for key, value in renamed.items()}


def relu_head(state: State) -> State:
    """Our decode head as one with a ReLU on every stage, twice as wide, that computes the same.

    x = relu(x) - relu(-x): every stage gives [x, -x], with its Linear's bias in a BatchNorm that does nothing else, and
    the fusion's matrix takes the difference. The fusion's and the classifier's second halves are idle.
    """
    fuse, classifier = state["linear_fuse.conv.weight"], state["linear_pred.weight"]
    zeros, ones = fuse.new_zeros(len(fuse)), fuse.new_ones(len(fuse))
    zeros2, ones2 = torch.cat([zeros, zeros]), torch.cat([ones, ones])
    head = {
        "decode_head.conv_seg.weight": torch.cat([classifier, torch.zeros_like(classifier)], dim=1),
        "decode_head.conv_seg.bias": state["linear_pred.bias"],
    }

    def add(
        name: str, conv: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor
    ) -> None:
        layer = {"conv.weight": conv, "bn.weight": weight, "bn.bias": bias}
        layer |= {"bn.running_mean": mean, "bn.running_var": var}
        layer |= {"bn.num_batches_tracked": state["linear_fuse.bn.num_batches_tracked"]}
        head.update({f"decode_head.{name}.{key}": value for key, value in layer.items()})

    differences = []
    for i, part in enumerate(
        reversed(fuse.chunk(4, dim=1))
    ):  # stage 4 first here, stage 1 first there
        linear, bias = (state[f"linear_c{i + 1}.proj.{leaf}"] for leaf in ("weight", "bias"))
        conv = torch.cat([linear, -linear])[..., None, None]
        add(f"convs.{i}", conv, ones2, torch.cat([bias, -bias]), zeros2, ones2 - BATCHNORM_EPS)
        differences += [part, -part]
    difference = torch.cat(differences, dim=1)
    idle = {"weight": zeros, "bias": zeros, "running_mean": zeros, "running_var": ones}
    batchnorm = [torch.cat([state[f"linear_fuse.bn.{leaf}"], half]) for leaf, half in idle.items()]
    add("fusion_conv", torch.cat([difference, torch.zeros_like(difference)]), *batchnorm)
    return head
