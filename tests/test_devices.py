"""Nothing stays behind on the CPU: a stand-in for a GPU, which computes no values."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datasets.classes import CITYSCAPES
from datasets.transforms import to_float
from models import create_model
from models.distillation.methods import METHODS, LossOptions
from tests import runs
from train import TransKDBase, engine
from train.checkpoint import State
from train.logger import Logger
from train.setup import start

DEVICE = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Fails where an operation reads or makes a tensor elsewhere; a GPU takes neither kindly."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves((args, kwargs, result)):
            assert not isinstance(tensor, Tensor) or tensor.device == DEVICE, func
        return result


@pytest.mark.parametrize("method", METHODS)
def test_a_step_stays_on_its_device(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no "meta"
    student, teacher = (create_model(name).to(DEVICE) for name in ("segformer_b0", "segformer_b1"))
    options = LossOptions(logits_weight=1.0)
    distiller = METHODS[method].build(student, teacher.channels, None, options).to(DEVICE)
    images = torch.rand(2, 3, 64, 64, device=DEVICE)
    labels = torch.zeros(2, 16, 16, dtype=torch.uint8, device=DEVICE)
    with OneDevice():
        taught = teacher(images)
        torch.stack(list(distiller(images, labels, taught).values())).sum().backward()


def test_a_training_asks_for_nothing(scenes: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Bytes are sent, and no number comes back before losses are logged: where there are none, as
    here, that would be an error."""
    more = {"accumulate": 2, "batch_size": 4, "max_steps": 2, "clip_grad": 1.0}
    run = start(runs.options_of(TransKDBase, scenes, tmp_path, **more))
    run.device = DEVICE
    student, teacher = (create_model(name) for name in ("segformer_b0", "segformer_b1"))
    distiller = METHODS["transkd_base"].build(student, teacher.channels, CITYSCAPES.weights)
    sent, weights = Mock(side_effect=to_float), Mock(side_effect=[torch.ones(20)])
    monkeypatch.setattr(engine, "to_float", sent)
    monkeypatch.setattr(Tensor, "cpu", weights)  # the class weights, which are fetched once
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(engine, "new_optimizer", lambda d, _: torch.optim.SGD(d.parameters()))
    monkeypatch.setattr(engine, "begin", lambda *_: State())
    monkeypatch.setattr(engine, "log_and_check", Mock(side_effect=InterruptedError))
    monkeypatch.setattr(Logger, "log_losses", lambda *_: None)
    monkeypatch.setattr(teacher.head, "forward", None)  # which isn't needed
    with runs.as_a_process(), pytest.raises(InterruptedError):
        engine.train(distiller, run, teacher)
    images = [call.args[0] for call in sent.call_args_list]
    assert [(x.device, x.dtype) for x in images] == [(DEVICE, torch.uint8)] * 4
