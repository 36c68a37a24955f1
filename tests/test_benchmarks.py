"""Both sides of every benchmark compute the same numbers, and the tables come out."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

from benchmarks import published
from benchmarks.__main__ import Options, main
from benchmarks.cases import CPU, QUICK, Step, drawn_scenes, label_maps, training
from datasets.classes import CITYSCAPES
from eval.metrics import confusion_matrix
from eval.rendering import colorize
from models import create_model
from models.distillation.methods import PUBLISHED
from tests.conftest import Command
from tests.golden_data import build, golden_input, golden_labels, load, seed, without_chance


@pytest.mark.parametrize("method", PUBLISHED)
def test_the_original_s_steps_have_the_same_losses(method: str) -> None:
    """Two, so that the first one's gradients and update are compared as well."""
    small = replace(CPU, **QUICK)
    ours, theirs = (Step(method, original, small) for original in (False, True))
    theirs.images, theirs.labels = ours.images, ours.labels
    losses = []
    for step in (ours, theirs):
        without_chance(step.distiller)
        for group in step.optimizer.param_groups:
            group["lr"] = 1e-3
        losses.append([{name: loss.item() for name, loss in step().items()} for _ in range(2)])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert losses[0][1] == pytest.approx(losses[1][1], rel=1e-4)
    assert losses[0][1] != pytest.approx(losses[0][0], rel=1e-2)


def test_the_original_s_step_sends_gradients_into_the_teacher() -> None:
    """As many as were measured on the published code."""
    distiller, teacher = build("transkd_base_b0")
    assert teacher is not None
    published.slowed(distiller.student)
    published.slowed(teacher).requires_grad_(True)
    without_chance(distiller.train())
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.0)
    published.published_step(distiller, teacher, optimizer, golden_input("A"), golden_labels())
    norms = [p.grad.norm() for p in teacher.parameters() if p.grad is not None]
    golden = load("train_golden.json")["transkd_base_b0"]["teacher_grad_l2_total"]
    assert torch.stack(norms).norm().item() == pytest.approx(golden, rel=5e-3)


@torch.no_grad()
def test_outputs_counts_colours_and_samples_are_the_same(tmp_path: Path) -> None:
    model = seed(create_model("segformer_b0")).eval()
    peer = published.huggingface_segformer(model)
    images = torch.rand(2, 3, 64, 128)
    torch.testing.assert_close(peer(images).logits, model(images).logits, rtol=0, atol=1e-4)

    predicted, truth = label_maps(64)
    valid = confusion_matrix(predicted, truth, CITYSCAPES.num_outputs)[:-1]
    tp = valid.diagonal()
    found = (tp, valid.sum(0)[:-1] - tp, valid.sum(1) - tp)
    counts = published.one_hot_counts(predicted, truth.long(), CITYSCAPES.num_outputs)
    for ours, theirs in zip(found, counts, strict=True):
        assert ours.tolist() == theirs.tolist() and ours.sum() > 0
    labels = truth[0].numpy()
    loop = published.colour_by_loop(labels, CITYSCAPES.palette.tolist())
    assert colorize(labels, CITYSCAPES).tobytes() == loop.tobytes()
    assert len(np.unique(labels)) == 20

    scenes = drawn_scenes(tmp_path, replace(CPU, **QUICK), count=1)
    files = scenes.samples[0]
    image, label = published.read_sample(files.image, files.label, 64, CITYSCAPES.ignore)
    assert torch.equal(scenes[0].image, image) and image.shape == (3, 64, 128)
    assert torch.equal(scenes[0].label, label) and label.shape == (16, 32)


def test_the_table(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = command("-m", "benchmarks", "--quick", "--only", "confusion", "--json", file)
    assert done.returncode == 0, done.stderr
    time, memory = json.loads(file.read_text())["rows"]
    assert time["ratio"] == median(time["theirs"]) / median(time["ours"])
    assert memory["ratio"] == median(memory["ours"]) / median(memory["theirs"])
    assert done.stdout.count("confusion matrix, 128×256") == 2


def test_networks_on_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    """Both sides in a process of their own; and where the time goes."""
    setup = replace(CPU, **QUICK, steps=(("TransKD_EA", 2, None),), calls=2)
    time, memory = training(setup)
    assert len(time.ours) == len(time.theirs) == 2 and memory.ratio is not None
    assert "images/s" in time.note
    main(Options(quick=True, profile=True))
    assert "aten::" in capsys.readouterr().out
