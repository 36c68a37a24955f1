"""Promises of networks, losses and distillers that no golden number states."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from datasets.classes import CITYSCAPES
from models import SegmentationModel, create_model
from models.distillation import Distiller
from models.distillation.csf import SelectiveKernelFusion
from models.distillation.losses import hierarchical_context_loss
from models.distillation.methods import METHODS, LossOptions
from models.linear import Linear
from models.pyramid import DropPath, to_tokens
from models.segformer import CONFIGS, MMSegSegFormer
from tests.golden_data import seed

MODEL = create_model("segformer_b0").eval()
IMAGES = torch.rand((3, 3, 64, 96), generator=torch.Generator().manual_seed(0))


@settings(max_examples=15, deadline=None)
@given(st.integers(32, 130), st.integers(32, 130))
def test_any_image_size(height: int, width: int) -> None:
    with torch.inference_mode():
        out = MODEL(torch.rand(1, 3, height, width))
    assert out.logits.shape == (1, 20, -(-height // 4), -(-width // 4))
    for i, (feature, embedding) in enumerate(zip(out.features, out.embeddings, strict=True)):
        stride = 4 * 2**i
        h, w = -(-height // stride), -(-width // stride)
        assert feature.shape == (1, MODEL.channels[i], h, w)
        assert embedding.shape == (1, h * w, MODEL.channels[i])


OF_FOUR_CLASSES = [create_model(name, 4) for name in ("segformer_b0", "pvt_v2_b0", "lvt")]
OF_FOUR_CLASSES.append(MMSegSegFormer("segformer_b0", 4, 256))


@pytest.mark.parametrize("model", OF_FOUR_CLASSES, ids=lambda model: type(model).__name__)
def test_classes_can_be_reordered(model: SegmentationModel) -> None:
    """And an image's prediction does not depend on the others of its batch."""
    model.eval().class_names = ("a", "b", "c", "d")
    with torch.no_grad():
        before = torch.cat([model(image[None]).logits for image in IMAGES])
        model.reorder([2, 0, 1, 3])
        after = model(IMAGES).logits
    torch.testing.assert_close(after, before[:, [2, 0, 1, 3]], atol=1e-4, rtol=1e-5)
    assert model.class_names == ("c", "a", "b", "d")


@pytest.mark.parametrize("training", [False, True])
def test_the_fast_decode_head_is_the_plain_one(training: bool) -> None:
    """Also in training, where BatchNorm takes the batch's own statistics, and its gradients."""
    model = seed(create_model("segformer_b0", dropout=0.0)).double().train(training)
    sizes = zip(model.channels, (9, 5, 3, 2), strict=True)
    features = [torch.rand(2, c, side, side + 1).double() for c, side in sizes]
    upstream = torch.rand(2, 20, 9, 10).double()
    found = []
    for head in (model.head, model.head.plain):
        logits = head(tuple(features))
        found.append((logits, *torch.autograd.grad(logits, model.head.parameters(), upstream)))
    torch.testing.assert_close(*found)


def test_a_batch_without_labels_costs_nothing() -> None:
    """All ignored: the loss is 0, not NaN, and so are the gradients."""
    distiller = Distiller(create_model("segformer_b0"), CITYSCAPES.weights)
    loss = distiller(torch.rand(1, 3, 64, 64), torch.full((1, 16, 16), 19))["ce"]
    loss.backward()
    assert loss.item() == 0
    assert all(torch.isfinite(p.grad).all() for p in distiller.parameters() if p.grad is not None)


def distil(method: str, **losses: Any) -> tuple[Distiller, SegmentationModel]:
    """The distiller of a B0 and its teacher, a B1."""
    torch.manual_seed(0)
    teacher = create_model("segformer_b1").eval().requires_grad_(False)
    student = create_model("segformer_b0")
    options = LossOptions(**losses)
    return METHODS[method].build(student, teacher.channels, None, options), teacher


@pytest.mark.parametrize("method", ["transkd_ea", "response", "cwd", "skd"])
def test_mixed_precision_keeps_losses_in_float32(method: str) -> None:
    distiller, teacher = distil(method, logits_weight=1.0)
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
        losses = step(IMAGES, labels, teacher(IMAGES, logits=False))
        (gradient,) = torch.autograd.grad(sum(losses.values()), weight)
        found.append((losses, gradient))
    torch.testing.assert_close(found[1], found[0])


class Copies(TorchDispatchMode):
    """Counts the elements that operations copy into another order."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        aten = torch.ops.aten
        if func in (aten.clone.default, aten.copy_.default, aten._to_copy.default):
            self.elements += result.numel()
        return result


@pytest.mark.parametrize("name", ["segformer_b0", "pvt_v2_b0"])
def test_tokens_and_maps_are_the_same_memory(name: str) -> None:
    """From the image to the last stage nothing is copied into another order."""
    model = create_model(name).eval()
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), Copies() as copies:
        features, _ = model.encoder(images)
    assert copies.elements == 0
    for feature in features:
        assert to_tokens(feature).data_ptr() == feature.data_ptr()


@pytest.mark.parametrize(("height", "width"), [(32, 64), (16, 16), (6, 12), (5, 9), (2, 4), (4, 7)])
def test_hierarchical_context_loss_as_it_is_written(height: int, width: int) -> None:
    """Both maps pooled by torch, level after level; also where windows overlap."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 8, height, width, dtype=torch.float64).unbind()
    student.requires_grad_()
    expected, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
    for level in (4, 2, 1):
        if level < height:
            weight /= 2
            weights += weight
            pooled = (F.adaptive_avg_pool2d(x, level) for x in (student, teacher))
            expected = expected + weight * F.mse_loss(*pooled)
    found = hierarchical_context_loss([student], [teacher])
    torch.testing.assert_close(found, expected / weights)
    gradients = (torch.autograd.grad(loss, student)[0] for loss in (found, expected / weights))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("synced", "squeeze"), [(False, "fc1"), (True, "fc")])
def test_all_processes_take_the_same_squeeze(synced: bool, squeeze: str) -> None:
    """SyncBatchNorm waits for every process, also for one whose last batch is a single image."""
    x = torch.rand(1, 64, 4, 8)
    stage = SelectiveKernelFusion(32, 64)
    if synced:
        nn.SyncBatchNorm.convert_sync_batchnorm(stage)
    stage.eval().fuse(x, x).sum().backward()
    used = {name for name in ("fc", "fc1") if getattr(stage, name)[0].weight.grad is not None}
    assert used == {squeeze}


@pytest.mark.parametrize(
    "shape", [(2, 1024, 48), (16, 80, 32), (1, 100, 32), (3, 17, 24), (2, 5, 160, 40)]
)
def test_linear_by_convolution(shape: tuple[int, ...]) -> None:
    """F.linear's product and gradients, also of other strides, and where it falls back on it."""
    torch.manual_seed(0)
    layer = Linear(shape[-1], 20)
    x = torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2).requires_grad_()
    upstream = torch.randn(*shape[:-1], 20)
    ours, theirs = layer(x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(ours, theirs)

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (x, layer.weight, layer.bias), upstream)

    convolved = "Convolution" in str(next(iter(ours.grad_fn.next_functions))[0].next_functions)
    assert convolved == (x.numel() >= 20480 and x.numel() // shape[-1] % 16 == 0)
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-4, atol=1e-4)
