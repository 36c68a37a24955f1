"""Both sides of every benchmark compute the same numbers, and the table comes out."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import published
from benchmarks.__main__ import Options, cells, main
from benchmarks.cases import Step, drawn_scenes, label_maps, prediction
from benchmarks.gpu import Setup, gpu, repeated, seconds, step_cost
from benchmarks.measure import QUICK, Row, Sizes, in_turn
from datasets.classes import CITYSCAPES
from eval.metrics import ConfusionMatrix
from eval.rendering import colorize
from models import create_model
from models.info import METHODS
from tests.conftest import Command
from tests.golden_data import build, golden_input, golden_labels, load, seed


def without_chance(module: nn.Module) -> None:
    """No dropout, no stochastic depth."""
    for part in module.modules():
        for name in ("p", "drop_prob"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_the_published_way_has_the_same_losses(method: str) -> None:
    """Two steps, so that the first one's gradients and update agree as well."""
    ours, theirs = (Step(method, other, QUICK) for other in (False, True))
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
    teacher: Any = theirs.distiller.teacher
    for name, parameter in teacher.named_parameters():
        assert (parameter.grad is None) == ("decode_head" in name), name  # its logits enter no loss


def test_the_published_way_sends_gradients_into_the_teacher() -> None:
    """As many as were measured on the published code."""
    distiller = build("transkd_base_b0")
    student, teacher = distiller.student, distiller.teacher
    assert teacher
    distiller.student, their_teacher = (
        published.HuggingFaceSegFormer(m, "eager") for m in (student, teacher)
    )
    object.__setattr__(distiller, "teacher", their_teacher.eval().requires_grad_(True))
    without_chance(distiller.train())
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.0)
    published.published_step(distiller, optimizer, golden_input("A"), golden_labels())
    norm = torch.stack(
        [p.grad.norm() for p in their_teacher.parameters() if p.grad is not None]
    ).norm()
    assert norm.item() == pytest.approx(
        load("train_golden.json")["transkd_base_b0"]["teacher_grad_l2_total"], rel=5e-3
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_peer_has_the_same_outputs(attention: str) -> None:
    ours = create_model("segformer_b0").eval()
    seed(ours)
    theirs = published.HuggingFaceSegFormer(ours, attention).eval()
    images = torch.rand(2, 3, 64, 128)
    with torch.no_grad():
        actual, expected = ours(images), theirs(images)
    for a, b in zip(
        (actual[0], *actual[1], *actual[2]), (expected[0], *expected[1], *expected[2]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())
    assert prediction(theirs, images)().equal(expected.logits)


def test_the_one_hot_count_counts_the_same() -> None:
    predicted, truth = label_maps(64)
    matrix = ConfusionMatrix(CITYSCAPES)
    matrix.update(predicted, truth)
    counts = published.one_hot_counts(predicted, truth.long(), CITYSCAPES.num_outputs)
    for ours, theirs in zip((matrix.tp, matrix.fp, matrix.fn), counts, strict=True):
        assert ours.tolist() == theirs.tolist()
        assert ours.sum() > 0


def test_the_loop_has_the_same_colours() -> None:
    labels = label_maps(64)[1][0].numpy()
    loop = published.colour_by_loop(labels, CITYSCAPES.palette.tolist())
    assert colorize(labels, CITYSCAPES).tobytes() == loop.tobytes()
    assert len(np.unique(labels)) == 20


def test_decoding_gives_the_same_bytes(tmp_path: Path) -> None:
    scenes = drawn_scenes(tmp_path, QUICK, count=1)
    sample = scenes.samples[0]
    assert scenes.cache and sample.label
    image, label = published.read_sample(
        sample.image, sample.label, QUICK.height, CITYSCAPES.ignore
    )
    assert torch.equal(scenes[0].image, image) and image.shape == (3, 64, 128)
    assert torch.equal(scenes[0].label, label) and label.shape == (16, 32)


def test_the_table(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = command("-m", "benchmarks", "--quick", "--only", "confusion", "--json", file)
    assert done.returncode == 0, done.stderr
    time, memory = json.loads(file.read_text())["rows"]
    assert (time["what"], memory["what"]) == ("time", "memory")
    assert time["ratio"] > 1 > memory["ratio"] > 0
    assert "confusion matrix, 128×256" in done.stdout and "GFLOP/s" in done.stdout


def test_a_row_says_whether_its_target_is_reached() -> None:
    row = Row("x", "y", "time", (1.0, 2.0, 9.0), (7.0, 8.0, 9.0), target=4)
    assert (row.ratio, row.reached) == (4, True)
    assert cells(row)[1:5] == ("4× faster", "≥ 4× ✓", "2.00 s", "8.00 s")
    row = replace(row, what="memory", ours=(1e6,), theirs=(2e9,), target=0.0001)
    assert (row.ratio, row.reached) == (0.0005, False)
    assert cells(row)[1:5] == ("0.0005× the memory", "≤ 0.0001× ✗", "1 MB", "2.00 GB")
    assert cells(Row("x", "y", note="not installed"))[1:] == (
        "–",
        "",
        "–",
        "–",
        "y",
        "not installed",
    )


def test_both_sides_take_turns() -> None:
    turns: list[str] = []
    times = in_turn(lambda: turns.append("ours"), lambda: turns.append("theirs"), 2)
    assert turns == ["ours", "theirs"] * 3
    assert [len(seconds) for seconds in times] == [2, 2]


ON_THE_CPU = Setup(
    "cpu",
    bf16=False,
    compile_modes=(),
    batches=(2,),
    warmup=0,
    repeats=1,
    workers=0,
    images=3,
    loaded_steps=1,
)


def test_the_gpu_case_on_the_cpu() -> None:
    fp32, _, tf32, _, loaded, *peers = gpu(QUICK, ON_THE_CPU)
    assert fp32.ratio and tf32.ratio and cells(fp32)[-1].endswith("images/s")
    assert (fp32.other, fp32.target, tf32.other, tf32.target) == (
        "published way, fp32",
        6,
        "published way, TF32",
        None,
    )
    assert "1000 epochs of Cityscapes" in loaded.note and loaded.ours[0] > 0
    assert [row.items for row in peers] == [1, 16] and all(row.ratio for row in peers)


def test_a_gpu_computes_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN searches on both sides, and TF32 is taken where the row says so."""

    def settings() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark

    before = settings()
    monkeypatch.setattr("benchmarks.gpu.Step", lambda *_: lambda: seen.append(settings()))
    for tf32, precision in ((True, "high"), (False, "highest")):
        seen: list[tuple[str, bool]] = []
        step_cost(True, QUICK, ON_THE_CPU, tf32=tf32)
        assert seen == [(precision, True)]
    assert settings() == before


def test_a_gpu_is_not_waited_for_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.time = 0

        def record(self) -> None:
            log.append("mark")
            self.time = len(log)

        def elapsed_time(self, end: "Event") -> float:
            return 1000.0 * (end.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    assert seconds(lambda: log.append("step"), Setup(warmup=1, repeats=2)) == (2.0, 2.0)
    assert log == ["step", "wait", "mark", "step", "mark", "step", "mark", "wait"]


def test_images_are_read_over_and_over(tmp_path: Path) -> None:
    """More batches than workers read ahead, all of one size: another would be compiled, and no rate be told."""
    batches = repeated(tmp_path, QUICK, ON_THE_CPU, 5)
    assert [len(batch.images) for batch in batches] == [2] * 5


def test_a_case_that_fails_takes_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(sizes: Sizes) -> Iterator[Row]:
        yield Row("measured", "y", "time", (1.0,), (7.0,))
        raise RuntimeError

    monkeypatch.setattr("benchmarks.__main__.ALL", {"gpu": fails})
    with pytest.raises(RuntimeError):
        main(Options(quick=True, json=tmp_path / "bench.json"))
    assert "measured" in capsys.readouterr().out
    assert [row["ratio"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]] == [
        7
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_row_says_so() -> None:
    assert [row.note for row in gpu(QUICK)] == ["no GPU here"]
