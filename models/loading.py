"""From a checkpoint to a network: recognise it, load it in full or refuse it, write it again."""

import io
import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from errors import UserError
from files import atomic_write
from models.base import SegmentationModel
from models.checkpoints import Checkpoint, read_checkpoint, some
from models.factory import BUILDERS, create_model, recognise
from models.layouts import StateDict
from models.segformer import MMSegSegFormer

log = logging.getLogger(__name__)

# Published names of decode heads begin so, and of what ImageNet's checkpoints have in their place.
HEADS = ("linear_c", "linear_fuse.", "linear_pred.", "neck.", "head.", "decode_head.", "norm.")


def load_model(source: Checkpoint | Path | str) -> SegmentationModel:
    """The bare network from any recognised checkpoint, distilled or not, in eval mode.

    Its `class_names` and `normalisation` are what the file says. The order of its classes is the
    file's: `model.reorder` changes it.

    Raises UserError as `read_checkpoint` does, or if it is no model that is known here, has no
    decode head, or has keys that do not fit, which are listed.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    state, named = checkpoint.state, checkpoint.model
    name = named if named in BUILDERS else recognise(state)
    if name is None:
        what = f"{named}, which models/factory.py lacks" if named else "no known model"
        raise UserError(
            f"{checkpoint.source} holds {what} ({some(list(state))}); known: {', '.join(BUILDERS)}"
        )
    classifier = checkpoint.classifier
    if classifier is None:
        raise UserError(
            f"{checkpoint.source} holds {name}'s encoder without a decode head, as ImageNet "
            "checkpoints do; it can start a training, not predict"
        )
    num_classes, width = state[classifier].shape[:2]
    is_mmseg = classifier.startswith("decode_head.")
    model = (
        MMSegSegFormer(name, num_classes, width) if is_mmseg else create_model(name, num_classes)
    )
    load_state(model, checkpoint)
    return model.eval()


def load_state(model: SegmentationModel, checkpoint: Checkpoint) -> None:
    """Load a whole network into `model`, with what the file says about it.

    Raises UserError if keys or shapes do not fit, which are listed, or weights are not finite;
    the model is then as it was.
    """
    state, source = checkpoint.state, checkpoint.source
    wanted = model.state_dict()
    problems = {
        "missing": [key for key in wanted if key not in state],
        "unknown": [key for key in state if key not in wanted],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    detail = "; ".join(
        f"{len(keys)} {what}: {some(keys)}" for what, keys in problems.items() if keys
    )
    if detail:
        recognised = recognise(state)
        looks = f"; it looks like {recognised}" if recognised and recognised != model.name else ""
        raise UserError(
            f"{source} does not fit {model.name} with {model.num_classes} classes{looks} ({detail})"
        )
    not_finite = [k for k, value in wanted.items() if not state[k].to(value.dtype).isfinite().all()]
    if not_finite:
        raise UserError(
            f"{source} holds NaN or infinity ({some(not_finite)}); its training failed: "
            "take an earlier one"
        )
    model.load_state_dict(state)
    model.normalisation = checkpoint.normalisation
    model.class_names = checkpoint.class_names


def start_from(model: SegmentationModel, source: Checkpoint | Path | str) -> bool:
    """Start `model` from an ImageNet encoder or a whole network.

    Returns whether the head was taken as well.

    Of a network with other classes, the classifier keeps its rows for classes of the same name; a
    warning names the classes that start anew. Of mmsegmentation's networks the encoder alone is
    taken: their head is of another kind.

    Raises UserError as `read_checkpoint` does, or if the encoder's keys do not fit.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    class_names, normalisation = model.class_names, model.normalisation
    wanted = model.state_dict()
    fits = checkpoint.classifier in wanted
    if fits:
        state = with_classes_of(model, checkpoint)
    else:
        state = {k: value for k, value in checkpoint.state.items() if not k.startswith(HEADS)}
        if "backbone.patch_embed1.proj.weight" in wanted and "patch_embed1.proj.weight" in state:
            state = {f"backbone.{key}": value for key, value in state.items()}  # PVTv2's, bare
        # The head stays as it is.
        state |= {key: value for key, value in wanted.items() if key.startswith(HEADS)}
    load_state(model, replace(checkpoint, state=state))
    model.class_names = class_names
    if checkpoint.classifier is None:  # the paper's start from ImageNet without a normalisation
        model.normalisation = normalisation
    elif not fits:
        log.warning("%s has a decode head of another kind; it is left out", checkpoint.source)
    return fits


def with_classes_of(model: SegmentationModel, checkpoint: Checkpoint) -> StateDict:
    """The state with `model`'s classes: the classifier's rows by name, where there are names."""
    weight = checkpoint.classifier
    assert weight is not None
    state, wanted = checkpoint.state, model.state_dict()
    outputs, count = model.num_classes, len(state[weight])
    names = model.class_names or tuple(str(i) for i in range(outputs))
    rows: list[int | None] = [None] * outputs  # of the file, for each output
    if checkpoint.class_names and model.class_names:
        places = {plain(name): row for row, name in enumerate(checkpoint.class_names)}
        rows = [places.get(plain(name)) for name in names]
    elif count in (outputs, outputs - 1):  # nameless, but as many, with or without "ignore"
        rows[:count] = range(count)
    new_rows = [i for i, row in enumerate(rows) if row is None]
    if set(new_rows) - {outputs - 1}:  # more than "ignore", which is last
        lacking = some([names[i] for i in new_rows])
        log.warning("%s lacks the classes %s; they start anew", checkpoint.source, lacking)
    for key in (weight, weight.replace("weight", "bias")):
        theirs, ours = state.get(key), wanted[key]
        if theirs is not None and theirs.shape[1:] == ours.shape[1:] and len(theirs) == count:
            chosen = [ours[i] if row is None else theirs[row] for i, row in enumerate(rows)]
            state = state | {key: torch.stack(chosen)}
    return state


def plain(name: str) -> str:
    """A class name as it is compared: `Traffic_Light` is `traffic light`."""
    return re.sub(r"[\s_-]+", "", name).lower()


def metadata_of(model: SegmentationModel, **facts: Any) -> dict[str, str]:
    """What goes with a model's weights wherever they are written; `read_checkpoint` reads it."""
    return {
        "model": model.name,
        "normalisation": json.dumps(model.normalisation),
        "class_names": json.dumps(model.class_names),
        "facts": json.dumps(facts),
    }


def pickled(content: Any) -> memoryview:
    """What torch.save writes. By itself it ends in a RuntimeError where the disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def save_model(model: SegmentationModel, path: Path, **facts: Any) -> None:
    """Write the bare network as safetensors, whole or not at all; `facts` go into its header."""
    # One string: safetensors writes several in any order, and equal networks give equal files.
    metadata = {"transkd": json.dumps(metadata_of(model, **facts))}
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(state, metadata))
