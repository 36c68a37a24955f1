"""Every segmentation model by name. A new architecture takes one line here."""

from collections import Counter
from collections.abc import Callable
from functools import partial

from torch import Tensor

from errors import UserError
from models import lvt, pvtv2, segformer
from models.base import SegmentationModel
from models.lvt import LVT
from models.pvtv2 import PVTv2
from models.segformer import SegFormer

BUILDERS: dict[str, Callable[..., SegmentationModel]] = {
    **{name: partial(SegFormer, name) for name in segformer.CONFIGS},
    **{name: partial(PVTv2, name) for name in pvtv2.CONFIGS},
    **{name: partial(LVT, name) for name in lvt.CONFIGS},
}
MODELS = tuple(BUILDERS)
ENCODERS = segformer.CONFIGS | pvtv2.CONFIGS | lvt.CONFIGS


def create_model(
    name: str, num_classes: int = 20, *, drop_path_rate: float = 0.1, dropout: float = 0.1
) -> SegmentationModel:
    """A freshly initialised model; its output has `.logits`, `.features`, `.embeddings`.

    Args:
        num_classes: outputs, "ignore" included.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        dropout: share of channels that are dropped ahead of the classifier.

    Raises UserError if no model has that name.
    """
    if name not in BUILDERS:
        raise UserError(f"no model is called {name!r}; choose one of {', '.join(BUILDERS)}")
    return BUILDERS[name](num_classes, drop_path_rate=drop_path_rate, dropout=dropout)


def recognise(state: dict[str, Tensor]) -> str | None:
    """The name of the model that these keys and shapes are of, or None.

    PVTv2-B5's bare encoder is the very network of MiT-B5 and goes by SegFormer's name.
    """
    # Every block has one such matrix, (hidden, channels): their numbers tell the architecture.
    matrices = Counter(
        tuple(value.shape[:2]) for key, value in state.items() if key.endswith(".mlp.fc1.weight")
    )
    is_mit = not any(key.startswith("backbone.") for key in state)
    for name, config in ENCODERS.items():
        stages = zip(config.channels, config.mlp_ratios, config.depths, strict=True)
        expected = {(c * ratio, c): depth for c, ratio, depth in stages}
        if matrices == expected and (is_mit or name not in segformer.CONFIGS):
            return name
    return None
