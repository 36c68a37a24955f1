"""Live plots against a real visdom server, and a training that doesn't care when there is none."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from errors import UserError
from tests.conftest import Command, free_port
from tests.test_training import SMALL
from train import dashboard
from train.tracking import Tracker

visdom = pytest.importorskip("visdom")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[int]:
    """visdom without the web assets that its usual start downloads."""
    port = free_port()
    start = (
        "from visdom.server.run_server import start_server\n"
        f"start_server(port={port}, hostname='127.0.0.1', base_url='', env_path={str(tmp_path)!r}, bind_local=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(100):
        time.sleep(0.1)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
    yield port
    process.kill()
    process.wait()


def test_windows_on_a_real_server(
    server: int, command: Command, scenes: Path, tmp_path: Path
) -> None:
    flags = ("--datadir", scenes, "--output-dir", tmp_path / "run", "--max-steps", 3, *SMALL)
    done = command("train/student.py", *flags, "--visualize", "--port", server)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout + done.stderr

    client = visdom.Visdom("http://127.0.0.1", port=server, env="run", use_incoming_socket=False)

    def window(name: str) -> dict:
        return json.loads(client.get_window_data(name))

    losses = window("losses")["content"]["data"]
    assert {line["name"] for line in losses} == {"ce", "total"} and losses[0]["x"] == [1, 2, 3]
    assert window("mIoU")["content"]["data"][0]["x"] == [3]
    assert all(window(name)["type"] == "image" for name in ("input", "prediction", "target"))


def test_training_goes_on_without_dashboards(
    command: Command, scenes: Path, tmp_path: Path
) -> None:
    """No visdom server, and a file where TensorBoard wants its folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").touch()
    flags = ["--datadir", scenes, "--output-dir", tmp_path / "run", "--max-steps", 2, *SMALL]
    flags.remove("--no-tensorboard")
    done = command("train/student.py", *flags, "--visualize", "--port", free_port())
    assert done.returncode == 0, done.stderr
    for warning in (
        "warning: no visdom server answers",
        "warning: can't write TensorBoard's files",
    ):
        assert done.stderr.count(warning) == 1
    assert "warning" not in done.stdout and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "student.safetensors").exists()


def test_a_server_that_never_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dashboard, "SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        shown = dashboard.Dashboard("run", silent.getsockname()[1])
        shown.curve("losses", "ce", 1, 2.0)
        assert time.monotonic() - started < 5
    printed = capsys.readouterr()
    assert printed.err.count("warning: no visdom server answers") == 1 and not printed.out


def test_a_full_disk_ends_tensorboard_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    writer = dashboard.tensorboard_writer(tmp_path, 1)
    writer.add_scalar("lr", 1.0, 1)
    writer.flush()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", fail)
    monkeypatch.setattr(
        threading, "excepthook", lambda _: None
    )  # TensorBoard's thread shows its traceback
    for step in range(2, 6):
        writer.add_scalar("lr", 1.0, step)
        writer.flush()
    writer.close()
    warning = f"warning: can't write TensorBoard's files to {tmp_path} (No space left on device)"
    assert capsys.readouterr().err.count(warning) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_record_that_cannot_be_written_is_told() -> None:
    tracker = Tracker.__new__(Tracker)
    tracker.step = 1
    with (
        Path("/dev/full").open("ab", buffering=0) as tracker.file,
        pytest.raises(UserError, match="No space left"),
    ):
        tracker.record("train", 1)


def test_tensorboard_files_are_read_back(command: Command, scenes: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [f for f in SMALL if f != "--no-tensorboard"]
    done = command(
        "train/student.py", "--datadir", scenes, "--output-dir", tmp_path, "--max-steps", 3, *flags
    )
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(os.fspath(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/ce")] == [1, 2, 3]
    assert [e.step for e in events.Scalars("mIoU/val")] == [3]
    assert {"input", "prediction", "target"} <= set(events.Tags()["images"])
