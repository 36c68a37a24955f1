"""Every segmentation model by name. A new architecture takes one line here."""

from collections.abc import Callable
from functools import partial

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


def create_model(
    name: str, num_classes: int = 20, *, drop_path_rate: float = 0.1, dropout: float = 0.1
) -> SegmentationModel:
    """A freshly initialised model; its output has `.logits`, `.features`, `.embeddings`.

    Args:
        num_classes: outputs, "ignore" included.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
        dropout: of whole channels ahead of the classifier.

    Raises:
        UserError: no model has that name.
    """
    if name not in BUILDERS:
        raise UserError(f"no model is called {name!r}; choose one of {', '.join(MODELS)}")
    model = BUILDERS[name](num_classes, drop_path_rate=drop_path_rate, dropout=dropout)
    model.name, model.num_classes = name, num_classes
    return model
