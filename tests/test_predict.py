"""Predicting on any photographs: the same as evaluation's pictures, by every kind of weights."""

import re
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from datasets.classes import CITYSCAPES
from datasets.scenes import read_image
from errors import UserError
from eval.predict import Options, labels_at, main
from eval.video import UnreadableError, Video, writing_video
from models import SegFormer, create_model, save_model
from models.export import Options as ExportOptions
from models.export import main as export
from tests.conftest import Command
from tests.golden_data import seed

KINDS = ("color", "overlay", "label_ids", "side_by_side")


@pytest.fixture(scope="module")
def network() -> SegFormer:
    """Random weights, balanced so that many classes are predicted; "ignore" wins everywhere if it may."""
    model = seed(create_model("segformer_b0")).eval()
    with torch.no_grad():
        logits = model(torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))).logits
        model.linear_pred.bias -= logits.mean(dim=(0, 2, 3))
        model.linear_pred.bias[19] += 1e6
    return model


@pytest.fixture(scope="module")
def weights(network: SegFormer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "student.safetensors"
    save_model(network, path)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of one size and one upright, in a folder with a subfolder and something else in it."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name, size in (("a.png", (80, 150)), ("sub/b.JPG", (80, 150)), ("sub/c.png", (101, 75))):
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / name)
    (root / "notes.txt").write_text("no photograph")
    return root


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five frames of 80×150, 12.5 a second."""
    path, rng = tmp_path_factory.mktemp("videos") / "drive.mkv", np.random.default_rng(1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25, 2))
        stream.width, stream.height, stream.pix_fmt = 150, 80, "yuv420p"
        for _ in range(5):
            blocks = rng.integers(0, 256, (8, 15, 3), np.uint8).repeat(10, 0).repeat(10, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(blocks)))
        container.mux(stream.encode(None))
    return path


def frames(path: Path) -> list[Image.Image]:
    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def pictures(folder: Path) -> dict[str, Image.Image]:
    return {
        str(path.relative_to(folder)): Image.open(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def expected(network: SegFormer, photograph: Image.Image, height: int = 64) -> np.ndarray:
    """From the definition: resize, logits, upsample, the likeliest real class."""
    scale = height / min(photograph.size)
    size = (max(height, int(photograph.width * scale)), max(height, int(photograph.height * scale)))
    pixels = np.array(photograph.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    with torch.no_grad():
        logits = network(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255).logits[
            :, :19
        ]
    full = (photograph.height, photograph.width)
    return torch.nn.functional.interpolate(logits, full, mode="bilinear")[0].argmax(0).numpy()


def test_a_folder_by_command(
    network: SegFormer, weights: Path, photographs: Path, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    flags = (
        photographs,
        "--weights",
        weights,
        "--output-dir",
        out,
        "--height",
        64,
        "--kinds",
        *KINDS,
    )
    done = command("eval/predict.py", *flags, "--batch-size", 2)
    assert done.returncode == 0, done.stderr
    assert "3 photographs" in done.stdout
    made = pictures(out)
    assert set(made) == {f"{kind}/{name}.png" for kind in KINDS for name in ("a", "sub/b", "sub/c")}
    for name, source in (("a", "a.png"), ("sub/b", "sub/b.JPG"), ("sub/c", "sub/c.png")):
        photograph = Image.open(photographs / source)
        labels = expected(network, photograph)
        assert len(np.unique(labels)) > 3
        color, ids, overlay = (
            np.asarray(made[f"{kind}/{name}.png"]) for kind in ("color", "label_ids", "overlay")
        )
        assert np.mean(color == CITYSCAPES.palette[labels]) > 0.999  # ties apart
        assert np.mean(ids == np.asarray(CITYSCAPES.label_ids)[labels]) > 0.999
        blend = (np.asarray(photograph.convert("RGB"), float) + color) / 2
        assert np.abs(overlay - blend).max() <= 1
        assert made[f"side_by_side/{name}.png"].height > photograph.height


def test_every_kind_of_weights(
    weights: Path, photographs: Path, drive: Path, tmp_path: Path
) -> None:
    """A folder for Hugging Face gives the very same pictures; so does batching."""
    export(ExportOptions(weights=weights, format="hf", output=tmp_path / "hf"))
    inputs: Any = (str(photographs), str(drive))
    for name, file, batch_size in (("ours", weights, 1), ("hf", tmp_path / "hf", 3)):
        out = tmp_path / "out" / name
        main(Options(inputs, file, out, kinds=("label_ids",), height=64, batch_size=batch_size))
    ours, theirs = pictures(tmp_path / "out" / "ours"), pictures(tmp_path / "out" / "hf")
    assert ours.keys() == theirs.keys() and len(ours) == 3 + 5
    for name, image in ours.items():
        assert np.mean(np.asarray(image) == np.asarray(theirs[name])) > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("argmax", [False, True])
def test_onnx(
    argmax: bool, network: SegFormer, weights: Path, photographs: Path, tmp_path: Path
) -> None:
    export(ExportOptions(weights=weights, format="onnx", output=tmp_path / "s.onnx", argmax=argmax))
    main(
        Options(
            (str(photographs / "a.png"),),
            tmp_path / "s.onnx",
            tmp_path / "out",
            kinds=("color",),
            height=64,
        )
    )
    color = np.asarray(Image.open(tmp_path / "out" / "color" / "a.png"))
    assert color.shape == (80, 150, 3)
    share = (
        0.6 if argmax else 0.999
    )  # decided at a quarter of the size, or at the photograph's; never for "ignore"
    assert (
        np.mean(color == CITYSCAPES.palette[expected(network, Image.open(photographs / "a.png"))])
        > share
    )


def test_a_map_of_classes_is_enlarged_by_the_nearest() -> None:
    labels = labels_at(torch.tensor([[3, 19], [0, 7]], dtype=torch.uint8), (4, 6), CITYSCAPES)
    np.testing.assert_array_equal(labels, np.kron([[3, 19], [0, 7]], np.ones((2, 3))))


def test_patterns_and_turned_photographs(weights: Path, photographs: Path, tmp_path: Path) -> None:
    image = Image.open(photographs / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / "phone.jpg", exif=turned)
    inputs = (f"{photographs}/**/*.png", str(tmp_path / "phone.jpg"))
    main(Options(inputs, weights, tmp_path / "out", kinds=("color",), height=64))
    made = pictures(tmp_path / "out")
    assert {name: picture.size for name, picture in made.items()} == {
        "color/a.png": (150, 80),
        "color/sub/c.png": (75, 101),
        "color/phone.png": (80, 150),
    }


def test_folders_as_they_are(
    weights: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Links are followed, hidden files are none of ours, and pictures made before are no photographs."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "linked").symlink_to(photographs / "sub")
    (folder / "straße.png").symlink_to(photographs / "a.png")
    (folder / "._straße.png").write_bytes(b"AppleDouble")
    made = {"linked/b.png", "linked/c.png", "straße.png"}
    for inputs in (str(folder), str(folder / "**" / "*")):
        for kind in ("color", "label_ids"):
            main(Options((inputs,), weights, folder / "out", kinds=(kind,), height=64))
            assert set(pictures(folder / "out" / kind)) == made
    save_model(create_model("segformer_b0"), tmp_path / "w.safetensors", height=64)
    for height, told in ((64, False), (96, True)):
        capsys.readouterr()
        main(
            Options(
                (str(photographs / "a.png"),),
                tmp_path / "w.safetensors",
                tmp_path / "o",
                height=height,
            )
        )
        assert (
            "w.safetensors was trained at --height 64, this is 96" in capsys.readouterr().err
        ) == told


def test_a_damaged_photograph_costs_itself_alone(
    weights: Path,
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slowly(path: Path, *, upright: bool) -> Image.Image:
        time.sleep(0.2 * (path.name == "a.png"))  # it is found damaged last
        return read_image(path, upright=upright)

    monkeypatch.setattr("eval.predict.read_image", slowly)
    (tmp_path / "in").mkdir()
    whole = (photographs / "a.png").read_bytes()
    (tmp_path / "in" / "a.png").write_bytes(whole[:2000])
    broken, place = bytearray(whole), whole.index(b"IDAT") - 4
    broken[place : place + 4] = (100).to_bytes(4)  # a length that its checksum doesn't fit
    (tmp_path / "in" / "b.png").write_bytes(broken)
    Image.fromarray(np.full((80, 150), 30000, np.uint16)).save(tmp_path / "in" / "c.png")
    (tmp_path / "in" / "d.png").write_bytes(whole)
    with pytest.raises(UserError, match=r"3 of 4 inputs can't be read: .*a\.png"):
        main(Options((str(tmp_path / "in"),), weights, tmp_path / "out", height=64))
    assert set(pictures(tmp_path / "out")) == {"color/d.png", "overlay/d.png"}
    told = capsys.readouterr().err
    assert re.search(
        r"a\.png cannot be read.*b\.png cannot be read.*c\.png has more than 8 bits",
        told,
        re.DOTALL,
    )


def test_a_video(
    network: SegFormer, weights: Path, drive: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "label_ids" / "drive.mkv").mkdir(parents=True)
    (tmp_path / "label_ids" / "drive.mkv" / "000005.png").touch()  # of a longer video
    flags = (
        "--weights",
        weights,
        "--output-dir",
        tmp_path,
        "--height",
        64,
        "--kinds",
        *KINDS,
        "--batch-size",
        2,
    )
    done = command("eval/predict.py", drive, *flags)
    assert done.returncode == 0, done.stderr
    assert "1 video: " in done.stdout and "5/5" in done.stderr
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    ids = [f"label_ids/drive.mkv/{index:06}.png" for index in range(5)]
    assert written == {"color/drive.mp4", "overlay/drive.mp4", "side_by_side/drive.mp4", *ids}
    source = frames(drive)
    for kind in ("color", "overlay", "side_by_side"):
        result = Video(tmp_path / kind / "drive.mp4")
        assert (result.rate, result.count) == (Fraction(25, 2), 5)
    colors, blends = (frames(tmp_path / kind / "drive.mp4") for kind in ("color", "overlay"))
    assert len({picture.size for picture in frames(tmp_path / "side_by_side" / "drive.mp4")}) == 1
    for index, frame in enumerate(source):
        labels = expected(network, frame)
        assert len(np.unique(labels)) > 3
        assert (
            np.mean(
                np.asarray(Image.open(tmp_path / ids[index]))
                == np.asarray(CITYSCAPES.label_ids)[labels]
            )
            > 0.999
        )
        assert colors[index].size == frame.size == (150, 80)
        for video, exact in (
            (colors, CITYSCAPES.palette[labels]),
            (blends, (np.asarray(frame, float) + CITYSCAPES.palette[labels]) / 2),
        ):
            assert (
                np.abs(np.asarray(video[index], float) - exact).mean() < 20
            )  # what compression costs


def test_videos_of_odd_size_and_turned_ones(tmp_path: Path) -> None:
    picture = Image.new("RGB", (65, 33), (0, 0, 255))
    picture.paste((255, 0, 0), (0, 0, 32, 33))  # the left half is red
    with writing_video(tmp_path / "new" / "odd.mp4", Fraction(5)) as file:
        file.add(picture)
    (frame,) = Video(tmp_path / "new" / "odd.mp4").frames()
    assert frame.size == (65, 33)
    with av.open(str(tmp_path / "phone.mp4"), "w", metadata_errors="surrogateescape") as container:
        container.metadata["title"] = "caf\udce9"  # in an encoding of old
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height = 64, 32
        stream.set_display_rotation(
            90
        )  # counterclockwise, so that players show the left half below
        container.mux(stream.encode(av.VideoFrame.from_image(picture.crop((0, 0, 64, 32)))))
        container.mux(stream.encode(None))
    (frame,) = Video(tmp_path / "phone.mp4").frames()
    top, bottom = frame.getpixel((16, 4)), frame.getpixel((16, 60))
    assert frame.size == (32, 64) and top[2] > 200 > top[0] and bottom[0] > 200 > bottom[2]


def test_a_damaged_video_costs_itself_alone(
    weights: Path,
    photographs: Path,
    drive: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "cut.mp4").write_bytes(b"no video")
    inputs: Any = tuple(map(str, (tmp_path / "cut.mp4", photographs / "a.png", drive)))
    with pytest.raises(UserError, match=r"1 of 3 inputs can't be read: .*cut\.mp4"):
        main(Options(inputs, weights, tmp_path / "out", kinds=("color",), height=64))
    assert {path.name for path in (tmp_path / "out" / "color").iterdir()} == {"a.png", "drive.mp4"}
    assert "cut.mp4 cannot be read as a video: Invalid data" in capsys.readouterr().err


@pytest.mark.parametrize("end", [UnreadableError("broken"), KeyboardInterrupt()])
def test_an_end_in_the_middle_leaves_no_half_video(
    end: BaseException, weights: Path, drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def some_frames(self: Video) -> Iterator[Image.Image]:
        yield from (Image.new("RGB", (150, 80)) for _ in range(40))  # more than wait to be written
        raise end

    monkeypatch.setattr(Video, "frames", some_frames)
    with pytest.raises(UserError if isinstance(end, Exception) else KeyboardInterrupt):
        main(
            Options(
                (str(drive),),
                weights,
                tmp_path,
                kinds=("color", "overlay"),
                height=64,
                batch_size=4,
            )
        )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_video_that_ends_early_is_told(
    weights: Path,
    drive: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read = Video.__init__

    def announce(self: Video, path: Path) -> None:
        read(self, path)
        self.count = 7

    monkeypatch.setattr(Video, "__init__", announce)
    main(Options((str(drive),), weights, tmp_path, kinds=("color",), height=64))
    assert "drive.mkv ends after 5 of its 7 frames" in capsys.readouterr().err


def test_without_pyav(
    weights: Path, drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"install it by pip install -r requirements-video\.txt"):
        main(Options((str(drive),), weights, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"inputs": ()}, "name what to predict"),
        ({"inputs": ("IN", "")}, "name what to predict"),
        ({"kinds": ()}, "--kinds"),
        ({"inputs": ("nowhere",)}, "there is no nowhere; name photographs"),
        ({"inputs": ("COPY",)}, "no photograph or video in "),
        ({"inputs": ("IN/notes.txt", "IN/*.gif")}, r"there is no .*/\*\.gif; name"),
        ({"alpha": 1.5}, "--alpha 1.5"),
        ({"alpha": 0.7, "kinds": ("color", "label_ids")}, "add such a kind"),
        ({"weights": Path("s.onnx"), "device": "cuda"}, "--device cuda: ONNX files run on the CPU"),
        ({"batch_size": 0}, "--batch-size"),
        ({"weights": Path("nowhere.ONNX")}, "no weights at nowhere.ONNX"),
        ({"weights": Path("nowhere.pth")}, "nowhere.pth"),
        ({"inputs": ("IN/a.png", "COPY/a.png")}, "would both become"),
    ],
)
def test_mistakes(flags: dict, says: str, weights: Path, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    if "COPY" not in flags.get("inputs", ()):  # else an empty folder
        (tmp_path / "copy" / "a.png").write_bytes((photographs / "a.png").read_bytes())
    places = {"IN": str(photographs), "COPY": str(tmp_path / "copy")}
    if "inputs" in flags:
        names = flags["inputs"]
        for short, path in places.items():
            names = tuple(name.replace(short, path) for name in names)
        flags = flags | {"inputs": names}
    defaults = {"inputs": (str(photographs),), "weights": weights, "output_dir": tmp_path / "out"}
    with pytest.raises(UserError, match=says) as error:
        main(Options(**defaults | flags))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_other_classes_are_refused(photographs: Path, tmp_path: Path) -> None:
    save_model(create_model("segformer_b0", 12), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="predicts 12 classes, Cityscapes has 19"):
        main(Options((str(photographs),), tmp_path / "w.safetensors", tmp_path / "out"))
