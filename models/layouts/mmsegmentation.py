"""SegFormers of mmsegmentation, and of NVIDIA's repository, which grew from it.

In mmsegmentation q, k and v are one matrix, and the MLP's Linears are 1×1 convolutions. Its head
has BatchNorm and ReLU on every stage (`models.segformer.ReLUHead`). Its LayerNorms all have an eps
of 1e-6, where SegFormer's patch embeddings and reductions have 1e-5. NVIDIA's names are ours with
prefixes.

Both write their configuration into the checkpoint: a text, a Python file of assignments. What it
says about the input is read from its syntax tree; nothing of it is executed.
"""

import ast
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from errors import UserError
from models.base import Normalisation
from models.layouts import IMAGENET, Checkpoint, StateDict, normalisation, rename, swap_channels

log = logging.getLogger(__name__)

TABLE = (  # ours, theirs
    ("patch_embed{i}.proj", "backbone.layers.{i}.0.projection"),
    ("patch_embed{i}.norm", "backbone.layers.{i}.0.norm"),
    ("block{i}.{j}.attn.qkv", "backbone.layers.{i}.1.{j}.attn.attn.in_proj"),
    ("block{i}.{j}.attn.proj", "backbone.layers.{i}.1.{j}.attn.attn.out_proj"),
    ("block{i}.{j}.mlp.fc1", "backbone.layers.{i}.1.{j}.ffn.layers.0"),
    ("block{i}.{j}.mlp.dwconv.dwconv", "backbone.layers.{i}.1.{j}.ffn.layers.1"),
    ("block{i}.{j}.mlp.fc2", "backbone.layers.{i}.1.{j}.ffn.layers.4"),
    ("block{i}.{j}.{rest}", "backbone.layers.{i}.1.{j}.{rest}"),
    ("norm{i}", "backbone.layers.{i}.2"),
)
POINTWISE = re.compile(r"block\d\.\d+\.mlp\.fc[12]\.weight")  # Linear here, 1×1 convolution there


def is_nvidias(state: StateDict) -> bool:
    return any(key.startswith("decode_head.linear_pred.") for key in state)


def matches(state: StateDict) -> bool:
    """Whether these are the names of one of the two."""
    first = re.compile(r"(backbone\.)?layers\.\d\.0\.projection\.")
    return is_nvidias(state) or any(first.match(key) for key in state)


def from_nvidia(state: StateDict) -> StateDict:
    """Without prefixes these are our names; `conv_seg` is a classifier that nothing uses."""
    bare = {
        key.removeprefix("backbone.").removeprefix("decode_head."): value
        for key, value in state.items()
    }
    return {key: value for key, value in bare.items() if not key.startswith("conv_seg.")}


def from_mmseg(state: StateDict) -> StateDict:
    """mmsegmentation's names to ours; ImageNet encoders come without `backbone.`."""
    theirs = {}
    for key, value in state.items():
        key = re.sub(r"^layers\.", "backbone.layers.", key)
        theirs[key.replace(".in_proj_", ".in_proj.")] = value
    ours: StateDict = {}
    for key, value in rename(theirs, TABLE).items():
        if ".attn.qkv." in key:
            c = len(value) // 3
            ours[key.replace(".qkv.", ".q.")] = value[:c]
            ours[key.replace(".qkv.", ".kv.")] = value[c:]
        elif POINTWISE.fullmatch(key):
            ours[key] = value.flatten(1)
        else:
            ours[key] = value
    return ours


def read(checkpoint: Checkpoint, metadata: Mapping[str, Any]) -> Checkpoint:
    """Under our names and for RGB images, with the normalisation that the configuration says.

    Where it says nothing, or nothing that can be read with certainty, ImageNet's is taken, which is
    what these libraries' SegFormers are trained with, and a warning says so.

    Raises UserError if it names several normalisations.
    """
    source, state = checkpoint.source, checkpoint.state
    state = from_nvidia(state) if is_nvidias(state) else from_mmseg(state)
    inputs: set[tuple[Normalisation | None, bool]] = set()
    problem = "says no mean and deviation of its input"
    try:
        inputs = {input_of(step) for step in normalising_steps(str(metadata.get("config") or ""))}
    except (SyntaxError, TypeError, ValueError, RecursionError):
        problem = "has a configuration that can't be read"
    if not inputs:
        log.warning("%s %s; ImageNet's normalisation is taken", source, problem)
        return replace(checkpoint, state=state, normalisation=IMAGENET)
    if len(inputs) > 1:
        raise UserError(
            f"the configuration in {source} names several normalisations of the input; "
            "save the weights with the one that they were trained with"
        )
    chosen, bgr = inputs.pop()
    state = swap_channels(state) if bgr else state
    return replace(checkpoint, state=state, normalisation=chosen)


def normalising_steps(text: str) -> Iterator[dict[str, Any]]:
    """Every `dict(…)` or `{…}` with a mean and a std; ValueError if they are no literals."""
    for node in ast.walk(ast.parse(text)):
        fields: dict[Any, ast.expr] = {}
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict":
            fields = {keyword.arg: keyword.value for keyword in node.keywords}
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            fields = {key.value: value for key, value in pairs if isinstance(key, ast.Constant)}
        if None in fields and fields.keys() & {"to_rgb", "bgr_to_rgb"}:
            raise ValueError("a step whose mean and std come from elsewhere, by **")
        if "mean" in fields and "std" in fields:
            known = {"type", "mean", "std", "to_rgb", "bgr_to_rgb"} & fields.keys()
            step = {name: ast.literal_eval(fields[name]) for name in known}
            # A dict(type="Normal", mean=0, std=0.01) is about the weights at the start.
            kind = str(step.get("type", "Normalize")).lower()
            if kind.endswith(("normalize", "preprocessor")):
                yield step


def input_of(step: dict[str, Any]) -> tuple[Normalisation | None, bool]:
    """A step's normalisation of RGB in [0, 1], and whether the network wants BGR.

    mmcv reads images as BGR; mean and std are of 0 to 255, in the order after the step.
    """
    mean, std = step["mean"], step["std"]
    if mean is None and std is None:  # the network is given 0 to 255
        mean, std = 0.0, 1.0
    if "bgr_to_rgb" in step or str(step.get("type")).endswith("DataPreProcessor"):
        rgb = step.get("bgr_to_rgb", False)  # mmsegmentation 1.x
    else:
        rgb = step.get("to_rgb", True)  # mmcv's Normalize
    chosen = normalisation(mean, std, scale=255.0)
    if chosen is not None and not rgb:
        chosen = Normalisation(chosen.mean[::-1], chosen.std[::-1])
    return chosen, not rgb
