"""Nothing stays behind on the CPU: a stand-in for a GPU, which computes no values."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datasets.classes import CITYSCAPES
from datasets.loading import Batch
from datasets.transforms import to_float
from models import create_model
from models.distillation.methods import METHODS, Settings
from train import engine
from train.distributed import Ranks
from train.engine import Run, State
from train.optimisation import AveragedWeights
from train.tracking import Tracker
from train.TransKDBase import Options

DEVICE = "meta"


class OneDevice(TorchDispatchMode):
    """Fails where an operation reads or makes a tensor elsewhere; a GPU takes neither kindly."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        elsewhere = [
            x
            for x in tree_leaves((args, kwargs, result))
            if isinstance(x, Tensor) and x.device.type != DEVICE
        ]
        assert not elsewhere, f"{func} with a tensor on {elsewhere[0].device}"
        return result


@pytest.mark.parametrize("method", METHODS)
def test_a_step_stays_on_its_device(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch, "autocast", lambda *_, **__: nullcontext()
    )  # it knows no such device
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


def test_a_step_of_training_asks_the_device_for_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bytes are sent, and no number comes back: here, where there are none, that would be an error."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    made_floats_of: list[Tensor] = []
    monkeypatch.setattr(
        engine, "to_float", lambda images: made_floats_of.append(images) or to_float(images)
    )
    student, teacher = create_model("segformer_b0"), create_model("segformer_b1")
    distiller = METHODS["transkd_base"](student, teacher, CITYSCAPES.weights, Settings()).to(DEVICE)
    options, ranks = (
        Options(datadir=Path(), output_dir=tmp_path, tensorboard=False, steps_loss=3),
        Ranks("cpu"),
    )
    tracker = Tracker(options, ranks, 9, 0, torch.device(DEVICE))
    tracker.steps_here = 1  # the first step is shown at once, which takes its losses
    run = SimpleNamespace(
        options=options,
        ranks=ranks,
        state=State(),
        device=torch.device(DEVICE),
        learner=distiller,
        class_weights=torch.tensor(CITYSCAPES.weights),
        optimizer=torch.optim.SGD(distiller.parameters()),
        schedule=SimpleNamespace(set=lambda *_: None, lr=1e-3),
        averaged=AveragedWeights(student, 0.99),
        tracker=tracker,
    )
    images, labels = (
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
        torch.zeros(2, 16, 16, dtype=torch.uint8),
    )
    for _ in range(2):
        Run.step(cast("Run", run), [Batch(images, labels, torch.arange(2))])
    assert run.state.step == 2 and len(tracker.pending) == 2
    assert [(x.device.type, x.dtype) for x in made_floats_of] == [(DEVICE, torch.uint8)] * 2
    with pytest.raises(RuntimeError, match="item"):  # which is what the third step does
        tracker.flush(1, 1e-3)
