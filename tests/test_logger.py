"""What a training shows and logs, against visdom's own server too; dashboards never end it."""

import json
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import requests

from tests.conftest import free_port
from tests.runs import Small
from train import student

PICTURES = {"input", "prediction", "target"}


def test_windows_on_a_real_server(small: Small, tmp_path: Path, caplog: Any) -> None:
    visdom = pytest.importorskip("visdom")
    port = free_port()
    # Without the web assets that its usual start downloads.
    start = f"start_server({port}, '127.0.0.1', '', env_path={str(tmp_path)!r}, bind_local=True)"
    command = [sys.executable, "-c", f"from visdom.server.run_server import start_server; {start}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        small.train(student, "run", max_steps=3, visualize=True, port=port)
        assert not caplog.records
        quiet = {"port": port, "env": "run", "use_incoming_socket": False}
        windows = json.loads(visdom.Visdom("http://127.0.0.1", **quiet).get_window_data())
    finally:
        server.kill()
        server.wait()
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


def test_training_goes_on_without_dashboards(small: Small, monkeypatch: Any, caplog: Any) -> None:
    """A visdom server that never answers, and a file where TensorBoard wants its folder."""
    pytest.importorskip("visdom")
    post = Mock(side_effect=requests.Timeout)
    monkeypatch.setattr(requests.Session, "post", post)
    (small.folder / "tensorboard").touch()
    small.train(student, max_steps=2, tensorboard=True, visualize=True)
    first, second = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(r"TensorBoard fails \(.+\); training goes on without it", first)
    assert re.match(r"the visdom server on port \d+ fails \(ConnectionError", second)
    assert post.call_count == 1 and post.call_args.kwargs["timeout"] <= 10
    assert (small.folder / "student.safetensors").exists()
