"""Promises of networks, losses and distillers that no golden number states."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datasets.classes import CITYSCAPES
from models import SegmentationModel, create_model, load_model, save_model
from models.distillation import Distiller
from models.distillation.csf import SelectiveKernelFusion
from models.segformer import MMSegSegFormer, resize_by_products

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


@pytest.mark.parametrize("size", [(16, 32), (7, 9)])
def test_resizing_by_products_is_resizing(size: tuple[int, int]) -> None:
    """What a GPU trains with, in values and gradients."""
    x = torch.rand(2, 3, 2, 4, dtype=torch.double, requires_grad=True)
    ours, plain = resize_by_products(x, size), F.interpolate(x, size, mode="bilinear")
    torch.testing.assert_close(ours, plain)
    gradient = torch.rand_like(plain)
    gradients = [torch.autograd.grad(result, x, gradient) for result in (ours, plain)]
    torch.testing.assert_close(*gradients)


def test_all_processes_take_the_same_squeeze() -> None:
    """SyncBatchNorm waits for every process, also for one whose last batch is a single image."""
    x = torch.rand(1, 64, 4, 8)
    stage = nn.SyncBatchNorm.convert_sync_batchnorm(SelectiveKernelFusion(32, 64)).eval()
    stage.fuse(x, x).sum().backward()
    assert stage.fc[0].weight.grad is not None and stage.fc1[0].weight.grad is None
