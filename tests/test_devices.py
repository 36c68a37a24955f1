"""Nothing stays behind on the CPU: a stand-in for a GPU, which computes no values."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datasets.classes import CITYSCAPES
from models import create_model
from models.distillation.methods import METHODS, Settings
from train.optimisation import AveragedWeights

DEVICE = "meta"


class OneDevice(TorchDispatchMode):
    """Fails where an operation reads or makes a tensor elsewhere; a GPU takes neither kindly."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        elsewhere = [
            x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor) and x.device.type != DEVICE
        ]
        assert not elsewhere, f"{func} with a tensor on {elsewhere[0].device}"
        return result


@pytest.mark.parametrize("method", METHODS)
def test_a_step_stays_on_its_device(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows no such device
    student, teacher = create_model("segformer_b0"), create_model("segformer_b1")
    distiller = METHODS[method](student, teacher, CITYSCAPES.weights, Settings()).to(DEVICE)
    distiller.distil_logits()
    images = torch.rand(2, 3, 64, 64, device=DEVICE)
    labels = torch.zeros(2, 16, 16, dtype=torch.uint8, device=DEVICE)
    averaged = AveragedWeights(student, 0.99)
    with OneDevice():
        torch.stack(list(distiller(images, labels).values())).sum().backward()
        averaged.update(1)
        averaged.network(images)
