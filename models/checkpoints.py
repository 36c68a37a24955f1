"""Weights files: any that is recognised is read once, and its keys get our names.

    checkpoint = read_checkpoint("student.safetensors")  # or a folder, a released .pth, user/name
    model = load_model(checkpoint)

Nothing is ever unpickled but tensors and numbers: `.safetensors`, or `torch.load` with
`weights_only=True`.
"""

import json
import logging
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from errors import UserError
from models import hub
from models.layouts import Checkpoint, StateDict, huggingface, mmsegmentation, normalisation, timm

log = logging.getLogger(__name__)

LAYOUTS = (huggingface, mmsegmentation, timm)
# What the weights of a folder are called.
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "checkpoint.pth")
# Under these names training frameworks nest the weights in their checkpoints.
CONTAINERS = ("averaged", "model", "state_dict", "model_state_dict", "state_dict_ema")
# Prefixes of DataParallel and weight averages, of torch.compile, and of Lightning.
WRAPPERS = ("module.", "_orig_mod.", "model.")
# What a pickle may call beside torch's own: many checkpoints keep their best score as a number of
# numpy, whose versions 1 and 2 have two names for the function that makes one.
make_number = np.float64(0).__reduce__()[0]
NUMPY_NUMBERS: list[Any] = [
    (make_number, "numpy.core.multiarray.scalar"),
    (make_number, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"),
]


def read_checkpoint(source: Path | str) -> Checkpoint:
    """Read a file, a folder of Hugging Face's, or `user/name` of its hub, whatever its layout.

    Raises UserError if it isn't there, is no file of weights, or contradicts itself.
    """
    path = hub.resolve(source)
    content, metadata = read_file(path)
    state = bare_network(state_in(content, path))
    checkpoint = Checkpoint(str(path), state, **read_metadata(metadata, path))
    layout = next((layout for layout in LAYOUTS if layout.matches(state)), None)
    if checkpoint.model is None and layout is not None:
        checkpoint = layout.read(checkpoint, metadata)
    elif checkpoint.model is None and checkpoint.classifier and path.suffix == ".safetensors":
        # One of ours that another program has saved anew.
        log.warning("%s doesn't say what input it wants; none is normalised", path)
    outputs = len(checkpoint.state.get(checkpoint.classifier or "", ()))
    names = checkpoint.class_names
    if outputs and names and len(names) != outputs:
        raise UserError(
            f"{path} names {len(names)} classes and has {outputs} outputs; mend the names "
            "(id2label), or remove them"
        )
    return checkpoint


def find_file(path: Path) -> Path:
    """The file of weights: `path`, or the one in that folder. Raises UserError if there is none."""
    for place in (path, *(path / name for name in FOLDER_FILES)):
        if place.is_file():
            return place
    inside = ", ".join(sorted(file.name for file in path.glob("*.safetensors")))
    hint = f"name a file there ({inside})" if inside else "check the path, or the model zoo"
    raise UserError(f"no weights at {path}; {hint}")


def read_file(path: Path) -> tuple[Any, Mapping[str, Any]]:
    """A file's content, and its metadata: strings, or what lies beside the weights in a pickle."""
    file = find_file(path)
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
                metadata = opened.metadata() or {}
                return state, json.loads(metadata.get("transkd", "null")) or metadata
        with torch.serialization.safe_globals(NUMPY_NUMBERS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong comes as an exception too
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise whatever a damaged file leads them to
        raise UserError(f"{file} can't be read as weights ({reason_of(error)})") from error
    return content, metadata_in(content)


def reason_of(error: Exception) -> str:
    """Why a file can't be read, and what to do about it."""
    if called := re.search(r"\bGLOBAL (\S+)", str(error)):
        return (
            f"reading it would call {called[1]}; if you trust it, load it with the library that "
            "wrote it, and save its state_dict, together with the cfg and dataset_meta of its meta "
            "if it has them, as a dict of the same keys"
        )
    reason = (str(error) or type(error).__name__).splitlines()[0][:120]
    if isinstance(error, pickle.UnpicklingError):  # torch's own text is a page on its flags
        reason = "it is no PyTorch checkpoint"
    if "not valid UTF-8" in reason:  # safetensors reads no file of such a name
        return f"{reason}; rename the file or its folder"
    return f"{reason}; fetch or save it again"


def metadata_in(content: object) -> dict[str, Any]:
    """What a pickled checkpoint says beside its weights.

    That is a dict of strings in ours, and the dict `meta` in mmsegmentation's.
    """
    beside = content if isinstance(content, Mapping) else {}
    exported = getattr(content, "_metadata", {}).get("", {}).get("transkd")
    for ours in (beside.get("metadata"), exported):
        if isinstance(ours, Mapping):
            return {key: value for key, value in ours.items() if isinstance(value, str)}
    meta = beside.get("meta")
    if not isinstance(meta, Mapping):
        return {}
    dataset = meta.get("dataset_meta")  # mmsegmentation 1.x; 0.x has CLASSES
    names = dataset.get("classes") if isinstance(dataset, Mapping) else meta.get("CLASSES")
    metadata = {"config": meta.get("cfg", meta.get("config"))}
    if isinstance(names, list | tuple):
        metadata["class_names"] = json.dumps([str(name) for name in names])
    return metadata


def state_in(content: Any, path: Path) -> StateDict:
    """The state dict in a checkpoint, which may be nested. Raises UserError if there is none."""
    # What is no dict becomes one with an entry that is refused below, by its type's name.
    entries = content if isinstance(content, Mapping) else {type(content).__name__: None}
    for key in CONTAINERS:
        if isinstance(entries.get(key), Mapping):
            return state_in(entries[key], path)
    others = [
        str(key)
        for key, value in entries.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if others or not entries:
        raise UserError(f"{path} is not a state dict: {some(others) or 'it is empty'}")
    return dict(entries)


def bare_network(state: StateDict) -> StateDict:
    """Without wrappers and, of a distilled one, without the modules beside `student.`."""
    state = {key: value for key, value in state.items() if key != "n_averaged"}  # torch's averages
    for wrapper in WRAPPERS * 2:  # a file may have been wrapped twice
        if all(key.startswith(wrapper) for key in state):
            state = {key.removeprefix(wrapper): value for key, value in state.items()}
    prefix = "student."
    student = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
    return student or state


def read_metadata(metadata: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Fields of `Checkpoint`, from strings as `loading.metadata_of` writes them.

    Raises UserError for what is none.
    """

    def value(name: str) -> Any:
        return json.loads(metadata.get(name) or "null")

    try:
        mean_and_std = value("normalisation")
        names = value("class_names")
        return {
            "model": metadata.get("model"),
            "normalisation": normalisation(*mean_and_std) if mean_and_std else None,
            "class_names": tuple(name.strip() for name in names) if names else None,
            "facts": dict(value("facts") or {}),
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has damaged metadata ({error}); save it again") from error


def some(items: Sequence[str], most: int = 8) -> str:
    """The first few items, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
