"""Live plots against a real visdom server, and a training that doesn't care when there is none."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.test_training import SMALL

visdom = pytest.importorskip("visdom")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[int]:
    """visdom without the web assets that its usual start downloads."""
    port = free_port()
    start = (
        "from visdom.server.run_server import start_server\n"
        f"start_server(port={port}, hostname='127.0.0.1', base_url='', env_path={str(tmp_path)!r}, bind_local=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(100):
        time.sleep(0.1)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
    yield port
    process.kill()
    process.wait()


def test_windows_on_a_real_server(server: int, command: Command, scenes: Path, tmp_path: Path) -> None:
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


def test_training_goes_on_without_a_server(command: Command, scenes: Path, tmp_path: Path) -> None:
    flags = ("--datadir", scenes, "--output-dir", tmp_path / "run", "--max-steps", 2, *SMALL)
    done = command("train/student.py", *flags, "--visualize", "--port", free_port())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warning: no visdom server") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "run" / "student.safetensors").exists()


def test_tensorboard_files_are_read_back(command: Command, scenes: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [f for f in SMALL if f != "--no-tensorboard"]
    done = command("train/student.py", "--datadir", scenes, "--output-dir", tmp_path, "--max-steps", 3, *flags)
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(os.fspath(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/ce")] == [1, 2, 3]
    assert [e.step for e in events.Scalars("mIoU/val")] == [3]
    assert {"input", "prediction", "target"} <= set(events.Tags()["images"])
