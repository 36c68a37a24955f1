"""The recipes: presets and flags, each part's numbers by hand, and the modern one as a whole."""

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets import CITYSCAPES, Augmentation
from datasets.transforms import scale_and_crop
from errors import UserError
from models import create_model, load_model
from models.distillation.losses import cross_entropy
from models.distillation.methods import METHODS, LossOptions
from models.layouts import IMAGENET
from tests import runs
from tests.runs import Small
from train import TransKDBase, student
from train.flags import RecipeOptions
from train.optimisation import Plan, new_optimizer
from train.options import RECIPES


def values(**flags: Any) -> dict[str, Any]:
    options = runs.options_of(TransKDBase, Path(), Path(), **flags)
    return {field.name: value for field, value in options.fields()}


def test_a_preset_changes_defaults_and_a_flag_wins() -> None:
    paper, modern = values(), values(recipe="modern")
    assert modern == paper | RECIPES["modern"] | {"recipe": "modern"}
    assert all(paper[name] != value for name, value in RECIPES["modern"].items())
    expected = modern | {"decay": "all"}
    assert values(recipe="modern", decay="all") == values(decay="all", recipe="modern") == expected
    # A student alone has no logits to compare, and the rest of it.
    assert runs.options_of(student, Path(), Path(), recipe="modern").recipe.loss_size == "full"


def test_values_out_of_range() -> None:
    wrong = {"height": 16, "lr": "inf", "drop_path_rate": 1.5, "betas": [0.9, "nan"]}
    for flag, value in wrong.items():
        options = runs.options_of(TransKDBase, Path(), Path(), **{flag: value})
        with pytest.raises(UserError, match=f"^--{flag.replace('_', '-')} is"):
            options.validate()


def rates(recipe: RecipeOptions, images: int, steps_per_epoch: int) -> list[float]:
    plan = Plan(recipe, 2, images, steps_per_epoch)
    return [plan.learning_rate(1 + s // steps_per_epoch, s) for s in range(plan.steps)]


def test_the_step_budget() -> None:
    """7 images: 4 steps an epoch at batch 2, one at batch 8; the rate falls after 4 steps in both.

    5 images in two steps of 4: 9 steps end within the fifth epoch.
    """
    common: dict[str, Any] = {"num_epochs": 3, "lr_decay_epochs": 4, "lr": 1.0}
    kept = RecipeOptions(batch_size=8, keep_steps=True, **common)
    assert rates(kept, 7, 1) == rates(RecipeOptions(**common), 7, 4)
    uneven = Plan(kept, 2, 5, 2)
    assert (uneven.steps, uneven.epochs) == (9, 5)
    assert Plan(kept, 2, 7, 1).total_steps(5, 0, 4) == 12
    # 20 steps are done, 2 of them in this epoch, or 9 of another batch: a whole epoch is left.
    plain = Plan(RecipeOptions(**common), 2, 7, 4)
    assert [plain.total_steps(epoch, 2, 20) for epoch in (2, 3, 4)] == [26, 22, 20]
    assert plain.total_steps(2, 9, 20) == 24


def test_decay_of_matrices_alone() -> None:
    model = create_model("segformer_b0")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    new_optimizer(model, RecipeOptions(decay="matrices", lr=0.1, weight_decay=0.5)).step()
    for name, p in model.named_parameters():
        spared = p.ndim == 1  # norms and biases
        assert spared == ("norm" in name or ".bn." in name or name.endswith("bias")), name
        torch.testing.assert_close(p.detach(), before[name] * (1 if spared else 0.95), msg=name)
    assert len(new_optimizer(model, RecipeOptions()).param_groups) == 1


def test_gradients_are_clipped(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an epsilon that large AdamW's first step is lr·gradient: its norm is the clipped one,
    not that of what the gradient scaler made of it."""
    scaler = partial(torch.amp.GradScaler, init_scale=8.0)  # more overflows at first
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    start = runs.small_teacher()
    more = {"lr": 0.1, "eps": 1.0, "weight_decay": 0, "clip_grad": 0.01, "precision": "fp16"}
    small.train(student, max_steps=1, student_weights=start, **more)
    before, after = load_model(start), load_model(small.folder / "student.safetensors")
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    moved = torch.cat([(q - p).detach().flatten() for p, q in pairs])
    assert moved.norm().item() == pytest.approx(1e-3, rel=0.01)


def test_cross_entropy_at_the_labels_size() -> None:
    """One logit rises from 0 to 4 between two pixels, whose labels are 8 pixels wide."""
    logits = torch.zeros(1, 3, 1, 2)
    logits[0, 1] = torch.tensor([0.0, 4.0])
    logits[0, 2] = -1e9
    labels = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2]], dtype=torch.uint8).expand(1, 4, 8)
    # Half-pixel centres, the borders repeated.
    p1 = torch.tensor([0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4]).sigmoid()
    terms = torch.cat([-(1 - p1[:4]).log(), -3 * p1[4:7].log()])
    found = cross_entropy(logits, labels, torch.tensor([1.0, 3.0, 0.0]))
    torch.testing.assert_close(found, terms.sum() / (4 * 1 + 3 * 3))


def test_logits_beside_other_losses() -> None:
    """`--logits-weight` adds the very loss of the response method, to whatever there is."""
    torch.manual_seed(0)
    network, other = (create_model(f"segformer_b{i}", dropout=0.0).eval() for i in (0, 1))
    images, labels = torch.rand(1, 3, 64, 64), torch.randint(0, 20, (1, 16, 16))
    taught = other(images)
    chosen = LossOptions(logits_weight=3.0, logits_temperature=2.0)
    found = METHODS["skd"].build(network, other.channels, None, chosen)(images, labels, taught)
    own = LossOptions(kd_weight=3.0, kd_temperature=2.0)
    alone = METHODS["response"].build(network, other.channels, None, own)(images, labels, taught)
    assert list(found) == ["ce", "pairwise", "logits"] and found["logits"] > 0
    assert found["logits"].item() == pytest.approx(alone["response"].item(), rel=1e-6)


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("size", [(40, 60), (24, 90)])
def test_scaled_images_and_labels_stay_aligned(scale: float, size: tuple[int, int]) -> None:
    """Both say which row or column a pixel comes from; what has no source is black and ignored."""
    ramps = torch.meshgrid(torch.arange(1, 41), torch.arange(1, 61), indexing="ij")
    for axis, ramp in enumerate(ramps):
        source, place = ramp.to(torch.uint8), (0.2 + 0.3 * axis, 0.7)
        image, label = scale_and_crop(source.expand(3, -1, -1), source, scale, size, place, 0)
        assert image.shape[1:] == label.shape == size
        seen = label > 0
        assert torch.equal(seen, image[0] > 0)
        assert int(seen.sum()) == min(round(40 * scale), size[0]) * min(round(60 * scale), size[1])
        assert (image.int() - label.int())[:, seen].abs().max() <= 1
        line = label.amax(1 - axis)  # source pixels, 1/scale apart
        steps = line[line > 0].float().diff()
        assert steps.mean().item() == pytest.approx(1 / scale, abs=0.12)
        if scale == 1 and size == (40, 60):
            assert torch.equal(image[0], source) and torch.equal(label, source)


def test_new_draws_leave_the_published_ones_alone() -> None:
    drawn = set()
    for i in range(50):
        old, new = (Augmentation(seed=2, scale=s).draw(3, i) for s in ((1.0, 1.0), (0.5, 2.0)))
        assert new[:3] == old[:3] and 0.5 <= new.scale <= 2 == 2 * old.scale
        drawn.add(new[3:])
    assert len(drawn) == 50


def test_modern_recipe_resumes_exactly(small: Small, monkeypatch: Any, capsys: Any) -> None:
    """Interrupted in mid-epoch and at an epoch's end, with batches twice the published size in two
    parts each, in 16 bits."""
    often = partial(torch.amp.GradScaler, init_scale=256.0, growth_interval=2)  # it changes often
    monkeypatch.setattr(torch.amp, "GradScaler", often)
    more = {"recipe": "modern", "normalisation": "imagenet", "schedule": "step", "warmup_steps": 3}
    more |= {"num_epochs": 2, "max_steps": 8, "batch_size": 4, "accumulate": 2, "lr_power": 2}
    more |= {"validate_every": 2, "precision": "fp16", "clip_grad": 1.0}
    small.train(TransKDBase, "whole", **more)
    for step in (4, 6):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            runs.signal_at(patch, step)
            small.train(TransKDBase, "parts", resume="auto", **more)
        assert end.value.code == 128 + signal.SIGTERM
        said = f"interrupted at step {step}; the same command with --resume continues"
        assert said in capsys.readouterr().err
    other = more | {"max_steps": 7}
    small.refused("decay_steps 7 instead of 8", TransKDBase, "parts", resume=True, **other)
    small.train(TransKDBase, "parts", resume="auto", num_workers=1, **more)
    for name in ("student.safetensors", "student_best.safetensors", "last.pt"):
        small.require_equal(f"whole/{name}", f"parts/{name}")
    assert small.losses("parts") == small.losses("whole")
    assert small.records("val", "parts") == small.records("val", "whole")
    whole, parts = (torch.load(small.folder / run / "last.pt") for run in ("whole", "parts"))
    assert whole["scaler"] == parts["scaler"] and whole["scaler"]
    steps = small.records("train", "parts")
    expected = [1 / 3, 49 / 64 * 2 / 3, 36 / 64, 25 / 64, 16 / 64, 9 / 64, 4 / 64, 1 / 64]
    assert [step["lr"] / 6e-5 for step in steps] == pytest.approx(expected)
    # More epochs than two: the steps are kept.
    assert [step["epoch"] for step in steps] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert all(0 < step["losses"]["logits"] < 10 for step in steps)
    network = load_model(small.folder / "parts" / "student.safetensors")
    assert network.normalisation == IMAGENET
    assert network.class_names == CITYSCAPES.output_names
