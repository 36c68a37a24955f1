"""Methods by name: what ablations and baselines compare, by hand; in 16 bits, and compiled."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from datasets.classes import CITYSCAPES
from errors import UserError
from models import SegmentationModel, SegmentationOutput, create_model, save_model
from models.distillation import Distiller
from models.distillation.methods import METHODS, LossOptions
from models.distillation.skd import pairwise_similarity_loss
from models.segformer import CONFIGS
from tests.golden_data import golden_input, golden_labels, seed, without_chance
from tests.runs import Small
from train import TransKDBase, distill
from train.flags import DistillationOptions
from train.networks import load_teacher

EMBEDS = ["embed1", "embed2", "embed3", "embed4"]
TRANSKD = ("transkd_base", "transkd_gl", "transkd_gl_add", "transkd_ea", "gl_ea")
LOSSES = {
    **{name: ["hcl", *EMBEDS] for name in TRANSKD},
    **{"csf": ["hcl"], "reviewkd": ["hcl"], "pea": EMBEDS, "ea": EMBEDS, "skd": ["pairwise"]},
    **{name: [name] for name in ("response", "cwd", "cwd_logits")},
}


@pytest.fixture(scope="module")
def teacher() -> SegmentationModel:
    return seed(create_model("segformer_b1")).eval().requires_grad_(False)


def build(name: str, student: str = "segformer_b0", **losses: Any) -> Distiller:
    channels, network = (64, 128, 320, 512), create_model(student)
    return seed(METHODS[name].build(network, channels, None, LossOptions(**losses)))


PAIRS = [("transkd_ea", "pvt_v2_b0"), ("transkd_ea", "lvt")]
PAIRS += [(name, "segformer_b0") for name in METHODS]


@pytest.mark.parametrize(("name", "student"), PAIRS)
def test_every_method_learns(name: str, student: str, teacher: SegmentationModel) -> None:
    """Its losses, a gradient for every parameter, and the teacher's head only where it counts."""
    distiller = build(name, student).train()
    images = golden_input("A")
    taught = teacher(images, logits=distiller.needs_teacher_logits)
    losses = distiller(images, golden_labels(), taught)
    assert list(losses) == ["ce", *LOSSES[name]]
    assert distiller.needs_teacher_logits == (name in ("response", "cwd_logits"))
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
    sum(losses[term] for term in LOSSES[name]).backward()
    for key, parameter in distiller.named_parameters():
        # CSF has a squeeze of its own for a batch of one.
        assert parameter.grad is not None or key.startswith("student.") or "fc1.0" in key, key
    first = next(distiller.student.encoder.parameters())
    assert first.grad is not None and first.grad.abs().max() > 0


def test_weight_and_temperature_of_a_baseline() -> None:
    cwd = build("cwd", kd_weight=2.0, kd_temperature=3.0)
    assert (cwd.weight, cwd.temperature) == (2.0, 3.0)


def test_response_is_hintons_loss_over_the_classes_that_count() -> None:
    loss = build("response", kd_weight=2.0, kd_temperature=3.0).logits_loss
    s, t = (SegmentationOutput(torch.randn(2, 20, 3, 5), (), ()) for _ in range(2))
    q, p = (
        out.logits[:, :19].permute(0, 2, 3, 1).reshape(-1, 19).div(3).softmax(1) for out in (s, t)
    )
    expected = 2 * 3**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(loss(s, t), expected)
    s.logits[:, 19], t.logits[:, 19] = 50, -50  # "ignore"
    torch.testing.assert_close(loss(s, t), expected)


def test_pairwise_similarities() -> None:
    """Of the maxima of 2×2 windows: two rows of them, and three columns, of which the last is one
    pixel wide."""
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 5, 4, 5)
    expected = 0.0
    for b in range(2):
        windows = [
            [x[b, :, i : i + 2, j : j + 2].amax((1, 2)) for i in (0, 2) for j in (0, 2, 4)]
            for x in (s, t)
        ]
        for i in range(6):
            for j in range(6):
                a_s, a_t = (F.cosine_similarity(x[i], x[j], dim=0) for x in windows)
                expected += (a_s - a_t) ** 2 / (2 * 6 * 6)
    torch.testing.assert_close(pairwise_similarity_loss(s, t), expected)
    assert pairwise_similarity_loss(t, 3 * t) < 1e-12
    assert pairwise_similarity_loss(s[:, :, :1, :1], t[:, :, :1, :1]) < 1e-12  # a single place


@pytest.mark.parametrize("name", ["transkd_ea", "response", "cwd", "skd"])
def test_mixed_precision_keeps_losses_in_float32(name: str, teacher: SegmentationModel) -> None:
    distiller = build(name, logits_weight=1.0).eval()
    images = golden_input("A")
    found = []
    for mixed in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            found.append(distiller(images, golden_labels(), teacher(images)))
    exact, rounded = found
    for term, loss in rounded.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[term].item(), rel=0.05), term


@pytest.mark.slow
def test_a_step_is_one_graph(teacher: SegmentationModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `--compile` and CUDA graphs need it, with the losses and gradients of a plain step."""
    encoder = CONFIGS["segformer_b0"]
    shallow = replace(encoder, depths=(1, 0, 0, 1))  # every block takes seconds
    monkeypatch.setitem(CONFIGS, "segformer_b0", shallow)
    distiller = without_chance(build("transkd_ea", logits_weight=1.0).train().requires_grad_(False))
    weight = distiller.student.head.classifier.weight.requires_grad_()
    compiled = torch.compile(distiller, backend="aot_eager", fullgraph=True, dynamic=False)
    images = golden_input("A")
    found = []
    for step in (distiller, compiled):
        losses = step(images, golden_labels(), teacher(images))
        (gradient,) = torch.autograd.grad(sum(losses.values()), weight)
        found.append((losses, gradient))
    torch.testing.assert_close(found[1], found[0])


def test_a_teacher_of_other_classes(small: Small) -> None:
    """It is refused where its logits are compared; one without an output for "ignore" is not."""
    path = small.folder / "teacher.safetensors"
    more = {"method": "response", "teacher_weights": path, "max_steps": 1}
    save_model(create_model("segformer_b0", 40), path)
    small.refused("predicts 40 classes, and Cityscapes has 19 and ignore", distill, **more)
    save_model(create_model("segformer_b0", 19), path)
    small.train(distill, "run", **more)


def test_a_teachers_classes_are_put_in_order(tmp_path: Path) -> None:
    """By their names, also for methods that don't look at them."""
    network = create_model("segformer_b0").eval()
    network.class_names = (*reversed(CITYSCAPES.names), "void")
    save_model(network, tmp_path / "t.safetensors")
    options = DistillationOptions(teacher_weights=tmp_path / "t.safetensors")
    found = load_teacher(options, "cityscapes", CITYSCAPES)
    expected = network(golden_input("A")).logits[:, [*reversed(range(19)), 19]]
    torch.testing.assert_close(found(golden_input("A")).logits, expected)
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    options.teacher_model = "segformer_b2"
    with pytest.raises(UserError, match="holds a segformer_b0, not a segformer_b2"):
        load_teacher(options, "cityscapes", CITYSCAPES)


def test_a_name_trains_as_the_methods_own_script(small: Small) -> None:
    """And two methods start from the same student."""
    small.train(TransKDBase, "script", max_steps=2)
    small.train(distill, "name", max_steps=2, method="transkd_base")
    small.require_equal("script/student.safetensors", "name/student.safetensors")
    small.train(distill, "alone", method="student", max_steps=1, teacher_weights=None)
    assert list(small.losses("alone")[0]) == ["ce", "total"]
    assert small.losses("alone")[0]["ce"] == small.losses("script")[0]["ce"]
