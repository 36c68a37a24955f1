"""Promises of networks, losses and distillers that no golden number states."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from datasets.classes import CITYSCAPES
from models import SegmentationModel, create_model, load_model, save_model
from models.distillation import Distiller
from models.distillation.csf import SelectiveKernelFusion
from models.distillation.methods import METHODS, LossOptions
from models.linear import Linear
from models.pyramid import DropPath
from models.segformer import CONFIGS, MMSegSegFormer

IMAGES = torch.rand((3, 3, 64, 96), generator=torch.Generator().manual_seed(0))
OF_FOUR_CLASSES = [create_model(name, 4) for name in ("segformer_b0", "pvt_v2_b0", "lvt")]
OF_FOUR_CLASSES.append(MMSegSegFormer("segformer_b0", 4, 256))


@pytest.mark.parametrize("model", OF_FOUR_CLASSES, ids=lambda model: type(model).__name__)
def test_classes_can_be_reordered_and_saved(model: SegmentationModel, tmp_path: Path) -> None:
    """And an image's prediction does not depend on the others of its batch."""
    model.eval().class_names = ("a", "b", "c", "d")
    with torch.no_grad():
        before = torch.cat([model(image[None]).logits for image in IMAGES])
        model.reorder([2, 0, 1, 3])
        save_model(model, tmp_path / "w.safetensors")
        read = load_model(tmp_path / "w.safetensors")
        after = read(IMAGES).logits
    torch.testing.assert_close(after, before[:, [2, 0, 1, 3]], atol=1e-4, rtol=1e-5)
    assert (read.name, read.class_names) == (model.name, ("c", "a", "b", "d"))


def test_a_batch_without_labels_costs_nothing() -> None:
    """All ignored: the loss is 0, not NaN, and so are the gradients."""
    distiller = Distiller(create_model("segformer_b0"), CITYSCAPES.weights)
    loss = distiller(torch.rand(1, 3, 64, 64), torch.full((1, 16, 16), 19))["ce"]
    loss.backward()
    assert loss.item() == 0
    assert all(torch.isfinite(p.grad).all() for p in distiller.parameters() if p.grad is not None)


def distil(method: str) -> tuple[Distiller, SegmentationModel]:
    """The distiller of a B0 and its teacher, a B1."""
    torch.manual_seed(0)
    teacher = create_model("segformer_b1").eval().requires_grad_(False)
    student = create_model("segformer_b0")
    options = LossOptions(logits_weight=1.0)
    return METHODS[method].build(student, teacher.channels, None, options), teacher


@pytest.mark.parametrize("method", ["transkd_ea", "response", "cwd", "skd"])
def test_mixed_precision_keeps_losses_in_float32(method: str) -> None:
    distiller, teacher = distil(method)
    distiller.eval()
    labels = torch.randint(0, 19, (3, 16, 24))
    found = []
    for mixed in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            found.append(distiller(IMAGES, labels, teacher(IMAGES)))
    exact, rounded = found
    for name, loss in rounded.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.05), name


@pytest.mark.slow
def test_a_step_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `--compile` and CUDA graphs need it, with the losses and gradients of a plain step."""
    encoder, width = CONFIGS["segformer_b0"]
    shallow = replace(encoder, depths=(1, 0, 0, 1))  # every block takes seconds
    monkeypatch.setitem(CONFIGS, "segformer_b0", (shallow, width))
    distiller, teacher = distil("transkd_ea")
    distiller.train().requires_grad_(False)
    weight = distiller.student.head.classifier.weight.requires_grad_()
    for module in distiller.modules():
        if isinstance(module, nn.Dropout2d | DropPath):
            module.eval()
    labels = torch.randint(0, 19, (3, 16, 24))
    compiled = torch.compile(distiller, backend="aot_eager", fullgraph=True, dynamic=False)
    found = []
    for step in (distiller, compiled):
        losses = step(IMAGES, labels, teacher(IMAGES))
        (gradient,) = torch.autograd.grad(sum(losses.values()), weight)
        found.append((losses, gradient))
    torch.testing.assert_close(found[1], found[0])


class NoCopies(TorchDispatchMode):
    """Fails where an operation copies elements into another order."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        assert func not in (aten.clone.default, aten.copy_.default, aten._to_copy.default)
        return func(*args, **kwargs or {})


def test_tokens_and_maps_are_the_same_memory() -> None:
    model = create_model("segformer_b0").eval()
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), NoCopies():
        model.encoder(images)


def test_all_processes_take_the_same_squeeze() -> None:
    """SyncBatchNorm waits for every process, also for one whose last batch is a single image."""
    x = torch.rand(1, 64, 4, 8)
    stage = nn.SyncBatchNorm.convert_sync_batchnorm(SelectiveKernelFusion(32, 64)).eval()
    stage.fuse(x, x).sum().backward()
    assert stage.fc[0].weight.grad is not None and stage.fc1[0].weight.grad is None


def test_linear_is_a_convolution_where_that_is_faster() -> None:
    for tokens, convolved in ((1024, True), (100, False)):
        out = Linear(48, 20)(torch.ones(2, tokens, 48))
        functions = out.grad_fn.next_functions[0][0].next_functions
        assert ("Convolution" in str(functions)) == convolved
