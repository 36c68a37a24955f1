"""The table runner: grids that are read, runs that are planned, stopped, gone on with and failed, and the table."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import cli
from datasets.synthetic import write_dataset
from errors import UserError
from models import create_model, save_model
from train import table
from train.grid import (
    GRIDS,
    Job,
    Row,
    digest,
    plan,
    read_grid,
    seeds_on_disk,
    split_facts,
    with_teacher,
    words,
)
from train.options import ROOT
from train.runner import Runner, Running, slots
from train.table import Spread, Table, chosen, results, size_of

GRID = """
seeds = [0, 1]
[options]
height = 64
batch-size = 2
num-workers = 0
steps-loss = 1
tensorboard = false
device = "cpu"
max-steps = 1
[presets.slow]
lr = 1e-5
[evaluation]
script = "eval/eval_cityscapes_iou.py"
options = { height = 64, num-workers = 0, device = "cpu" }
[[rows]]
name = "teacher"
weights = "TEACHER"
[[rows]]
name = "student"
label = "student alone"
script = "train/student.py"
published = 55.86
[[rows]]
name = "TransKDBase"
script = "train/TransKDBase.py"
options = { teacher-model = "segformer_b0", embed-weights = [0.1, 0.1, 0.5, 1] }
teacher = "teacher"
baseline = "student"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small grid, and the weights that it takes for a teacher."""
    folder = tmp_path_factory.mktemp("table")
    save_model(create_model("segformer_b0"), folder / "teacher.safetensors")
    (folder / "grid.toml").write_text(GRID.replace("TEACHER", str(folder / "teacher.safetensors")))
    return folder


def planned(folder: Path, **changes: str) -> list[Job]:
    """The grid's jobs, with parts of its text changed."""
    text = (folder / "grid.toml").read_text()
    for before, after in changes.values():
        assert before in text
        text = text.replace(before, after)
    (folder / "changed.toml").write_text(text)
    return plan(read_grid(folder / "changed.toml"), folder / "data", folder / "runs")


def call_table(monkeypatch: pytest.MonkeyPatch, *flags: object) -> int:
    """The command's exit code."""
    monkeypatch.setattr(sys, "argv", ["table.py", *map(str, flags)])
    try:
        cli.run(table.main, table.Options)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# --- grids


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.toml")), ids=lambda path: path.stem)
def test_grids_of_the_project(path: Path) -> None:
    """Every row's command is one that its script takes, and the paper's rows have the paper's sizes."""
    jobs = plan(replace(read_grid(path), seeds=(0,)), Path(), Path("runs"))
    assert all(job.options is not None and job.options.seed == job.seed for job in jobs)
    published = {
        "SegFormer-B2": ["27.36", "113.84"],
        "student alone, SegFormer-B0": ["3.72", "13.67"],
        "TransKD-Base": ["3.72 (4.56)", "13.67 (16.47)"],
        "TransKD-GL": ["3.72 (5.22)", "13.67 (16.80)"],
        "TransKD-EA": ["3.72 (5.53)", "13.67 (17.84)"],
    }
    for job in jobs if path.stem == "cityscapes" else ():
        assert size_of(job).texts() == published[job.row.label.removeprefix("teacher, ")]
    for job in (
        job for job in jobs if job.row.name == "cwd"
    ):  # a 1×1 convolution, 256 to 512 channels on 16×32 pixels
        assert size_of(job).texts() == ["3.72 (3.85)", "13.67 (13.74)"]


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("published", "publisched", "row 2 (student): unknown key publisched"),
        (
            "published = 55.86",
            'published = "much"',
            "row 2 (student): published is 'much'; it must be a number",
        ),
        ("[0, 1]", "[0, 0]", "seeds is [0, 0]"),
        ("max-steps = 1", "seed = 1", "row 2 (student): seed is given by the table"),
        ('name = "TransKDBase"', 'name = "student"', "its name 'student' must be"),
        (
            'teacher = "teacher"',
            'teacher = "nobody"',
            "its teacher 'nobody' must be one of the rows above",
        ),
        ('teacher = "teacher"', 'presets = ["fast"]', "there is no [presets.fast]"),
        ('baseline = "student"', 'baseline = "nobody"', "its baseline 'nobody' is no row"),
        ('script = "train/student.py"', "", "row 2 (student): it needs either a script or weights"),
        ("train/student.py", "train/pupil.py", "row student: there is no script train/pupil.py"),
        ("train/student.py", "train/engine.py", "row student: train/engine.py trains nothing"),
        ("max-steps", "max-stepps", "row student: unrecognized options"),
        ("max-steps = 1", "max-steps = 1\nlr = -1", "row student: --lr is -1"),
        ("options = { height = 64,", "options = { hight = 64,", "evaluation: unrecognized options"),
        (
            'name = "teacher"',
            'name = "teacher"\nteacher = "x"',
            "row 1 (teacher): unknown key teacher",
        ),
        (
            'name = "teacher"',
            'name = "teacher"\npresets = ["slow"]',
            "row 1 (teacher): unknown key presets",
        ),
        (
            "options = { height = 64,",
            'options = { json = "x", height = 64,',
            "evaluation: json is given by the table",
        ),
        ("[[rows]]", "[[rows]", "is no TOML that can be read"),
        ("[0, 1]", "[0, -1]", "row student: seed -1 is out of range"),
        ("[options]", "[options]\nhelp = true", "row student: an option asks for help"),
        (
            'teacher = "teacher"',
            'presets = [["slow"]]',
            "row 3 (TransKDBase): there is no [presets.['slow']]",
        ),
        (
            "train/student.py",
            f"../{ROOT.name}/train/student.py",
            "row student: there is no script ../",
        ),
        ('name = "teacher"', 'name = "data"', "row 1: its name 'data' must be"),
        ('name = "teacher"', 'name = ".."', "row 1: its name '..' must be"),
        ('name = "teacher"', 'name = "student-seed0"', "row 1: its name 'student-seed0' must"),
        ('weights = "', f'weights = "{ROOT / "README.md"}" # "', "row teacher: "),
        (
            "cityscapes_iou.py",
            "cityscapes_color.py",
            "evaluation: script is 'eval/eval_cityscapes_color.py'",
        ),
        ("eval_cityscapes_iou.py", "eval_iou.py", "evaluation: eval/eval_iou.py needs a dataset"),
        (
            "cityscapes_iou.py",
            "ACDC_iou.py",
            "row student: it is trained on cityscapes; eval/eval_ACDC_iou.py",
        ),
    ],
)
def test_a_mistake_in_a_grid_is_one_line(
    before: str,
    after: str,
    says: str,
    folder: Path,
    scenes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """It names the row, ends in exit code 2, and nothing is written."""
    (tmp_path / "grid.toml").write_text((folder / "grid.toml").read_text().replace(before, after))
    flags = [
        "--grid",
        tmp_path / "grid.toml",
        "--datadir",
        scenes,
        "--output-dir",
        tmp_path / "runs",
    ]
    code, (out, err) = call_table(monkeypatch, *flags), capsys.readouterr()
    (line,) = err.splitlines()
    assert code == 2 and line.startswith("error: ") and says in line and not out
    assert not (tmp_path / "runs").exists()


def test_any_data_set_can_be_evaluated(folder: Path) -> None:
    """Your own too: by the script that takes its name."""
    named = planned(
        folder,
        script=("eval_cityscapes_iou.py", "eval_iou.py"),
        dataset=(
            "options = { height = 64, num",
            'options = { dataset = "cityscapes", height = 64, num',
        ),
    )
    assert [job.dataset for job in named] == [job.dataset for job in planned(folder)]
    assert all(job.evaluation[1:3] == ["--dataset", "cityscapes"] for job in named)


def test_words() -> None:
    flags = {"lr": 6e-5, "flip": False, "embed_weights": [0.1, 1], "max_steps": 3, "compile": True}
    line = "--lr 6e-05 --no-flip --embed-weights 0.1 1 --max-steps 3 --compile"
    assert words(flags) == line.split()


def test_teachers(folder: Path, teacher_weights: Path) -> None:
    """A teacher of the same seed, or the only one; given weights take the teacher's place."""
    script = 'script = "train/teacher.py"\noptions = { from-scratch = true }'
    weights = f'weights = "{folder / "teacher.safetensors"}"'
    own = planned(folder, teacher=(weights, script))
    assert [(j.seed, j.teacher.seed) for j in own if j.teacher] == [(0, 0), (1, 1)]
    one = planned(folder, teacher=(weights, f"{script}\nseeds = [7]"))
    assert [(j.seed, j.teacher.seed) for j in one if j.teacher] == [(0, 7), (1, 7)]
    with pytest.raises(UserError, match="has no seed 0"):
        planned(folder, teacher=(weights, f"{script}\nseeds = [7, 8]"))
    grid = with_teacher(read_grid(folder / "changed.toml"), folder / "teacher.safetensors")
    (job,) = {j.teacher for j in plan(grid, folder, folder / "runs") if j.teacher}
    assert job.weights == folder / "teacher.safetensors" and not job.training
    public = folder / "public"  # a folder, as Hugging Face's
    public.mkdir()
    shutil.copy(folder / "teacher.safetensors", public / "model.safetensors")
    (job,) = {
        j.teacher for j in plan(with_teacher(grid, public), folder, folder / "runs") if j.teacher
    }
    assert job.weights == public and job.source() == {
        "weights": digest(folder / "teacher.safetensors")
    }
    assert [str(j) for j in chosen(one, ["TransKDBase"], [1])] == [
        "TransKDBase seed 1",
        "teacher seed 7",
    ]
    with pytest.raises(UserError, match="no row is called 'nobody'"):
        chosen(one, ["nobody"], [0])
    with pytest.raises(UserError, match=r"holds segformer_b2, .* \(teacher is segformer_b0\)"):
        with_teacher(grid, teacher_weights)
    grid = with_teacher(
        read_grid(Path("architectures")), teacher_weights
    )  # which has a PVTv2-B2 for a teacher too
    assert [name for name, row in grid.rows.items() if row.weights] == ["teacher"]


def test_what_a_folder_tells(folder: Path) -> None:
    """New, begun, trained, finished; a change that would need another training is refused."""

    def write(split: str, count: int) -> None:
        for name in ("leftImg8bit", "gtFine"):
            path = folder / "data" / name / split / "a" / f"{count}_{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(path.name.replace("gtFine.", "gtFine_labelIds.")).touch()
        split_facts.cache_clear()

    write("train", 1)
    write("val", 1)
    job = next(j for j in planned(folder) if str(j) == "student seed 0")
    assert job.standing() == "new" and job.commands("new") == [job.training, job.evaluation]
    job.folder.mkdir(parents=True)
    assert job.options is not None
    split = split_facts("cityscapes", folder / "data", "train")
    assert split is not None
    saved = job.options.as_json() | {"data": split.identity}
    (job.folder / "options.json").write_text(json.dumps(saved))
    (job.folder / "metrics.jsonl").write_text(
        '{"event": "train", "epoch": 1, "step": 1}\n{"event": "val", "ep'
    )
    (job.folder / "last.pt").touch()
    assert job.standing() == "begun" and job.commands("begun")[0] == [*job.training, "--resume"]
    job.weights.touch()
    with (job.folder / "metrics.jsonl").open("a") as file:  # taken up again after its last epoch
        file.write('\n{"event": "start", "epoch": 501, "step": 1}\n')
    job.record(evaluated=False)
    assert job.standing() == "trained" and job.commands("trained") == [job.evaluation]
    (job.folder / "eval.json").write_text('{"mean_iou": 0.5}')
    job.record(evaluated=True)
    assert (
        job.standing() == "finished"
        and not job.commands("finished")
        and job.score() == {"mean_iou": 0.5}
    )
    write("val", 2)
    assert job.standing() == "trained"
    job.record(evaluated=True)
    (job.folder / "eval.json").write_text('{"mean_iou": null}')
    assert job.standing() == "trained"
    (job.folder / "eval.json").write_text('{"mean_iou": 0.5}')
    (job.folder / "last.pt").unlink()  # to make room
    assert job.standing() == "finished"

    def changed(before: str, after: str) -> Job:
        return next(
            j for j in planned(folder, change=(before, after)) if str(j) == "student seed 0"
        )

    assert changed("options = { height = 64", "options = { height = 96").standing() == "trained"
    assert changed("num-workers = 0", "num-workers = 1").standing() == "finished"
    (job.folder / "last.pt").touch()
    assert changed("max-steps = 1", "max-steps = 2").standing() == "begun"
    (job.folder / "metrics.jsonl").write_text('{"event": "train", "epoch": 1, "step": 3}\n')
    other = changed("max-steps = 1", "max-steps = 2")
    with pytest.raises(
        UserError,
        match=r"student seed 0 was trained for 3 steps instead of 2: remove .*student-seed0",
    ):
        other.standing()
    (job.folder / "options.json").write_text(json.dumps(saved | {"keep_steps": True}))
    kept = "max-steps = 9\nkeep-steps = true\nnum-epochs = "
    assert changed("max-steps = 1", f"{kept}3").standing() == "begun"
    with pytest.raises(
        UserError, match="student seed 0 was trained for 3 steps instead of 2: remove"
    ):
        changed("max-steps = 1", f"{kept}2").standing()
    (job.folder / "options.json").write_text(json.dumps(saved))
    other = changed("batch-size = 2", "batch-size = 4")
    with pytest.raises(UserError, match=r"with batch_size 2 instead of 4: remove .*student-seed0"):
        other.standing()
    assert (
        other.score() is None
    )  # a table never shows a figure under flags that it was not made with
    assert seeds_on_disk(read_grid(folder / "grid.toml"), folder / "runs") == {0}
    (job.folder / "options.json").write_text(json.dumps(saved | {"schedule": "step"}))
    with pytest.raises(
        UserError, match="student seed 0 was trained with max_steps 1 instead of 2: remove"
    ):
        changed("max-steps = 1", 'max-steps = 2\nschedule = "step"').standing()
    (job.folder / "options.json").unlink()
    with pytest.raises(
        UserError, match=r"student seed 0 was trained with options that nobody knows, options\.json"
    ):
        job.standing()
    (job.folder / "options.json").write_text(json.dumps(saved))
    write("train", 2)
    with pytest.raises(
        UserError, match=r"student seed 0 was trained on other data than .* holds now: remove"
    ):
        job.standing()
    for content in ("{}", "[]"):
        (job.folder / "done.json").write_text(content)
        with pytest.raises(UserError, match=r"student-seed0/done\.json"):
            job.standing()


def test_folders_that_are_none(
    folder: Path,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A grid's name is looked for among the project's, a path is not; a table's folder must be one."""
    with pytest.raises(UserError, match=r"no grid at nowhere/drawn\.toml"):
        read_grid(Path("nowhere/drawn.toml"))
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "runs"):
        flags = ["--grid", folder / "grid.toml", "--datadir", scenes, "--output-dir", output]
        assert call_table(monkeypatch, *flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: can't write to {output} (")


def test_other_scenes(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A table that is finished is none of other scenes than those that were drawn for it."""
    text = (folder / "grid.toml").read_text().partition('[[rows]]\nname = "student"')[0]
    grid, output = tmp_path / "grid.toml", tmp_path / "runs"
    grid.write_text(f"{text}[scenes]\ntrain = 1\nval = 1\nheight = 64\nwidth = 128\n")
    write_dataset(output / "data", train=1, val=1, height=64, width=128)
    (job,) = plan(read_grid(grid), output / "data", output)
    job.folder.mkdir()
    (job.folder / "eval.json").write_text('{"mean_iou": 0.5}')
    job.record(evaluated=True)
    assert call_table(monkeypatch, "--grid", grid, "--output-dir", output) == 0
    assert "| teacher | 50.00 |" in (output / "table.md").read_text()
    grid.write_text(grid.read_text().replace("val = 1", "val = 2"))
    assert call_table(monkeypatch, "--grid", grid, "--output-dir", output) == 2
    assert "data holds something else than this data set" in capsys.readouterr().err


# --- running


def fake(
    folder: Path,
    name: str,
    seed: int = 0,
    *,
    code: str = "",
    teacher: Job | None = None,
    miou: float | str = 0.5,
) -> Job:
    """A job whose training is a line of Python, and whose evaluation writes a figure."""
    run = folder / f"{name}-seed{seed}"
    evaluation = f"open({str(run / 'eval.json')!r}, 'w').write('{{\"mean_iou\": {miou}}}')"
    note = f"import os, sys, time; open({str(folder / 'order')!r}, 'a').write('{name}{seed} '); "
    weights = folder / "weights"
    weights.touch()
    return Job(
        row=Row(name=name, label=name, baseline="a"),
        seed=seed,
        folder=run,
        teacher=teacher,
        options=None,
        weights=weights,
        training=["-c", note + code],
        evaluation=["-c", evaluation],
        dataset="cityscapes",
        datadir=folder / "none",
        measure={"subset": "val", "protocol": "paper"},
    )


def test_one_failure_does_not_lose_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told with its log, its students don't start, the rest is run; what is done is not done again."""
    bad = fake(tmp_path, "bad", code="sys.exit('out of luck')")
    jobs = [
        bad,
        fake(tmp_path, "student", teacher=bad),
        fake(tmp_path, "a", miou=0.25),
        fake(tmp_path, "a", 1),
    ]
    jobs.append(unmeasured := fake(tmp_path, "b", miou="null"))
    jobs.append(
        killed := fake(tmp_path, "c", code="print('busy', flush=True); os.kill(os.getpid(), 9)")
    )
    jobs.append(full := fake(tmp_path, "d"))
    full.log.mkdir(parents=True)
    calls = []
    runner = Runner(jobs, [{}], calls.append)
    runner.run()
    assert (tmp_path / "order").read_text() == "bad0 a0 a1 b0 c0 "
    assert {str(job): why for job, why in runner.failed.items()} == {
        "bad": f"out of luck (exit code 1, {bad.log})",
        "student": "its teacher bad failed",
        "b": f"its evaluation wrote no mean IoU ({unmeasured.log})",
        "c": f"busy (Killed, {killed.log})",
        "d": f"it can't be started ([Errno 21] Is a directory: '{full.log}')",
    }
    assert len(calls) == 7
    rows = {row.job.row.name: row for row in results(jobs, runner.failed)}
    assert rows["a"].miou == {0: 25.0, 1: 50.0} and rows["bad"].failed == {0: runner.failed[bad]}
    assert not Runner(jobs[2:4], [{}], calls.append).waiting
    again = Runner(jobs, [{}], calls.append)
    assert again.waiting == [*jobs[:2], unmeasured, killed, full]


def test_how_far_a_training_is(tmp_path: Path) -> None:
    """It is told by its own records: those of the process before it stay in front of them."""

    def write(*records: tuple[str, int, int]) -> None:
        lines = [
            {"event": event, "step": step, "time": t, "total_steps": 100 * t}
            for event, step, t in records
        ]
        (job.folder / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )

    job, process = fake(tmp_path, "a"), SimpleNamespace(poll=lambda: None)
    job.folder.mkdir()
    started = time.monotonic() - 1000  # most of which went into a cache
    one = Running(job=job, slot={}, process=process, training=True, since=1.5, started=started)  # type: ignore[arg-type]
    one.look()
    assert str(one) == "a: starting"
    before = [("start", 0, 1), *(("train", step, 1) for step in range(1, 80))]
    write(*before)
    one.look()
    assert str(one) == "a: starting" and one.estimate() is None
    write(
        *before[:61], begin := ("start", 60, 2)
    )  # what was logged after the checkpoint is dropped
    one.look()
    assert str(one) == "a: step 60/200" and one.estimate() is None
    one.started -= 10
    write(
        *before[:61], begin, *(("train", 80, 2) for _ in range(2000))
    )  # its first record is out of sight
    one.look()
    assert str(one) == "a: step 80/200"
    assert one.estimate() == pytest.approx((60.0, 100.0), rel=0.05)
    runner = Runner([job, fake(tmp_path, "b")], [{}], lambda failed: None)
    runner.waiting.remove(job)
    runner.running.append(one)
    assert runner.summary() == "0 of 2 runs done, about 3 min left"  # 60 s, and 100 s of the other


def test_what_a_new_teacher_taught_is_due(tmp_path: Path) -> None:
    """Also where the student's seed, and so its place, comes before the teacher's."""
    first = fake(tmp_path, "first")
    teacher = fake(tmp_path, "teacher", 7, teacher=first)
    student = fake(tmp_path, "student", teacher=teacher)
    jobs = [student, first, teacher]
    for job in (student, teacher):
        job.folder.mkdir()
        (job.folder / "eval.json").write_text('{"mean_iou": 0.5}')
        job.record(evaluated=True)
    assert Runner(jobs, [{}], lambda failed: None).waiting == jobs
    runner = Runner(jobs, [{}], lambda failed: None)
    runner.run()
    assert not runner.failed and (tmp_path / "order").read_text() == "first0 "


def test_a_training_that_outlived_its_table_is_waited_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It holds its folder's lock: nothing is started before it ends, and its run goes on."""
    job = fake(tmp_path, "a", code=f"assert os.path.exists({str(tmp_path / 'ended')!r})")
    job.folder.mkdir()
    holder = (
        f"import fcntl, pathlib, time; lock = open({str(job.folder / 'lock')!r}, 'w'); "
        "fcntl.lockf(lock, fcntl.LOCK_EX); print('held', flush=True); time.sleep(1); "
        f"pathlib.Path({str(tmp_path / 'ended')!r}).touch()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert job.locked
        runner = Runner([job], [{}], lambda failed: None)
        runner.run()
    assert not runner.failed and job.score() is not None and not job.locked
    assert capfd.readouterr().err.count("a: still running") == 1


def test_teachers_first_and_a_device_for_each(tmp_path: Path) -> None:
    """Two at a time; a student starts when its teacher is done, though it stands before others in the queue."""
    devices = tmp_path / "devices"
    note = f"open({str(devices)!r}, 'a').write(os.environ['CUDA_VISIBLE_DEVICES'] + ' '); time.sleep(0.7)"
    teacher = fake(tmp_path, "teacher", code=note)
    jobs = [teacher, fake(tmp_path, "student", teacher=teacher), fake(tmp_path, "other", code=note)]
    started = time.monotonic()
    Runner(jobs, slots("3,5", 1), lambda failed: None).run()
    assert time.monotonic() - started < 60
    order = (tmp_path / "order").read_text().split()
    assert set(order[:2]) == {"teacher0", "other0"} and order[2] == "student0"
    assert set(devices.read_text().split()) == {"3", "5"}


def test_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert slots("", 1) == [{}]
    assert slots("", 3) == 3 * [{"OMP_NUM_THREADS": "2"}]
    assert slots("0, 1", 1) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert slots("", 2) == [{}, {}]
    for gpus, jobs in (("0,0", 1), ("0,", 1), ("0", 2), ("", 0), ("", 1000)):
        with pytest.raises(UserError):
            slots(gpus, jobs)


def test_spread() -> None:
    assert Spread.of([]) is None
    assert Spread.of([3.0]) == Spread(3.0, None, 1)
    values = [26.9, 27.6, 27.0]
    spread = Spread.of(values)
    assert (
        spread is not None
        and spread.text() == "27.17 ± 0.38"
        and spread.text("+") == "+27.17 ± 0.38"
    )


def test_the_table(folder: Path, tmp_path: Path) -> None:
    """A gain is over the same seed's baseline; a data set with conditions has a table of its own for them."""
    jobs = plan(read_grid(folder / "grid.toml"), folder / "none", tmp_path)
    scores = {
        "student seed 0": 0.10,
        "student seed 1": 0.30,
        "TransKDBase seed 1": 0.35,
        "teacher": 0.5,
    }
    for job in jobs:
        job.folder.mkdir(exist_ok=True)
        if (score := scores.get(str(job))) is not None:
            if job.options is not None:
                job.weights.touch()
                (job.folder / "options.json").write_text(json.dumps(job.options.as_json()))
            (job.folder / "metrics.jsonl").write_text('{"event": "val", "epoch": 1, "step": 1}\n')
            evaluation = {
                "mean_iou": score,
                "conditions": {"fog": {"mean_iou": score / 2}, "rain": {"mean_iou": None}},
            }
            (job.folder / "eval.json").write_text(json.dumps(evaluation))
            job.record(evaluated=True)
    failed = {job: "out of memory" for job in jobs if str(job) == "TransKDBase seed 0"}
    (tmp_path / "student-seed1" / "metrics.jsonl").unlink()  # which loses how many steps it took
    Table(read_grid(folder / "grid.toml"), jobs, tmp_path).write(failed)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[4:7] == [
        "| teacher | 50.00 | 1 | – | – | 3.72 | 13.67 | – |",
        "| student alone | 20.00 ± 14.14 | 2 | – | 55.86 | 3.72 | 13.67 | 1 |",
        "| TransKDBase | 35.00 | 1 of 2, 1 failed | +5.00 | – | 3.72 (4.17) | 13.67 (15.14) | 1 |",
    ]
    assert lines[8] == "| mIoU, % | fog |"
    assert lines[10:13] == [
        "| teacher | 25.00 |",
        "| student alone | 10.00 ± 7.07 |",
        "| TransKDBase | 17.50 |",
    ]
    assert "TransKDBase seed 0 failed: out of memory" in lines


@pytest.mark.slow
def test_a_table(
    folder: Path,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped by a signal in its first training, gone on with from there, and done: the figures are the runs' own."""
    output, grid = tmp_path / "runs", tmp_path / "grid.toml"
    teacher = folder / "teacher.safetensors"
    text = GRID.replace('teacher = "teacher"', "").replace(
        "{ teacher-m", f'{{ teacher-weights = "{teacher}", teacher-m'
    )
    text = text.replace('[[rows]]\nname = "teacher"\nweights = "TEACHER"\n', "")
    student, metrics = output / "student-seed0", output / "student-seed0" / "metrics.jsonl"

    def call(*flags: str) -> tuple[str, int]:
        common = ["--grid", grid, "--datadir", scenes, "--output-dir", output]
        code = call_table(monkeypatch, *common, *flags)
        return capsys.readouterr().out, code

    def steps() -> list[int]:
        records = map(json.loads, metrics.read_text().splitlines())
        return [record["step"] for record in records if record["event"] == "train"]

    def stop() -> None:
        while not (metrics.exists() and '"train"' in metrics.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    grid.write_text(text.replace("max-steps = 1", "max-steps = 400"))
    threading.Thread(target=stop, daemon=True).start()
    assert call("--only", "student", "--seeds", "0")[1] == 143
    assert (student / "last.pt").exists() and not (student / "done.json").exists()
    last = steps()[-1]
    assert f"interrupted at step {last}" in (student / "log.txt").read_text()

    grid.write_text(text.replace("max-steps = 1", f"max-steps = {last + 1}"))
    shown, code = call()
    assert code == 0 and "--resume" in (student / "log.txt").read_text()
    assert steps() == list(range(1, last + 2))

    def mious(row: str) -> list[float]:
        return [
            100 * json.loads((output / f"{row}-seed{k}" / "eval.json").read_text())["mean_iou"]
            for k in (0, 1)
        ]

    alone, distilled = mious("student"), mious("TransKDBase")
    gains = [b - a for a, b in zip(alone, distilled, strict=True)]
    markdown = (output / "table.md").read_text()
    (line,) = (line for line in markdown.splitlines() if "TransKDBase" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert (
        cells[1] == f"{statistics.mean(distilled):.2f} ± {statistics.stdev(distilled):.2f}"
        and cells[2] == "2"
    )
    assert cells[3] == f"{statistics.mean(gains):+.2f} ± {statistics.stdev(gains):.2f}"
    assert (
        cells[5].startswith("3.72 (")
        and cells[6].startswith("13.67 (")
        and cells[7] == f"{last + 1}"
    )
    assert "| student alone |" in markdown and "| 55.86 |" in markdown and cells[1][:5] in shown
    written = {row["row"]: row for row in json.loads((output / "table.json").read_text())["rows"]}
    expected = {"mean": statistics.mean(alone), "sd": statistics.stdev(alone), "n": 2}
    assert written["student"]["miou"] == pytest.approx(expected)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is left to be run")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert call() == (shown, 0)
