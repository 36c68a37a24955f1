"""The table runner: grids that are read, runs that are planned, stopped, continued and failed."""

import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from filelock import FileLock

import cli
from errors import UserError
from files import ROOT, read_json, write_json
from tests import runs
from train import distill, jobs, student, table
from train.cost import Cost
from train.grid import read_grid
from train.jobs import ClusterJob, Job, run_here
from train.optimisation import Plan

GRIDS = ROOT / "train" / "grids"
GRID = """
seeds = [0, 1]
[options]
height = 64
tensorboard = false
max-steps = 400
num-epochs = 100
[presets.slow]
lr = 1e-5
[evaluation]
script = "eval/eval_cityscapes_iou.py"
[[rows]]
name = "teacher"
weights = "teacher.pth"
[[rows]]
name = "student"
label = "student alone"
script = "train/student.py"
options = { batch-size = 2 }
published = 55.86
[[rows]]
name = "taught"
script = "train/distill.py"
presets = ["slow"]
options = { method = "transkd_base", embed-weights = [0.1, 0.1, 0.5, 1] }
teacher = "teacher"
baseline = "student"
"""
GIVEN = 'weights = "teacher.pth"'
TRAINED = 'script = "train/teacher.py"\noptions = { from-scratch = true }'


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    return path


def change(grid: Path, before: str, after: str) -> None:
    assert before in grid.read_text()
    grid.write_text(grid.read_text().replace(before, after))


def plan_of(grid: Path, **options: Any) -> list[table.TableRun]:
    chosen = table.Options(grid=grid, **options)
    return table.plan_runs(read_grid(grid), Path("data"), grid.parent / "runs", chosen)


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run costs takes half a second to count."""
    cost = Cost("segformer_b0", 3_720_000, 13_670_000_000, 4e9, 1.6e12)
    monkeypatch.setattr(table, "cost_of", lambda *_: cost)


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.toml")), ids=lambda path: path.stem)
def test_grids_of_the_project(path: Path, uncounted: None) -> None:
    """Every row is one that its script takes; students alone have the published schedules."""
    for run in plan_of(path, seeds=(0,)):
        assert run.teacher is None or run.commands[0].count(str(run.teacher.weights)) == 1
        if path.stem in ("cityscapes", "architectures") and run.row.name.startswith("student"):
            recipe = cli.parse(student.Options, run.commands[0][1:]).recipe
            published = (500, 4) if path.stem == "cityscapes" else (1000, 8)
            assert (recipe.num_epochs, recipe.batch_size) == published


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("published", "publisched", "is no grid .*publisched"),
        ('teacher = "teacher"', 'teacher = "nobody"', "taught: its teacher nobody is no row above"),
        ('baseline = "student"', 'baseline = "nobody"', "its baseline nobody is no row"),
        ('presets = ["slow"]', 'presets = ["fast"]', "no preset is called fast"),
        ('name = "student"', 'name = "teacher"', "two rows are called teacher"),
        ("seeds = [0, 1]", "seeds = []", "there are no seeds"),
        (GIVEN, "", "row teacher: it needs a script, or weights"),
        ("max-steps", "max-stepps", "train/student.py can't be run"),
        ("_iou.py", "_iuo.py", "eval_cityscapes_iuo.py can't be run"),
    ],
)
def test_mistakes(before: str, after: str, says: str, grid: Path, uncounted: None) -> None:
    change(grid, before, after)
    with pytest.raises(UserError, match=says):
        plan_of(grid)
    with pytest.raises(UserError, match="no grid at nowhere"):
        read_grid(Path("nowhere"))


def test_what_is_planned(grid: Path, uncounted: None) -> None:
    """Teachers of the same seed, or the only one; what is chosen brings its teacher."""
    first, *_, last = plan_of(grid)
    assert first.name == "teacher" and len(first.commands) == 1  # evaluated, not trained
    words = " ".join(last.commands[0])
    assert "--no-tensorboard" in words and "--embed-weights 0.1 0.1 0.5 1 " in words
    assert "--lr 1e-05" in words and "--seed 1" in words and words.endswith("--resume auto")
    assert "--teacher-weights teacher.pth" in words
    names = [run.name for run in plan_of(grid, only=("taught",), seeds=(7,))]
    assert names == ["teacher", "taught-seed7"]
    with pytest.raises(UserError, match="no row is called nobody"):
        plan_of(grid, only=("nobody",))

    def teachers(**options: Any) -> list[Any]:
        return [run.teacher for run in plan_of(grid, **options) if run.teacher]

    change(grid, GIVEN, TRAINED)
    assert [taught.name for taught in teachers()] == ["teacher-seed0", "teacher-seed1"]
    change(grid, TRAINED, f"{TRAINED}\nseeds = [9]")
    assert [taught.name for taught in teachers()] == ["teacher-seed9"] * 2
    assert teachers()[0].weights == teachers()[0].folder / "teacher.safetensors"
    assert teachers(teacher_weights=Path("w"))[0].weights == Path("w")


def test_equal_compute(grid: Path) -> None:
    """Every student has the most expensive one's multiply-accumulates, within a step of its own."""
    change(grid, "seeds = [0, 1]", 'seeds = [0]\nequal = "compute"')
    change(grid, "batch-size = 2", "batch-size = 4")
    planned = plan_of(grid)[1:]
    costs = [run.cost.macs_per_step for run in planned if run.cost]
    steps = []
    for run, script in zip(planned, (student, distill), strict=True):
        recipe = cli.parse(script.Options, run.commands[0][1:]).recipe
        steps.append(Plan(recipe, 2, 10, 5).steps)
        # The learning rate falls as far as before.
        assert recipe.lr_decay_epochs / recipe.num_epochs == pytest.approx(15, rel=0.01)
    assert steps[0] > steps[1] == 400
    assert 0 <= steps[0] * costs[0] - steps[1] * costs[1] < costs[0]


def job(folder: Path, name: str, code: str = "", teacher: Job | None = None) -> Job:
    """Its training is a line of Python, run in its folder; its evaluation writes a figure."""
    where = folder / name
    note = f"import os, signal, sys, time; os.chdir({str(where)!r}); "
    note += f"open('../order', 'a').write('{name} '); "
    evaluate = f"open({str(where / 'eval.json')!r}, 'w').write('{{\"mean_iou\": 0.5}}')"
    commands = [["-c", note + code], ["-c", evaluate]]
    return Job(name=name, folder=where, weights=where / "w", commands=commands, teacher=teacher)


SAVING = "signal.signal(15, lambda *_: (open('saved', 'w'), sys.exit(143))); "


@runs.as_a_process()
def test_one_failure_does_not_lose_the_others(tmp_path: Path) -> None:
    bad = job(tmp_path, "bad", "sys.exit('out of luck')")
    several = [bad, job(tmp_path, "taught", teacher=bad), job(tmp_path, "good")]
    calls: list[int] = []
    run_here(several, [{}], lambda: calls.append(1))
    assert (tmp_path / "order").read_text() == "bad good " and len(calls) == 2
    said = f"out of luck (exit code 1, {bad.folder / 'log.txt'})"
    assert [each.error for each in several] == [said, "its teacher bad failed", ""]
    run_here([job(tmp_path, "good")], [{}], lambda: calls.append(1))
    assert len(calls) == 2
    # A grid that was changed: what other commands made is no result of these.
    changed = job(tmp_path, "good", "pass")
    assert changed.result is None
    run_here([changed], [{}], lambda: calls.append(1))
    assert len(calls) == 3 and changed.result == {"mean_iou": 0.5}
    # Nor is what was learned from another teacher, or was not evaluated.
    assert not job(tmp_path, "good", "pass", teacher=bad).is_done
    (changed.folder / "eval.json").unlink()
    assert not changed.is_done


@runs.as_a_process()
def test_teachers_first_and_a_device_for_each(tmp_path: Path, capsys: Any) -> None:
    note = "open('../gpus', 'a').write(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.5)"
    elsewhere, teacher = job(tmp_path, "elsewhere"), job(tmp_path, "teacher", note)
    students = [job(tmp_path, "taught", teacher=teacher), job(tmp_path, "alone", note)]
    elsewhere.folder.mkdir()
    lock = FileLock(elsewhere.folder / "table.lock")

    def ended() -> None:  # what another table is at work on, and is not done again
        for name, content in (("eval", {"mean_iou": 0.5}), ("done", elsewhere.made_by)):
            write_json(content, elsewhere.folder / f"{name}.json")
        lock.release()

    with lock:
        slots = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "35"]
        run_here([elsewhere, teacher, *students], slots, ended)
    assert capsys.readouterr().err.count("waiting for elsewhere, which another table runs") == 1
    order = (tmp_path / "order").read_text().split()
    assert sorted(order[:2]) == ["alone", "teacher"] and order[2:] == ["taught"]
    assert sorted((tmp_path / "gpus").read_text()) == ["3", "5"]


@runs.as_a_process()
def test_a_signal_is_passed_on(tmp_path: Path) -> None:
    stopping = SAVING + "os.kill(os.getppid(), 15); time.sleep(60)"
    with pytest.raises(SystemExit) as end:
        run_here([job(tmp_path, "a", stopping), job(tmp_path, "b")], [{}], lambda: None)
    assert end.value.code == 128 + 15
    assert (tmp_path / "a" / "saved").exists() and (tmp_path / "order").read_text() == "a "
    run_here([job(tmp_path, "a"), job(tmp_path, "b")], [{}], lambda: None)
    assert (tmp_path / "order").read_text() == "a a b "


def test_the_table(grid: Path, uncounted: None) -> None:
    content = read_grid(grid)
    planned = table.plan_runs(content, Path("data"), grid.parent, table.Options(grid=grid))
    scores = {"student-seed0": 0.1, "student-seed1": 0.3, "taught-seed1": 0.35, "teacher": 0.5}
    line = '{"event": "train", "step": %d, "images_per_second": 4}\n'
    for run in planned:
        run.folder.mkdir(parents=True)
        (run.folder / "metrics.jsonl").write_text("".join(line % step for step in (1, 2, 3)))
        if run.name in scores:
            write_json({"mean_iou": scores[run.name]}, run.folder / "eval.json")
            write_json(run.made_by, run.folder / "done.json")
        else:
            run.error = "out of memory"
    text = table.tabulate(content, planned, grid.parent)
    assert (grid.parent / "table.md").read_text() == text + "\n"
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert cells[2] == ["teacher", "50.00", "1 of 1", *["–"] * 8]
    student_cells = ["student alone", "20.00 ± 14.14", "2 of 2", "–", "55.86", "3.72", "13.67"]
    assert cells[3] == [*student_cells, "4.0", "3", "2.4e-05", "0.5"]
    assert cells[4][:5] == ["taught", "35.00", "1 of 2", "+5.00", "–"]
    assert "taught-seed0 failed: out of memory" in text
    written = read_json(grid.parent / "table.json")
    assert written is not None and written["rows"][2]["gains"] == [pytest.approx(5)]


def test_slurm(grid: Path, uncounted: None, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    submitit = pytest.importorskip("submitit")
    from submitit.core.job_environment import SignalHandler

    change(grid, GIVEN, f"{TRAINED}\nseeds = [9]")
    flags = ["--grid", grid, "--datadir", "data", "--output-dir", tmp_path / "runs"]
    flags += ["--only", "taught", "--slurm", "partition=gpu,time=24:00:00"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.call(monkeypatch, table, *flags) == 2
    assert "Slurm is not here" in capsys.readouterr().err
    sbatch = f"/bin/cat $1 >> {tmp_path}/scripts; echo Submitted batch job $$"
    for name, lines in (("srun", ""), ("sbatch", sbatch)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o700)
    assert runs.call(monkeypatch, table, *flags) == 0
    submitted = [line.split(": job ") for line in capsys.readouterr().out.splitlines()[:3]]
    assert [name for name, _ in submitted] == ["teacher-seed9", "taught-seed0", "taught-seed1"]
    scripts = (tmp_path / "scripts").read_text()
    for option in ("partition=gpu", "time=24:00:00", "gpus-per-node=1"):
        assert scripts.count(f"#SBATCH --{option}\n") == 3
    assert scripts.count(f"#SBATCH --dependency=afterok:{submitted[0][1]}\n") == 2
    # Near its limit, or preempted, a job is put into the queue again.
    (pickled,) = (tmp_path / "runs" / "slurm").glob(f"{submitted[0][1]}_*.pkl")
    delayed = submitit.helpers.DelayedSubmission.load(pickled)
    monkeypatch.setattr(delayed.function, "checkpoint", lambda: delayed)
    environment = Mock(global_rank=0)
    handler = SignalHandler(environment, Mock(submitted_pickle=pickled), delayed)
    with pytest.raises(SystemExit):
        handler.checkpoint_and_try_requeue(signal.SIGUSR2)
    assert environment._requeue.called


def test_a_job_of_the_cluster(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    with pytest.raises(RuntimeError, match="out of luck"):
        ClusterJob(job(tmp_path, "bad", "sys.exit('out of luck')"))()
    stopped = ClusterJob(job(tmp_path, "a", SAVING + "open('begun', 'w'); time.sleep(60)"))
    stopped.running = jobs.start(stopped.job, {})
    while not (tmp_path / "a" / "begun").exists():
        time.sleep(0.05)
    assert isinstance(stopped.checkpoint(), submitit.helpers.DelayedSubmission)
    assert (tmp_path / "a" / "saved").exists() and not stopped.job.is_done
    again = job(tmp_path, "a")
    ClusterJob(again)()
    assert again.is_done
