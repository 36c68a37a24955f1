"""Hugging Face's SegFormer: its parameters' names, and the files that lie beside them.

SegformerForSemanticSegmentation, -ForImageClassification and the bare SegformerModel. What is k and
v there is one kv here. Its LayerNorms all have an eps of 1e-5, where SegFormer's blocks and stages
have 1e-6. Its image processor normalises by ImageNet's mean and deviation unless told not to.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from errors import UserError
from files import read_json
from models import segformer
from models.base import Normalisation
from models.factory import recognise
from models.layouts import IMAGENET, Checkpoint, StateDict, normalisation, rename, swap_channels

log = logging.getLogger(__name__)

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
    ("head", "classifier"),  # of ImageNet
)
BARE = ("encoder.block.", "encoder.patch_embeddings.", "encoder.layer_norm.")
"""The bare SegformerModel's names begin so."""
FIXED = {
    "patch_sizes": [7, 3, 3, 3],
    "strides": [4, 2, 2, 2],
    "hidden_act": "gelu",
    "num_channels": 3,
}
"""What every SegFormer of ours has, as SegformerConfig calls it."""
STEPS = re.compile("do_(resize|rescale|normalize|convert_rgb|flip_channel_order|reduce_labels)")
"""Steps of an image processor that are honoured here; do_reduce_labels is about labels alone."""


def matches(state: StateDict) -> bool:
    """Whether these are its names."""
    return any(key.startswith(("segformer.", *BARE)) for key in state)


def to_huggingface(state: StateDict) -> StateDict:
    """Our state dict under the names of Hugging Face's SegFormer; the weights stay as they are."""
    split: StateDict = {}
    for key, value in state.items():
        if ".attn.kv." in key:
            k, v = value.chunk(2)
            split[key.replace(".kv.", ".k.")] = k
            split[key.replace(".kv.", ".v.")] = v
        else:
            split[key] = value
    return rename(split, TABLE, to_theirs=True)


def from_huggingface(state: StateDict) -> StateDict:
    """`to_huggingface` undone."""
    prefixed = {
        f"segformer.{key}" if key.startswith(BARE) else key: value for key, value in state.items()
    }
    merged = rename(prefixed, TABLE)
    for k in [key for key in merged if ".attn.k." in key]:
        v = k.replace(".attn.k.", ".attn.v.")
        if v in merged and merged[v].shape == merged[k].shape:  # else loading names them
            merged[k.replace(".attn.k.", ".attn.kv.")] = torch.cat([merged.pop(k), merged.pop(v)])
    return merged


def architecture(name: str) -> dict[str, Any]:
    """The arguments of transformers' SegformerConfig that give a SegFormer of ours its shape."""
    encoder = segformer.CONFIGS[name]
    return {
        "hidden_sizes": list(encoder.channels),
        "depths": list(encoder.depths),
        "num_attention_heads": list(encoder.heads),
        "sr_ratios": list(encoder.sr_ratios),
        "mlp_ratios": list(encoder.mlp_ratios),
        "decoder_hidden_size": encoder.head_width,
    }


def read(checkpoint: Checkpoint, metadata: Mapping[str, Any]) -> Checkpoint:
    """Under our names and for RGB images, with what the files beside the weights say.

    These are `config.json`, and the image processor's file, which lies beside it or, where a
    Trainer wrote a checkpoint, in the folder above.

    Raises UserError if one of them can't be understood, or the network is of another architecture.
    """
    state = from_huggingface(checkpoint.state)
    path = Path(checkpoint.source)
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json") or {}
    name = recognise(state)
    known = architecture(name) | FIXED if name in segformer.CONFIGS else {}
    for key, ours in known.items():
        if config.get(key, ours) != ours:
            raise UserError(
                f"{folder}/config.json has {key} {config[key]}, and {name} has {ours}; "
                "such a network can't be built here"
            )
    files = ("preprocessor_config.json", "processor_config.json")
    places = [place / file for place in (folder, folder.parent) for file in files]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        log.warning("%s has no %s; ImageNet's normalisation is taken", folder, files[0])
    processor = {} if file is None else read_json(file) or {}
    try:
        labels = config.get("id2label") or {}
        names = tuple(str(labels[i]) for i in sorted(labels, key=int)) or None
        processor = processor.get("image_processor", processor)
        chosen = normalisation_of(processor)
        size = processor.get("size")
        if isinstance(size, dict):  # where it is height and width, we keep the image's aspect
            sides = [size[key] for key in ("shortest_edge", "height", "width") if key in size]
            size = min(sides, default=None)
        facts = {} if size is None else {"height": int(size)}
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        where = f"config.json or {file.name if file else files[0]} of {folder}"
        raise UserError(f"{where} can't be understood ({error}); mend or remove it") from error
    other = [
        key
        for key, value in processor.items()
        if key.startswith("do_") and value and not STEPS.fullmatch(key)
    ]
    if processor.get("resample", 2) != 2 or not processor.get("do_resize", True):
        other.append("another way of resizing")
    if other:
        log.warning("%s asks for %s, which is not done here", file, ", ".join(other))
    if processor.get("do_flip_channel_order"):  # it comes after the normalisation
        state = swap_channels(state)
    names = names or checkpoint.class_names
    return replace(checkpoint, state=state, normalisation=chosen, class_names=names, facts=facts)


def normalisation_of(processor: dict[str, Any]) -> Normalisation | None:
    """An image processor's, for our images of 0 to 1; its pixels are of 0 to 255."""
    scale = 255.0
    if processor.get("do_rescale", True):
        scale *= processor.get("rescale_factor", 1 / 255)
    if not processor.get("do_normalize", True):
        return normalisation(0.0, 1.0, scale)
    kind = processor.get("image_processor_type", processor.get("feature_extractor_type", ""))
    if kind and not kind.startswith("Segformer") and "image_mean" not in processor:
        raise ValueError(f"no image_mean, and the default of {kind} is not known here")
    mean, std = processor.get("image_mean"), processor.get("image_std")
    mean, std = (IMAGENET.mean if mean is None else mean), (IMAGENET.std if std is None else std)
    return normalisation(mean, std, scale)
