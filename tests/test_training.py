"""Training through the command line on drawn scenes, and the engine's promises."""

import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import PolynomialLR

from errors import UserError
from models import create_model, load_model, save_model
from models.checkpoints import IMAGENET, read_facts
from models.distillation import Distiller
from tests.conftest import ROOT, Command
from tests.golden_data import load
from train import TransKDBase, engine, options, student, teacher
from train.optimisation import Plan, Schedule, new_optimizer
from train.options import TrainingOptions
from train.TransKDBase import Options

SMALL = (
    "--height",
    64,
    "--num-workers",
    0,
    "--batch-size",
    2,
    "--steps-loss",
    1,
    "--no-tensorboard",
    "--device",
    "cpu",
)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_model(path).state_dict()


def assert_equal(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize(
    ("script", "dataset", "losses"),
    [
        (
            "TransKDBase.py",
            "cityscapes",
            ["ce", "hcl", "embed1", "embed2", "embed3", "embed4", "total"],
        ),
        (
            "TransKD_GLMixer.py",
            "cityscapes",
            ["ce", "hcl", "embed1", "embed2", "embed3", "embed4", "total"],
        ),
        (
            "TransKD_EA.py",
            "cityscapes",
            ["ce", "hcl", "embed1", "embed2", "embed3", "embed4", "total"],
        ),
        ("TransKDBase.py", "ACDC", ["ce", "hcl", "embed1", "embed2", "embed3", "embed4", "total"]),
        ("student.py", "cityscapes", ["ce", "total"]),
        ("student.py", "ACDC", ["ce", "total"]),
        ("teacher.py", "cityscapes", ["ce", "total"]),
    ],
)
def test_every_script_trains(
    script: str,
    dataset: str,
    losses: list[str],
    command: Command,
    scenes: Path,
    weathers: Path,
    teacher_weights: Path,
    tmp_path: Path,
) -> None:
    """Two steps from the folder of the scripts, as the published README does it."""
    datadir = scenes if dataset == "cityscapes" else weathers
    flags = [
        "--dataset",
        dataset,
        "--datadir",
        datadir,
        "--output-dir",
        tmp_path / "run",
        "--max-steps",
        2,
        *SMALL,
    ]
    network = "student"
    if script == "teacher.py":
        flags += ["--from-scratch", "--teacher-model", "segformer_b0"]
        network = "teacher"
    elif script != "student.py":
        flags += ["--teacher-weights", teacher_weights, "--validate-teacher"]
    done = command(script, *flags, cwd=ROOT / "train")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    written = records(run)
    steps = [r for r in written if r["event"] == "train"]
    assert [r["step"] for r in steps] == [1, 2]
    assert all(list(r["losses"]) == losses for r in steps)
    for r in steps:
        assert r["losses"]["total"] == pytest.approx(
            sum(v for k, v in r["losses"].items() if k != "total")
        )
    assert written[-1]["event"] == "val" and 0 <= written[-1]["mean_iou"] <= 1
    assert ("teacher" in [r["event"] for r in written]) == ("--validate-teacher" in flags)
    for name in (network, f"{network}_best"):
        model = load_model(run / f"{name}.safetensors")
        assert model.name == "segformer_b0"
        assert sum(p.numel() for p in model.parameters()) == 3_719_284
    options = json.loads((run / "options.json").read_text())
    assert options["dataset"] == dataset and options["max_steps"] == 2
    assert_equal(
        run / "last.pt", run / f"{network}.safetensors"
    )  # a run's checkpoint is recognised too


def test_training_lowers_the_loss(command: Command, scenes: Path, tmp_path: Path) -> None:
    flags = (
        "--datadir",
        scenes,
        "--num-epochs",
        8,
        "--validate-every",
        8,
        "--lr",
        1e-3,
        "--output-dir",
        tmp_path,
    )
    done = command("train/student.py", *flags, *SMALL)
    assert done.returncode == 0, done.stderr
    ce = [r["losses"]["ce"] for r in records(tmp_path) if r["event"] == "train"]
    assert sum(ce[-5:]) < 0.7 * sum(ce[:5])


@pytest.mark.parametrize("interrupted_after", [5, 7])  # at an epoch's end, and within one
def test_resume_is_exact(
    interrupted_after: int, command: Command, scenes: Path, teacher_weights: Path, tmp_path: Path
) -> None:
    """An interrupted run ends with the bits of an uninterrupted one."""
    common = (
        "--datadir",
        scenes,
        "--teacher-weights",
        teacher_weights,
        *SMALL,
        "--validate-every",
        3,
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for flags in (
        ("--output-dir", whole, "--max-steps", 12),
        ("--output-dir", parts, "--max-steps", interrupted_after),
        ("--output-dir", parts, "--max-steps", 12, "--resume", "--num-workers", 2),
    ):
        done = command("train/TransKDBase.py", *common, *flags)
        assert done.returncode == 0, done.stderr
    assert_equal(whole / "student.safetensors", parts / "student.safetensors")
    first, second = ([r for r in records(run) if r["event"] == "train"] for run in (whole, parts))
    assert [r["step"] for r in second] == list(range(1, 13))
    assert [r["losses"] for r in first] == [r["losses"] for r in second]


def train_here(scenes: Path, run: Path, **flags: object) -> None:
    """`train/student.py` within this process."""
    small = {"height": 64, "num_workers": 0, "steps_loss": 1, "tensorboard": False, "device": "cpu"}
    student.main(student.Options(datadir=scenes, output_dir=run, override=True, **small | flags))


def test_the_step_budget_is_kept_with_another_batch(scenes: Path, tmp_path: Path) -> None:
    """10 images are 3 steps an epoch at the published batch: 12 in 4 epochs, though 7 of 10 each were 7 epochs."""
    common = {"keep_steps": True, "num_epochs": 4, "validate_every": 20}
    train_here(scenes, tmp_path, **common, batch_size=10, max_steps=7)
    train_here(scenes, tmp_path, **common, batch_size=5, resume=True)
    written = records(tmp_path)
    assert [r["step"] for r in written if r["event"] == "train"] == list(range(1, 13))
    assert [r["total_steps"] for r in written if r["event"] == "start"] == [7, 12]


def test_average_and_decay_on_resume(scenes: Path, tmp_path: Path) -> None:
    """An average begins with the weights that are there; the optimizer's groups can't change."""
    train_here(scenes, tmp_path, max_steps=1)
    first = weights(tmp_path / "student.safetensors")
    train_here(scenes, tmp_path, max_steps=2, resume=True, ema=0.9)
    raw, average = (
        torch.load(tmp_path / "last.pt")["model"],
        weights(tmp_path / "student.safetensors"),
    )
    key, d = "linear_pred.weight", 3 / 12
    torch.testing.assert_close(average[key], d * first[key] + (1 - d) * raw[f"student.{key}"])
    with pytest.raises(UserError, match="--decay can't change on --resume"):
        train_here(scenes, tmp_path, max_steps=3, resume=True, decay="matrices")
    assert (
        json.loads((tmp_path / "options.json").read_text())["decay"] == "all"
    )  # what was refused left no trace


def test_two_methods_start_from_the_same_student(
    command: Command, scenes: Path, teacher_weights: Path, tmp_path: Path
) -> None:
    """One seed means one student: differences between methods are the methods'."""
    for script, flags in (
        ("student.py", ()),
        ("TransKDBase.py", ("--teacher-weights", teacher_weights)),
    ):
        flags += ("--output-dir", tmp_path / script, "--max-steps", 1)
        done = command(f"train/{script}", "--datadir", scenes, *flags, *SMALL)
        assert done.returncode == 0, done.stderr
    alone, distilled = (
        records(tmp_path / s)[1]["losses"]["ce"] for s in ("student.py", "TransKDBase.py")
    )
    assert alone == distilled


def test_schedule() -> None:
    """The learning rate of every epoch is the published one, though PolynomialLR is torch's."""
    golden = load("lr_golden.json")["used_lr_by_epoch"]
    options = Options(datadir=Path())
    optimizer = new_optimizer(Distiller(create_model("segformer_b0"), None), options)
    plan = Plan.of(options, images=10, steps_per_epoch=5)
    schedule = Schedule(optimizer, options, plan)
    assert isinstance(schedule.by_epoch, PolynomialLR)
    for epoch in range(1, 1504):
        schedule.set(epoch, 0)
        if str(epoch) in golden:
            lr = optimizer.param_groups[0]["lr"]
            assert lr == schedule.lr == pytest.approx(golden[str(epoch)], rel=1e-9, abs=1e-17)
            if epoch in (2, 100, 999):  # a resumed run builds the schedule anew, to the same bits
                again = Schedule(optimizer, options, plan)
                again.set(epoch, 0)
                assert again.lr == lr


def test_published_recipe_is_the_default() -> None:
    options = Options(datadir=Path())
    group = new_optimizer(nn.Linear(2, 20), options).param_groups[0]
    assert (options.num_epochs, options.batch_size, options.height) == (1000, 2, 512)
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.01)
    assert options.losses()["embed_weights"] == (0.1, 0.1, 0.5, 1.0)


@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [
        ("student.py", ["--datadir", "nowhere"], "nowhere"),
        ("student.py", ["--height", "16"], "--height"),
        ("student.py", ["--batch-size", "0"], "--batch-size"),
        ("student.py", ["--device", "cuda:77"], "--device"),
        ("student.py", ["--lr", "much"], "--lr"),
        ("student.py", ["--num-epochs", "2000"], "--lr-decay-epochs"),
        ("TransKDBase.py", ["--temperature", "4"], "--temperature"),
        ("student.py", ["--nonsense", "3"], "--nonsense"),
        ("student.py", ["--dataset", "kitti"], "--dataset"),
        ("student.py", ["--resume"], "--resume"),
        ("student.py", ["--student-weights", "nowhere.pth"], "nowhere.pth"),
        ("TransKDBase.py", ["--teacher-weights", "nowhere.pth"], "nowhere.pth"),
        ("TransKD_GLMixer.py", ["--embed", "2"], "--embed"),
        ("TransKD_EA.py", ["--embed", "0"], "--embed"),
        ("teacher.py", ["--teacher-model", "segformer_b5"], "mit_b5.pth"),
    ],
)
def test_mistakes_end_in_one_line(
    script: str, flags: list[str], says: str, command: Command, scenes: Path, tmp_path: Path
) -> None:
    done = command(
        f"train/{script}", "--datadir", scenes, "--output-dir", tmp_path / "run", *SMALL, *flags
    )
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ") and says in error
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [
        (student, {"student_weights": Path("nowhere.pth")}, "no weights at nowhere.pth"),
        (student, {"student_pretrained": True, "student_model": "segformer_b5"}, "mit_b5.pth"),
        (teacher, {"teacher_weights": Path("nowhere.pth")}, "no weights at nowhere.pth"),
        (teacher, {"teacher_model": "segformer_b5"}, "mit_b5.pth.*--from-scratch"),
        (TransKDBase, {"teacher_weights": Path("nowhere.pth")}, "no teacher at nowhere.pth"),
    ],
)
def test_missing_weights_are_told_before_the_data_is_read(
    script: ModuleType,
    flags: dict[str, Any],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(options, "ROOT", tmp_path)
    with pytest.raises(UserError, match=says):
        script.main(
            script.Options(datadir=tmp_path / "no data", output_dir=tmp_path / "run", **flags)
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"student_pretrained": True, "student_weights": Path("a.pth")}, "--student-pretrained"),
        ({"logits_temperature": 4.0}, "--logits-weight"),
        ({"compile_mode": "reduce-overhead"}, "--compile"),
        ({"compile_mode": "max-autotune", "compile": True, "accumulate": 2}, "--accumulate"),
        ({"port": 8098}, "--visualize"),
        ({"schedule": "step", "lr_decay_epochs": 9}, "--schedule epoch"),
        ({"embed": 2, "embed_weights": (1.0, 1.0, 1.0, 1.0)}, "--embed 5"),
        ({"seed": 2**32}, "--seed"),
        ({"height": 2**16}, "--height"),
        ({"num_workers": 1000}, "--num-workers"),
    ],
)
def test_flags_that_contradict_each_other(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Options(datadir=Path(), **flags)


def test_a_reader_that_leaves() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "train/student.py", "--help"]
    done = subprocess.run(
        command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, env=environment
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    "called", [("train/student.py",), ("-m", "models.zoo"), ("-m", "benchmarks")]
)
def test_help_says_how_it_is_called(command: Command, called: tuple[str, ...]) -> None:
    name = " ".join(("python", *called) if "-m" in called else called)
    assert command(*called, "--help").stdout.startswith(f"usage: {name} [")


def test_a_run_is_not_overwritten(command: Command, scenes: Path, tmp_path: Path) -> None:
    flags = ("--datadir", scenes, "--output-dir", tmp_path, "--max-steps", 1, *SMALL)
    assert command("train/student.py", *flags).returncode == 0
    before = (tmp_path / "last.pt").read_bytes()
    done = command("train/student.py", *flags)
    assert done.returncode == 2 and "--resume" in done.stderr
    assert (tmp_path / "last.pt").read_bytes() == before


def test_imagenet_student(command: Command, scenes: Path, tmp_path: Path) -> None:
    """Starts from an encoder file, as `--student-pretrained` does from ckpt_pretrained/."""
    torch.manual_seed(5)
    encoder = {
        k: v
        for k, v in create_model("segformer_b0").state_dict().items()
        if not k.startswith("linear_")
    }
    torch.save(
        encoder | {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)},
        tmp_path / "mit_b0.pth",
    )
    flags = (
        "--datadir",
        scenes,
        "--output-dir",
        tmp_path / "run",
        "--max-steps",
        1,
        "--lr",
        1e-30,
        *SMALL,
    )
    done = command("train/student.py", *flags, "--student-weights", tmp_path / "mit_b0.pth")
    assert done.returncode == 0, done.stderr
    trained = weights(tmp_path / "run" / "student.safetensors")
    assert all(
        torch.allclose(trained[key], value, rtol=0, atol=1e-20) for key, value in encoder.items()
    )
    facts = read_facts(tmp_path / "run" / "student.safetensors")
    assert {key: facts[key] for key in ("method", "height", "step")} == {
        "method": "student",
        "height": 64,
        "step": 1,
    }
    assert read_facts(tmp_path / "run" / "best.pt") == facts
    assert read_facts(tmp_path / "run" / "last.pt") == {
        key: facts[key] for key in facts if key != "mean_iou"
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0),
        ("betas", (2.0, 0.9)),
        ("dropout", 5.0),
        ("drop_path_rate", 1.5),
        ("save_every", -1.0),
    ],
)
def test_values_out_of_range(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} is"):
        TrainingOptions(datadir=Path(), **{name: value})


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision", "bf16"),
        ("--compile", "--compile-mode", "reduce-overhead"),
        ("--deterministic", "--no-tf32"),
    ],
)
def test_flags_of_speed(
    flags: tuple[str, ...], command: Command, scenes: Path, tmp_path: Path
) -> None:
    """They change how a step is computed, not what: the loss is that of a plain run."""
    common = ("--datadir", scenes, "--max-steps", 1, "--drop-path-rate", 0, "--dropout", 0, *SMALL)
    for name, more in (("plain", ()), ("other", flags)):
        done = command("train/student.py", *common, "--output-dir", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
    plain, other = (
        next(r for r in records(tmp_path / n) if r["event"] == "train") for n in ("plain", "other")
    )
    assert other["losses"] == pytest.approx(plain["losses"], rel=2e-2 if "bf16" in flags else 1e-5)
    assert "bf16" not in flags or other["losses"] != plain["losses"]


def options_of(
    tmp_path: Path, scenes: Path = Path(), *, kind: type[Any] = student.Options, **changes: Any
) -> Any:
    """Of a small run in this process."""
    small = {
        "height": 64,
        "num_workers": 0,
        "batch_size": 2,
        "steps_loss": 1,
        "tensorboard": False,
        "device": "cpu",
    }
    return kind(datadir=scenes, output_dir=tmp_path / "run", **small | changes)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("careful", [False, True])
def test_how_torch_is_set_up_for_a_gpu(
    careful: bool, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    ranks: Any = SimpleNamespace(device=torch.device("cuda"), world_size=processes, first=True)
    attention = [
        getattr(torch.backends.cuda, f"{name}_sdp_enabled")
        for name in ("flash", "mem_efficient", "cudnn")
    ]
    before = options_of(tmp_path)
    try:
        engine.prepare(
            ranks, options_of(tmp_path, deterministic=careful, tf32=not careful, compile=True)
        )
        assert torch.get_float32_matmul_precision() == ("highest" if careful else "high")
        assert torch.backends.cudnn.allow_tf32 is torch.backends.cudnn.benchmark is not careful
        assert torch.are_deterministic_algorithms_enabled() is careful
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is careful
        assert [enabled() for enabled in attention] == [not careful] * 3
        assert torch._dynamo.config.optimize_ddp is (processes == 1)
    finally:
        torch._dynamo.config.optimize_ddp = True
        for name in ("flash", "mem_efficient", "cudnn"):
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(True)
        ranks.device = torch.device("cpu")
        engine.prepare(ranks, before)


def test_the_step_that_is_compiled(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(Distiller, "compile", lambda _, **how: asked.append(how))
    student.main(
        options_of(tmp_path, scenes, max_steps=1, compile=True, compile_mode="reduce-overhead")
    )
    assert asked == [{"dynamic": False, "mode": "reduce-overhead"}]


def test_the_best_stays_the_best(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worse validation afterwards, and one after `--resume`, leave it alone."""
    scores = iter([0.5, 0.3, 0.4])
    names: dict[str, Any] = {"per_class": {}, "mean_iou_published": 0.0}
    found = SimpleNamespace(as_json=lambda: {"mean_iou": next(scores)} | names)
    monkeypatch.setattr(engine, "evaluate", lambda *_, **__: found)
    student.main(options_of(tmp_path, scenes, num_epochs=2, batch_size=10))
    student.main(options_of(tmp_path, scenes, num_epochs=3, batch_size=10, resume=True))
    for name in ("best.pt", "student_best.safetensors"):
        facts = read_facts(tmp_path / "run" / name)
        assert (facts["step"], facts["mean_iou"]) == (1, 0.5)
    assert read_facts(tmp_path / "run" / "student.safetensors")["step"] == 3


def test_it_is_saved_every_so_many_minutes(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = count(0, 25)  # a step looks once, and so does a save
    saved: list[int] = []
    save = engine.Run.save
    monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(
        engine.Run, "save", lambda run, **how: (saved.append(run.state.step), save(run, **how))
    )
    student.main(
        options_of(tmp_path, scenes, max_steps=8, num_epochs=2, save_every=1.0, validate_every=9)
    )
    assert saved == [3, 6, 8, 8]  # after 75 seconds, and at the end, as the best and as the last


def test_what_the_optimizer_is_told() -> None:
    chosen = {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.25}
    (group,) = new_optimizer(torch.nn.Linear(2, 2), options_of(Path(), **chosen)).param_groups
    assert {key: group[key] for key in chosen} == chosen and group["fused"]


def test_a_teacher_is_known_by_its_weights_and_what_they_expect() -> None:
    network = create_model("segformer_b0")
    before = engine.fingerprint(network)
    network.normalisation = IMAGENET
    normalised = engine.fingerprint(network)
    network.to(memory_format=torch.channels_last)
    assert engine.fingerprint(network) == normalised != before
    with torch.no_grad():
        network.linear_pred.bias[0] += 1
    assert engine.fingerprint(network.to(torch.bfloat16)) not in (before, normalised)


def test_resume_with_another_teacher(scenes: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_model(create_model("segformer_b0"), tmp_path / f"{seed}.safetensors")
    taught = {"kind": Options, "teacher_model": "segformer_b0", "max_steps": 1}
    TransKDBase.main(
        options_of(tmp_path, scenes, teacher_weights=tmp_path / "1.safetensors", **taught)
    )
    other = options_of(
        tmp_path, scenes, teacher_weights=tmp_path / "2.safetensors", resume=True, **taught
    )
    with pytest.raises(UserError, match="teacher"):
        TransKDBase.main(other)


def test_published_shift(command: Command, scenes: Path, tmp_path: Path) -> None:
    flags = (
        "--datadir",
        scenes,
        "--output-dir",
        tmp_path / "run",
        "--max-steps",
        1,
        "--published-shift",
        *SMALL,
    )
    done = command("train/student.py", *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "options.json").read_text())["published_shift"] is True
