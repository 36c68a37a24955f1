"""How other libraries name a network's parameters, and what files say about a network.

One file for each library, with two functions: `matches(state)` recognises its names, and
`read(checkpoint, metadata)` gives the state under our names, which are the published ones, and what
the library's files say about the network's input and classes.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from models.base import Normalisation

StateDict = dict[str, Tensor]
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NO_NORMALISATION = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
FIELDS = {"i": r"\d", "j": r"\d+", "rest": ".+"}
"""What {i}, a stage, {j}, a block, and {rest} stand for in a table of names."""


# Names of the last layer's weight, (classes, D, 1, 1).
CLASSIFIERS = (
    "linear_pred.weight",  # SegFormer and LVT, as published
    "head.conv_seg.weight",  # PVTv2, as published
    "decode_head.conv_seg.weight",  # mmsegmentation
    "head.classifier.weight",  # a network of the reader's own
)


@dataclass(frozen=True)
class Checkpoint:
    """The bare network of a file, under the published names, and what the file says about it."""

    source: str
    state: StateDict
    model: str | None = None  # its name, in our own files
    normalisation: Normalisation | None = None  # of its input
    class_names: tuple[str, ...] | None = None  # one for each output
    facts: dict[str, Any] = field(default_factory=dict)  # method, dataset, height, step, mean_iou

    @property
    def classifier(self) -> str | None:
        """The key of the last layer's weight; None for an encoder alone."""
        return next((key for key in CLASSIFIERS if key in self.state), None)


def rename(
    state: StateDict, table: Iterable[tuple[str, str]], *, to_theirs: bool = False
) -> StateDict:
    """Exchange the names of modules by rules (ours, theirs).

    Stages are counted from 1 in our names and from 0 in theirs. Keys that no rule names stay as
    they are, for loading to refuse them.
    """
    rules = []
    for ours, theirs in table:
        old, new = (ours, theirs) if to_theirs else (theirs, ours)
        pattern = re.escape(old)
        for name, values in FIELDS.items():
            # re.escape has put backslashes before the braces.
            pattern = pattern.replace(rf"\{{{name}\}}", f"(?P<{name}>{values})")
        rules.append((re.compile(pattern), new))

    def renamed(key: str) -> str:
        module, _, leaf = key.rpartition(".")
        for pattern, new in rules:
            if match := pattern.fullmatch(module):
                fields: dict[str, Any] = match.groupdict()
                if "i" in fields:
                    fields["i"] = int(fields["i"]) + (-1 if to_theirs else 1)
                return f"{new.format(**fields)}.{leaf}"
        return key

    return {renamed(key): value for key, value in state.items()}


def normalisation(
    mean: float | Sequence[float], std: float | Sequence[float], scale: float = 1.0
) -> Normalisation | None:
    """Means and deviations of pixels that are multiplied by `scale` before; None if without effect.

    Either may be one number for all channels. Raises ValueError or TypeError if they are none.
    """
    means, stds = (
        tuple(np.broadcast_to(np.asarray(values, float) / scale, 3).tolist())
        for values in (mean, std)
    )
    if min(stds) <= 0 or not all(math.isfinite(value) for value in means + stds):
        raise ValueError("means must be finite, deviations above 0")
    result = Normalisation(means, stds)
    return None if result == NO_NORMALISATION else result


def swap_channels(state: StateDict) -> StateDict:
    """A network for BGR images as one for RGB."""
    key = "patch_embed1.proj.weight"
    return state | {key: state[key].flip(1)} if key in state else state
