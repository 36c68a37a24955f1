"""Promises of a segmentation model that no golden number states."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datasets.classes import CITYSCAPES
from errors import UserError
from models import create_model
from models.distillation import Distiller
from models.distillation.csf import SelectiveKernelFusion
from models.distillation.losses import hierarchical_context_loss
from models.distillation.methods import METHODS, Settings
from models.linear import Linear
from models.pyramid import DropPath, settle, to_tokens

MODEL = create_model("segformer_b0").eval()


@settings(max_examples=25, deadline=None)
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


def test_logits_can_be_left_out() -> None:
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        whole, without = MODEL(images), MODEL(images, logits=False)
    assert without.logits is None
    assert all(torch.equal(a, b) for a, b in zip(whole.features, without.features, strict=True))


def test_a_batch_is_its_images() -> None:
    """In evaluation an image's prediction does not depend on its neighbours."""
    images = torch.rand(3, 3, 64, 96)
    with torch.inference_mode():
        together, apart = (
            MODEL(images).logits,
            torch.cat([MODEL(image[None]).logits for image in images]),
        )
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_the_teacher_is_only_held() -> None:
    """It moves with the distiller, and is neither trained nor saved, nor put into training mode."""
    teacher = create_model("segformer_b1")
    distiller = (
        Distiller(create_model("segformer_b0"), CITYSCAPES.weights, teacher=teacher)
        .double()
        .train()
    )
    assert next(teacher.parameters()).dtype == torch.float64
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert not any(key.startswith("teacher") for key in distiller.state_dict())
    assert sum(p.numel() for p in distiller.parameters()) == 3_719_284


def test_narrow_teacher() -> None:
    with pytest.raises(UserError, match="segformer_b0 is narrower than the student segformer_b2"):
        Distiller(
            create_model("segformer_b2"),
            None,
            teacher=create_model("segformer_b0"),
            fusion=nn.Identity(),
        )


def test_unknown_model() -> None:
    with pytest.raises(UserError, match="segformer_b2"):
        create_model("segformer_b9")


def test_a_batch_without_labels_costs_nothing() -> None:
    """All ignored: the loss is 0, not NaN, and so are the gradients."""
    distiller = Distiller(create_model("segformer_b0"), CITYSCAPES.weights)
    loss = distiller(torch.rand(1, 3, 64, 64), torch.full((1, 16, 16), 19))["ce"]
    loss.backward()
    assert loss.item() == 0
    assert all(torch.isfinite(p.grad).all() for p in distiller.parameters() if p.grad is not None)


def test_mixed_precision_keeps_losses_in_float32() -> None:
    student, teacher = create_model("segformer_b0"), create_model("segformer_b1")
    from models.distillation import CrossSelectiveFusion, PatchEmbeddingAlignment

    channels = student.channels, teacher.channels
    distiller = Distiller(
        student,
        CITYSCAPES.weights,
        teacher=teacher,
        fusion=CrossSelectiveFusion(*channels),
        alignment=PatchEmbeddingAlignment(*channels),
    ).eval()
    images, labels = torch.rand(2, 3, 64, 64), torch.randint(0, 19, (2, 16, 16))
    with torch.no_grad():
        exact = distiller(images, labels)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = distiller(images, labels)
    for name, loss in rounded.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.03), name


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["segformer_b1", "pvt_v2_b1"])
def test_a_frozen_network_is_settled_once(name: str, bf16: bool) -> None:
    """What would be reordered, and rounded by autocast, at every step is so already, and the numbers are the same."""
    network, images = create_model(name).eval().requires_grad_(False), torch.rand(2, 3, 64, 96)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        before = network(images)
        settle(network, bf16=bf16)
        after = network(images)
    assert all(
        torch.equal(a, b) for a, b in zip(tree_leaves(before), tree_leaves(after), strict=True)
    )
    rounded = sum(p.numel() for p in network.parameters() if p.dtype == torch.bfloat16)
    of_blocks = sum(p.numel() for key, p in network.named_parameters() if "block" in key)
    assert rounded > 0.9 * of_blocks if bf16 else rounded == 0
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["transkd_gl", "transkd_ea"])
def test_a_step_is_one_graph(method: str) -> None:
    """As `--compile` and CUDA graphs need it, and its losses and gradients are those of a plain step."""
    torch.manual_seed(0)
    distiller = METHODS[method](
        create_model("segformer_b0"), create_model("segformer_b1"), None, Settings()
    ).train()
    distiller.requires_grad_(False)
    weight = distiller.student.linear_pred.weight.requires_grad_()
    for module in distiller.modules():
        if isinstance(module, nn.Dropout2d | DropPath):
            module.eval()
    settle(distiller.teacher, bf16=False)
    batch = torch.rand(2, 3, 64, 64), torch.randint(0, 19, (2, 16, 16))
    found = []
    for step in (
        distiller,
        torch.compile(distiller, backend="aot_eager", fullgraph=True, dynamic=False),
    ):
        losses = step(*batch)
        (gradient,) = torch.autograd.grad(sum(losses.values()), weight)
        found.append((losses, gradient))
    torch.testing.assert_close(found[1], found[0])


class Copies(TorchDispatchMode):
    """Counts the elements that operations copy into another order."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func in (
            torch.ops.aten.clone.default,
            torch.ops.aten.copy_.default,
            torch.ops.aten._to_copy.default,
        ):
            self.elements += result.numel()
        return result


@pytest.mark.parametrize("name", ["segformer_b0", "pvt_v2_b0"])
def test_tokens_and_maps_are_the_same_memory(name: str) -> None:
    """From the image to the last stage nothing is copied into another order."""
    network, images = (
        create_model(name).eval(),
        torch.rand(2, 3, 64, 128).contiguous(memory_format=torch.channels_last),
    )
    with torch.no_grad(), Copies() as copies:
        features, _ = network.encode(images)
    assert copies.elements == 0
    for feature in features:
        assert to_tokens(feature).data_ptr() == feature.data_ptr()


@pytest.mark.parametrize(("height", "width"), [(32, 64), (16, 16), (6, 12), (5, 9), (2, 4), (4, 7)])
def test_hierarchical_context_loss_as_it_is_written(height: int, width: int) -> None:
    """Both maps pooled by torch, level after level; also where windows overlap, and the gradient."""
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


def test_one_squeeze_for_all_processes() -> None:
    """BatchNorm over all processes gathers from every one, also from one whose last batch is a single image."""
    x = torch.rand(1, 64, 4, 8)
    for convert, squeeze in ((False, "fc1"), (True, "fc")):
        stage = SelectiveKernelFusion(32, 64)
        if convert:
            nn.SyncBatchNorm.convert_sync_batchnorm(stage)
        stage.eval().fuse(x, x).sum().backward()
        used = {name for name in ("fc", "fc1") if getattr(stage, name)[0].weight.grad is not None}
        assert used == {squeeze}


@pytest.mark.parametrize(
    "shape", [(2, 1024, 48), (16, 80, 32), (1, 100, 32), (3, 17, 24), (2, 5, 160, 40)]
)
def test_linear_by_convolution(shape: tuple[int, ...]) -> None:
    """The same product and gradients as F.linear, also of a view with other strides, and where it falls back on it."""
    torch.manual_seed(0)
    layer = Linear(shape[-1], 20)
    x = torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2).requires_grad_()
    upstream = torch.randn(*shape[:-1], 20)
    wanted = (x, layer.weight, layer.bias)
    ours = layer(x)
    theirs = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, wanted, upstream),
        torch.autograd.grad(theirs, wanted, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    convolved = "Convolution" in str(next(iter(ours.grad_fn.next_functions))[0].next_functions)
    assert convolved == (x.numel() >= 20480 and x.numel() // shape[-1] % 16 == 0)
