"""The recipes: each part's numbers by hand, presets and flags, and the modern recipe through the command line."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import cli
from datasets import CITYSCAPES, Augmentation, open_split, training_batches
from datasets.transforms import Draw, change_colours, zoom
from errors import UserError
from models import create_model, load_model
from models.base import SegmentationOutput
from models.checkpoints import IMAGENET
from models.distillation import Distiller
from models.distillation.losses import cross_entropy
from models.distillation.methods import METHODS, Settings
from tests.conftest import ROOT, Command
from tests.test_training import SMALL, assert_equal, records
from train import distill, student, teacher
from train.optimisation import AveragedWeights, Plan, Schedule, new_optimizer
from train.recipes import RECIPES
from train.TransKDBase import Options


def paper(**changes) -> Options:
    return Options(datadir=Path(), **changes)


# --- presets


def parse(options: type, monkeypatch: pytest.MonkeyPatch, *arguments: object):
    monkeypatch.setattr(sys, "argv", ["script", "--datadir", ".", *map(str, arguments)])
    return cli.parse(options, sys.argv[1:])


def test_a_preset_changes_defaults_and_a_flag_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        parse(Options, monkeypatch) == parse(Options, monkeypatch, "--recipe", "paper") == paper()
    )
    modern = RECIPES["modern"]
    assert parse(Options, monkeypatch, "--recipe=modern") == paper(**Options.preset("modern"))
    for flags in (
        ("--recipe", "modern", "--decay", "all"),
        ("--decay", "all", "--recipe", "modern"),
    ):
        found = parse(Options, monkeypatch, *flags)
        assert found.decay == "all" and found.recipe == "modern"
        assert all(
            getattr(found, name) == value for name, value in modern.items() if name != "decay"
        )
    assert all(
        getattr(paper(), name) != value for name, value in modern.items()
    )  # nothing superfluous
    assert (
        parse(student.Options, monkeypatch, "--recipe", "modern").loss_size == "full"
    )  # which has no logits
    for method, weight in (("student", 0), ("response", 0), ("cwd_logits", 0), ("csf", 1)):
        flags = ("--method", method, "--recipe", "modern")
        assert parse(distill.Options, monkeypatch, *flags).logits_weight == weight
    assert (
        parse(
            distill.Options, monkeypatch, "--method=cwd_logits", *flags[2:], "--logits-weight", 5
        ).logits_weight
        == 5
    )
    for given in (
        ["--validate-teacher"],
        ["--teacher-weights", "t.pth"],
        ["--teacher-model", "lvt"],
    ):
        with pytest.raises(UserError, match=f"{given[0]}: --method student"):
            parse(distill.Options, monkeypatch, "--method", "student", *given)
    with pytest.raises(UserError, match="--from-scratch starts from no weights"):
        parse(teacher.Options, monkeypatch, "--from-scratch", "--teacher-weights", "mit_b2.pth")
    for method in ("student", "response"):
        with pytest.raises(UserError, match=r"--logits-weight is 5.0"):
            parse(
                distill.Options, monkeypatch, "--method", method, *flags[2:], "--logits-weight", 5
            )


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": (2.0, 1.0)},
        {"scale": (0.0, 1.0)},
        {"crop": (32, 64)},
        {"jitter": 1.0},
        {"ema": 1.0},
        {"warmup_steps": -1},
        {"logits_weight": -1.0},
        {"logits_temperature": 0.0},
        {"embed_weights": (0.1, 0.1, -0.5, 1.0)},
        {"review_kd_loss_weight": -1.0},
        {"lambda_cwd": -1.0},
        *(
            {name: math.inf}
            for name in ("lr", "weight_decay", "eps", "temperature", "logits_weight", "save_every")
        ),
        *(
            {name: math.nan}
            for name in ("weight_decay", "jitter", "lr_power", "logits_temperature")
        ),
        {"scale": (1.0, math.inf)},
        {"betas": (0.9, math.nan)},
        {"published_shift": True, "loss_size": "full"},
        {"published_shift": True, "crop": (64, 64)},
    ],
)
def test_mistakes(wrong: dict) -> None:
    with pytest.raises(UserError, match="--" + next(iter(wrong)).replace("_", "-")):
        paper(**wrong)


# --- optimisation


def rates(options: Options, plan: Plan) -> list[float]:
    optimizer = new_optimizer(nn.Linear(2, 2), options)
    schedule, found = Schedule(optimizer, options, plan), []
    for step in range(plan.steps):
        schedule.set(1 + step // plan.steps_per_epoch, step)
        found.append(schedule.lr)
        assert all(group["lr"] == schedule.lr for group in optimizer.param_groups)
    return found


def test_schedule_by_step() -> None:
    options = paper(schedule="step", warmup_steps=3, num_epochs=2, lr=1.0, decay="matrices")
    plan = Plan.of(options, images=10, steps_per_epoch=5)
    assert rates(options, plan) == pytest.approx(
        [1 / 3, 0.9 * 2 / 3, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    )
    options = paper(schedule="step", num_epochs=2, lr=1.0, lr_power=2.0, max_steps=4)
    assert rates(options, Plan.of(options, 10, 5)) == pytest.approx([1, 9 / 16, 4 / 16, 1 / 16])


def test_warm_up_of_the_published_schedule() -> None:
    options = paper(warmup_steps=4, num_epochs=2, lr_decay_epochs=10, lr=1.0)
    assert rates(options, Plan.of(options, 6, 3)) == pytest.approx(
        [0.9 / 4, 0.9 / 2, 0.9 * 3 / 4, 0.8, 0.8, 0.8]
    )


def test_the_step_budget_is_kept() -> None:
    """7 images: 4 steps an epoch at batch 2, one at batch 8. The rate falls after 4 steps in both."""
    recipe = paper(num_epochs=3, lr_decay_epochs=4, lr=1.0)
    kept = paper(num_epochs=3, lr_decay_epochs=4, lr=1.0, batch_size=8, keep_steps=True)
    plan = Plan.of(kept, images=7, steps_per_epoch=1)
    assert (plan.steps, plan.epochs) == (12, 12)
    assert rates(kept, plan) == rates(recipe, Plan.of(recipe, 7, 4))
    assert Plan.of(paper(num_epochs=3, batch_size=8), 7, 1).steps == 3
    uneven = Plan.of(
        paper(num_epochs=3, batch_size=4, keep_steps=True), images=5, steps_per_epoch=2
    )
    assert (uneven.steps, uneven.epochs) == (9, 5)  # ends within the fifth
    assert (
        plan.total_steps(epoch=5, batch=0, step=4)
        == 12
        == plan.total_steps(epoch=40, batch=0, step=7)
    )
    plain = Plan.of(paper(num_epochs=3), 7, 4)
    assert [plain.total_steps(epoch, batch=2, step=20) for epoch in (2, 3, 4)] == [26, 22, 20]
    assert (
        plain.total_steps(epoch=2, batch=9, step=20) == 24
    )  # a whole epoch is left, of the other batch
    assert teacher.Options(datadir=Path()).recipe_batch_size == 8  # each script's own


def test_decay_of_matrices_alone() -> None:
    model = create_model("segformer_b0")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    new_optimizer(model, paper(decay="matrices", lr=0.1, weight_decay=0.5)).step()
    for name, p in model.named_parameters():
        small = "norm" in name or ".bn." in name or name.endswith("bias")
        torch.testing.assert_close(p.detach(), before[name] * (1 if small else 0.95), msg=name)
    assert len(new_optimizer(model, paper()).param_groups) == 1


def test_averaged_weights() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    averaged = AveragedWeights(network, decay=0.3)
    expected = {key: value.clone() for key, value in network.state_dict().items()}
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (3, 0.3), (4, 0.3)):  # 4/13 is above 0.3
        network(torch.randn(5, 3)).square().sum().backward()
        with torch.no_grad():
            for p in network.parameters():
                p -= 0.1 * p.grad
        averaged.update(step)
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                expected[key] = decay * expected[key] + (1 - decay) * value
            else:
                expected[key] = value.clone()
    assert expected["1.num_batches_tracked"] == 4
    torch.testing.assert_close(dict(averaged.network.state_dict()), expected)
    assert not averaged.network.training and not any(
        p.requires_grad for p in averaged.network.parameters()
    )


# --- losses


def test_cross_entropy_at_the_labels_size() -> None:
    """Two classes; one logit rises from 0 to 4 between two pixels, whose labels are 8 pixels wide."""
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 1] = torch.tensor([0.0, 4.0])
    upsampled = torch.tensor(
        [0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4]
    )  # half-pixel centres, the borders repeated
    labels = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2]], dtype=torch.uint8).expand(1, 4, 8)
    logits = torch.cat([logits, torch.full((1, 1, 1, 2), -1e9)], 1)
    p1 = upsampled.sigmoid()
    terms = torch.cat([-(1 - p1[:4]).log(), -3 * p1[4:7].log()])
    expected = terms.sum() / (4 * 1 + 3 * 3)
    found = cross_entropy(logits, labels, torch.tensor([1.0, 3.0, 0.0]))
    torch.testing.assert_close(found, expected)


def test_logits_beside_other_losses() -> None:
    """The very loss of the response method, added to whatever there is; refused between other classes."""
    torch.manual_seed(0)
    networks = [
        create_model(name, drop_path_rate=0.0, dropout=0.0)
        for name in ("segformer_b0", "segformer_b1")
    ]
    images, labels = torch.rand(1, 3, 64, 64), torch.randint(0, 20, (1, 16, 16))
    distiller = Distiller(networks[0], None, teacher=networks[1])
    assert list(distiller(images, labels)) == ["ce"]
    distiller.distil_logits(3.0, 2.0)
    own = Settings(baseline={"weight": 3.0, "temperature": 2.0})
    response = METHODS["response"](networks[0], networks[1], None, own)
    found = distiller(images, labels)
    assert list(found) == ["ce", "logits"] and found["logits"] > 0
    assert found["logits"].item() == pytest.approx(
        response(images, labels)["response"].item(), rel=1e-6
    )
    with pytest.raises(UserError, match="same classes"):
        Distiller(networks[0], None, teacher=create_model("segformer_b1", 150)).distil_logits(1.0)
    with pytest.raises(UserError, match="no teacher"):
        Distiller(networks[0], None).distil_logits(1.0)


def test_input_normalisation(tmp_path: Path) -> None:
    encoder = create_model("segformer_b0")
    state = encoder.state_dict()
    torch.save(state, tmp_path / "whole.pth")
    torch.save(
        {k: v for k, v in state.items() if not k.startswith("linear_")}, tmp_path / "encoder.pth"
    )

    def start(choice: str, path: Path | None) -> object:
        return paper(normalisation=choice, student_weights=path).student(CITYSCAPES).normalisation

    assert start("none", tmp_path / "encoder.pth") is None is start("auto", None)
    assert start("auto", tmp_path / "whole.pth") is None  # as it was trained
    assert start("auto", tmp_path / "encoder.pth") == IMAGENET == start("imagenet", None)


# --- data


def test_a_crop_is_a_slice_of_image_and_label() -> None:
    image = (
        torch.arange(3 * 12 * 20, dtype=torch.int32)
        .remainder(251)
        .to(torch.uint8)
        .reshape(3, 12, 20)
    )
    label = torch.arange(240).remainder(19).to(torch.uint8).reshape(12, 20)
    for place, top, left in (((0.0, 0.0), 0, 0), ((0.5, 0.99), 2, 12), ((0.99, 0.3), 4, 3)):
        part, its_label = zoom(image, label, 1.0, (8, 8), place, 19)
        assert torch.equal(part, image[:, top : top + 8, left : left + 8])
        assert torch.equal(its_label, label[top : top + 8, left : left + 8])
    inside, its_label = zoom(
        image, label, 1.0, (16, 20), (0.5, 0.0), 19
    )  # a window higher than the image
    assert (
        torch.equal(inside[:, 2:14], image) and not inside[:, :2].any() and not inside[:, 14:].any()
    )
    assert (
        torch.equal(its_label[2:14], label)
        and (its_label[:2] == 19).all()
        and (its_label[14:] == 19).all()
    )


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("size", [(40, 60), (24, 90)])
def test_scaled_images_and_labels_stay_aligned(scale: float, size: tuple[int, int]) -> None:
    """Image and label say which column and row a pixel comes from; what has no source is black and ignored."""
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(60), indexing="ij")
    for places, ramp in enumerate((rows, columns)):
        ramp = (ramp + 1).to(torch.uint8)
        place = (0.2 + 0.3 * places, 0.7)
        image, label = zoom(ramp.expand(3, -1, -1), ramp, scale, size, place, 0)
        assert image.shape[1:] == label.shape == size
        seen = label > 0
        assert torch.equal(seen, image[0] > 0)
        assert int(seen.sum()) == min(round(40 * scale), size[0]) * min(round(60 * scale), size[1])
        assert (image.int() - label.int())[:, seen].abs().max() <= 1
        line = label.amax(1 - places)  # consecutive source pixels, 1/scale apart
        steps = line[line > 0].float().diff()
        assert steps.mean().item() == pytest.approx(1 / scale, abs=0.12)


def test_colours() -> None:
    pixels = [[10, 20, 30], [100, 100, 100], [250, 0, 0], [0, 200, 50]]
    image = torch.tensor(pixels, dtype=torch.uint8).T.reshape(3, 2, 2)
    assert torch.equal(change_colours(image, 1, 1, 1), image)
    assert change_colours(image, 1.5, 1, 1)[:, 0, 0].tolist() == [15, 30, 45]
    assert change_colours(image, 1.5, 1, 1)[:, 1, 0].tolist() == [255, 0, 0]  # 375 is too bright
    grey = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in pixels]
    mean = sum(grey) / 4
    assert change_colours(image, 1, 0, 1).unique().tolist() == [round(mean)]
    assert change_colours(image, 1, 1, 0)[:, 1, 1].tolist() == [round(grey[3])] * 3
    by_hand = [1.2 * (1.1 * 0.9 * x + (1 - 1.1) * 0.9 * mean) for x in pixels[3]]
    by_hand = [x + (1 - 1.2) * (1.1 * 0.9 * grey[3] + (1 - 1.1) * 0.9 * mean) for x in by_hand]
    assert change_colours(image, 0.9, 1.1, 1.2)[:, 1, 1].tolist() == [
        min(max(round(x), 0), 255) for x in by_hand
    ]


def test_new_draws_leave_the_published_ones_alone() -> None:
    for i in range(50):
        old, new = (
            Augmentation(seed=2, **more).draw(3, i)
            for more in ({}, {"scale": (0.5, 2.0), "jitter": 0.3})
        )
        assert new[:3] == old[:3] and old == Draw(*old[:3])
        assert 0.5 <= new.scale <= 2 and all(0.7 <= x <= 1.3 for x in new.colours)
        assert (
            new.colours == Augmentation(seed=2, jitter=0.3).draw(3, i).colours
        )  # parts don't shift each other


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"full_labels": True}, ((64, 128), (64, 128))),
        ({"full_labels": True, "augment": Augmentation(scale=(0.5, 2.0))}, ((64, 128), (64, 128))),
        ({"augment": Augmentation(scale=(0.5, 2.0), jitter=0.3)}, ((64, 128), (16, 32))),
        ({"augment": Augmentation(crop=(66, 70))}, ((66, 70), (17, 18))),
    ],
)
def test_label_sizes_and_cache(options: dict, shapes: tuple, scenes: Path, tmp_path: Path) -> None:
    open_split(
        "cityscapes", scenes, "train", height=64, cache_dir=tmp_path
    )  # a cache of another kind lies there
    direct = open_split("cityscapes", scenes, "train", height=64, cache=False, **options)
    stored = open_split("cityscapes", scenes, "train", height=64, cache_dir=tmp_path, **options)
    assert stored.cache is not None and len(list(tmp_path.glob("*.bin"))) == 2
    first, second = (training_batches(d, batch_size=10, seed=0, epoch=4) for d in (direct, stored))
    for a, b in zip(first, second, strict=True):
        assert (a.images.shape[2:], a.labels.shape[1:]) == shapes
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    worker = next(iter(training_batches(stored, batch_size=10, seed=0, epoch=4, num_workers=1)))
    assert torch.equal(worker.images, a.images) and torch.equal(worker.labels, a.labels)
    assert direct[3].label.shape == (
        (64, 128) if "full_labels" in options else (16, 32)
    )  # not augmented


def test_whole_labels_move_with_the_image() -> None:
    label = torch.arange(1, 8 * 12 + 1).reshape(8, 12).to(torch.uint8)
    image, moved = Augmentation()(label.expand(3, -1, -1), label, Draw(True, 1, -1), 0)
    assert torch.equal(image[0], moved) and moved[0, 4] == label.flip(-1)[4, 0]


# --- the whole


INTERRUPTED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import cli
from train import TransKDBase, tracking
stepped = tracking.Tracker.stepped
def step_and_stop(self, *arguments):
    stepped(self, *arguments)
    if self.step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
tracking.Tracker.stepped = step_and_stop
cli.run(TransKDBase.main, TransKDBase.Options)
"""


def test_modern_recipe_resumes_exactly(
    command: Command, scenes: Path, teacher_weights: Path, tmp_path: Path
) -> None:
    """Interrupted within an epoch, of batches twice the published size in two parts each."""
    common = [
        "--datadir",
        scenes,
        "--teacher-weights",
        teacher_weights,
        *SMALL,
        "--recipe",
        "modern",
    ]
    common += [
        "--warmup-steps",
        3,
        "--normalisation",
        "imagenet",
        "--num-epochs",
        2,
        "--max-steps",
        8,
    ]
    common += [
        "--schedule",
        "step",
        "--ema",
        0.999,
        "--jitter",
        0.3,
    ]  # what the preset leaves out, too
    common += ["--batch-size", 4, "--accumulate", 2]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = command("train/TransKDBase.py", *common, "--output-dir", whole)
    assert done.returncode == 0, done.stderr
    stopped = command("-c", INTERRUPTED.format(root=str(ROOT)), *common, "--output-dir", parts)
    assert stopped.returncode == 143 and "interrupted at step 4" in stopped.stderr
    other = command(
        "train/TransKDBase.py", *common, "--output-dir", parts, "--resume", "--max-steps", 6
    )
    assert other.returncode == 2 and "decay_steps 6 instead of 8" in other.stderr
    resumed = command(
        "train/TransKDBase.py", *common, "--output-dir", parts, "--resume", "--num-workers", 1
    )
    assert resumed.returncode == 0, resumed.stderr
    for name in ("student.safetensors", "student_best.safetensors", "last.pt"):
        assert_equal(whole / name, parts / name)

    steps = [r for r in records(whole) if r["event"] == "train"]
    assert [r["lr"] / 6e-5 for r in steps] == pytest.approx(
        [1 / 3, 7 / 8 * 2 / 3, 6 / 8, 5 / 8, 0.5, 3 / 8, 0.25, 1 / 8]
    )
    assert [r["epoch"] for r in steps] == [
        1,
        1,
        1,
        2,
        2,
        2,
        3,
        3,
    ]  # more epochs than two: the steps are kept
    assert all(0 < r["losses"]["logits"] < 10 for r in steps)
    options = json.loads((whole / "options.json").read_text())
    assert options["recipe"] == "modern" and all(
        options[name] == (list(value) if isinstance(value, tuple) else value)
        for name, value in RECIPES["modern"].items()
        if name not in ("warmup_steps", "normalisation")
    )
    averaged, checkpoint = load_model(whole / "student.safetensors"), load_model(whole / "last.pt")
    assert averaged.normalisation == checkpoint.normalisation == IMAGENET
    assert averaged.class_names == checkpoint.class_names == CITYSCAPES.output_names
    content = torch.load(whole / "last.pt")
    kept = load_file(whole / "student.safetensors")
    assert all(torch.equal(value, kept[key]) for key, value in content["averaged"].items())
    assert not torch.equal(
        content["model"]["student.linear_pred.weight"], kept["linear_pred.weight"]
    )
    output = checkpoint(torch.rand(1, 3, 64, 64))
    assert isinstance(output, SegmentationOutput)
