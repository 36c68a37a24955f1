"""What a training shows and logs, against visdom's own server too; dashboards never end it."""

import errno
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from errors import UserError
from tests import runs
from tests.conftest import free_port
from tests.runs import Small
from train import student
from train.logger import Logger

PICTURES = {"input", "prediction", "target"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[int]:
    """visdom without the web assets that its usual start downloads."""
    pytest.importorskip("visdom")
    port = free_port()
    start = f"start_server({port}, '127.0.0.1', '', env_path={str(tmp_path)!r}, bind_local=True)"
    command = [sys.executable, "-c", f"from visdom.server.run_server import start_server; {start}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield port
    process.kill()
    process.wait()


def test_windows_on_a_real_server(
    server: int, small: Small, caplog: pytest.LogCaptureFixture
) -> None:
    import visdom

    small.train(student, "run", max_steps=3, visualize=True, port=server)
    assert not caplog.records
    client = visdom.Visdom("http://127.0.0.1", port=server, env="run", use_incoming_socket=False)
    windows = json.loads(client.get_window_data())
    shown = {window["title"]: window for window in windows.values()}
    losses = {line["name"]: line["x"] for line in shown["loss"]["content"]["data"]}
    assert losses == {"ce": [1, 2, 3], "total": [1, 2, 3], "val": [3]}
    assert shown["mIoU"]["content"]["data"][0]["x"] == [3]
    assert {name for name in shown if shown[name]["type"] == "image"} == PICTURES


def test_tensorboard_files_are_read_back(small: Small) -> None:
    """After `--resume` no step is there twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (2, 3):
        small.train(student, max_steps=steps, resume="auto", tensorboard=True)
    events = EventAccumulator(str(small.folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/ce")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("loss/val")] == [2, 3]
    drawn = [event.value for event in events.Scalars("mIoU/val")]
    assert drawn == pytest.approx([record["mean_iou"] for record in small.records("val")])
    assert set(events.Tags()["images"]) >= PICTURES


def test_wandb_offline(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    small.train(student, max_steps=2, wandb="project")
    wandb.finish()
    wandb.tensorboard.unpatch()
    assert list((small.folder / "wandb").glob("offline-run-*"))


def test_training_goes_on_without_dashboards(
    small: Small, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No visdom server, and a file where TensorBoard wants its folder; later a full disk."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    pytest.importorskip("visdom")
    (small.folder / "tensorboard").touch()
    small.train(student, max_steps=2, tensorboard=True, visualize=True, port=free_port())
    first, second = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(r"TensorBoard fails \(.+\); training goes on without it", first)
    assert re.match(r"the visdom server on port \d+ fails \(ConnectionError\)", second)
    assert (small.folder / "student.safetensors").exists()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    caplog.clear()
    monkeypatch.setattr(RecordWriter, "write", fail)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # of TensorBoard's thread
    small.train(student, "full", max_steps=8, tensorboard=True)
    assert len(small.steps("full")) == 8
    (record,) = caplog.records
    assert "TensorBoard fails (No space left on device)" in record.getMessage()


def test_a_server_that_never_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Visdom's requests have a limit, and after the first failure there is no second."""
    pytest.importorskip("visdom")
    limits: list[float] = []

    def post(*_: Any, timeout: float, **more: Any) -> None:
        limits.append(timeout)
        raise requests.Timeout

    monkeypatch.setattr(requests.Session, "post", post)
    logger = Logger(runs.options_of(student, Path(), tmp_path, visualize=True), [], 9, 0)
    for _ in range(3):
        logger.validated(1, {"mean_iou": 0.5})
    assert len(limits) == len(caplog.records) == 1 and limits[0] <= 10


def test_visdom_that_is_not_installed(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before anything is begun."""
    monkeypatch.setitem(sys.modules, "visdom", None)
    small.refused("visdom is not installed; pip .*README.md", student, "run", visualize=True)
    assert not list(small.folder.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_record_that_cannot_be_written(tmp_path: Path) -> None:
    logger = Logger(runs.options_of(student, Path(), tmp_path), [], 9, 0)
    logger.path = Path("/dev/full")
    with pytest.raises(UserError, match="No space left"):
        logger.record("train", 1)
