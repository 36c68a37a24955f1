"""Predicting on any photographs and videos: what is written, kept and refused."""

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from datasets.classes import CITYSCAPES
from datasets.images import read_photograph
from demo import app
from errors import UserError
from eval.predict import Options, main
from eval.predictor import Predictor
from eval.rendering import save_png
from eval.video import Video
from models import create_model, load_model, save_model
from tests.golden_data import seed
from tests.trees import write

KINDS: Any = ("color", "overlay", "label_ids", "side_by_side")
IDS = np.asarray(CITYSCAPES.label_ids)
MILLISECOND = Fraction(1, 1000)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """They predict many classes, at height 64; "ignore" would win everywhere if it might."""
    model = seed(create_model("segformer_b0")).eval()
    classifier: Any = model.head.classifier
    with torch.no_grad():
        logits = model(torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))).logits
        classifier.bias -= logits.mean(dim=(0, 2, 3))
        classifier.bias[19] += 1e6
    path = tmp_path_factory.mktemp("weights") / "student.safetensors"
    save_model(model, path, height=64)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Two of one size, one of which EXIF turns, and one upright; and something else."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name, size in (("a.png", (80, 150)), ("sub/b.JPG", (150, 80)), ("sub/c.png", (101, 75))):
        write(root / name, rng.integers(0, 256, (*size, 3)))
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.open(root / "sub/b.JPG").save(root / "sub/b.JPG", exif=exif)
    (root / "notes.txt").write_text("no photograph")
    return root


def film(path: Path, *times: int) -> list[bytes]:
    """A video of 80×150 whose frames are shown at these milliseconds; returns its packets."""
    rng, packets = np.random.default_rng(1), []
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w", metadata_errors="surrogateescape") as container:
        container.metadata["title"] = "caf\udce9"  # in an encoding of old
        stream: Any = container.add_stream("mjpeg", rate=Fraction(25, 2))
        stream.width, stream.height = 150, 80
        stream.pix_fmt = "yuvj420p"
        stream.codec_context.time_base = MILLISECOND
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for time in times:
            blocks = rng.integers(0, 256, (8, 15, 3), np.uint8).repeat(10, 0).repeat(10, 1)
            frame = av.VideoFrame.from_ndarray(blocks).reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = time, MILLISECOND
            packets += stream.encode(frame)
        packets += stream.encode(None)
        payloads = [bytes(packet) for packet in packets]
        container.mux(packets)
    return payloads


def shown(path: Path) -> tuple[list[Image.Image], list[float], Any]:
    """A video's frames, when they are shown in seconds, and the shape of its pixels."""
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        times = [float(frame.pts * frame.time_base) for frame in frames]
        return [frame.to_image() for frame in frames], times, stream.sample_aspect_ratio


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def expected(weights: Path, photograph: Image.Image, height: int = 64) -> np.ndarray:
    """From the definition: resize, logits, upsample, the likeliest real class."""
    scale = height / min(photograph.size)
    size = [max(height, int(side * scale)) for side in photograph.size]
    pixels = np.array(photograph.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        logits = load_model(weights)(images).logits[:, :19]
    return F.interpolate(logits, photograph.size[::-1], mode="bilinear")[0].argmax(0).numpy()


def equal(a: Any, b: Any) -> bool:
    """Ties between classes apart."""
    return bool(np.mean(np.asarray(a) == np.asarray(b)) > 0.999)


def test_a_folder(weights, photographs, tmp_path) -> None:
    out = tmp_path / "new" / "out"
    main(Options((str(photographs),), weights, out, kinds=KINDS, batch_size=2))
    sources = ("a.png", "sub/b.JPG", "sub/c.png")
    assert names(out) == {f"{kind}/{name[:-3]}png" for kind in KINDS for name in sources}
    predictor = Predictor(weights, height=96)
    for source in sources:
        photograph = ImageOps.exif_transpose(Image.open(photographs / source))
        labels = expected(weights, photograph)
        made = {kind: Image.open(out / kind / f"{source[:-3]}png") for kind in KINDS}
        color = np.asarray(made["color"])
        assert equal(color, CITYSCAPES.palette[labels]) and len(np.unique(labels)) > 3
        assert equal(made["label_ids"], IDS[labels])
        blend = (np.asarray(photograph.convert("RGB"), float) + color) / 2
        assert np.abs(np.asarray(made["overlay"]) - blend).max() <= 1
        assert made["side_by_side"].height > photograph.height
        # From Python, and at another height.
        path = photographs / source
        pictures = Image.open(path), read_photograph(path), photograph
        for given in (path, *pictures, np.asarray(photograph)):
            labels, colours = predictor(given)
            assert equal(labels, expected(weights, photograph, 96))
            assert (np.asarray(colours) == CITYSCAPES.palette[labels]).all()


def test_folders_as_they_are(weights, photographs, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "linked").symlink_to(photographs / "sub")
    (folder / "straße.png").symlink_to(photographs / "a.png")
    (folder / "._straße.png").write_bytes(b"AppleDouble")
    (folder / "IMG.HEIC").touch()
    for inputs in ("~/a folder", str(folder / "**" / "*")):
        for kind in ("color", "label_ids"):
            main(Options((inputs,), weights, Path("~/a folder/out"), kinds=(kind,)))
            made = names(folder / "out" / kind)
            assert made == {"linked/b.png", "linked/c.png", "straße.png"}
            assert "1 files are no photographs or videos" in caplog.messages.pop()


def test_what_the_page_shows(weights, photographs) -> None:
    """Each network's blend with its milliseconds, and the legend of what they found."""
    photo = np.asarray(ImageOps.exif_transpose(Image.open(photographs / "sub/b.JPG")))
    predictors = {name: Predictor(weights) for name in ("one", "two")}
    assert app.predictions(predictors, None, 0.5) == [[], None]
    gallery, legend = app.predictions(predictors, photo, 0.0)
    assert all(equal(picture, photo) for picture, _ in gallery) and legend.width == 900
    assert [caption.split(":")[0] for _, caption in gallery] == ["one", "two"]
    (picture, caption), _ = app.predictions(predictors, photo, 1.0)[0]
    assert equal(picture, predictors["one"](photo)[1]) and caption.endswith(" ms")


def test_a_damaged_file_costs_itself_alone(weights, photographs, tmp_path, caplog) -> None:
    folder, long = tmp_path / "in", 251 * "x"  # names may have 255 bytes
    whole = (photographs / "a.png").read_bytes()
    film(folder / "z.mkv", 7_200_000, 7_200_080)  # of a recorder that began two hours before
    (folder / "a.png").write_bytes(whole[:2000])
    (folder / "b.png").write_bytes(whole)
    (folder / f"{long}.png").write_bytes(whole)
    (folder / "cut.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"2 of 5 inputs can't be done: .*…"):
        main(Options((str(folder),), weights, tmp_path / "out", kinds=("color",)))
    assert names(tmp_path / "out") == {"color/b.png", f"color/{long}.png", "color/z.mp4"}
    assert shown(tmp_path / "out" / "color" / "z.mp4")[1] == pytest.approx([0, 0.08], abs=1e-3)
    assert "a.png can't be read" in caplog.text
    assert "cut.mp4 can't be read as a video: Invalid data" in caplog.text


def test_a_video(weights, tmp_path, caplog) -> None:
    """Times and shape are kept around a broken packet."""
    drive, out = tmp_path / "drive.mp4", tmp_path / "out"
    packets = film(drive, 0, 40, 200, 400, 440, 1000)
    frames, _, aspect = shown(drive)
    drive.write_bytes(drive.read_bytes().replace(packets[2], bytes(len(packets[2]))))
    save_png(frames[0], out / "label_ids" / "drive.mp4" / "000007.png")  # of a longer one before
    main(Options((str(drive),), weights, out, kinds=KINDS, batch_size=2))
    assert "packets that can't be decoded and are skipped: 1" in caplog.text
    ids = [f"label_ids/drive.mp4/{index:06}.png" for index in range(5)]
    videos = [f"{kind}/drive.mp4" for kind in KINDS if kind != "label_ids"]
    assert names(out) == {*videos, *ids}
    colors, overlays, rows = (shown(out / name)[0] for name in videos)
    _, times, shape = shown(out / videos[0])
    assert times == pytest.approx([0, 0.04, 0.4, 0.44, 1], abs=1e-3)
    assert shape == aspect == Fraction(4, 3)
    assert len(overlays) == len(rows) == 5 and len({row.size for row in rows}) == 1
    for index, frame in enumerate(frames[:2] + frames[3:]):
        labels = expected(weights, frame)
        assert equal(Image.open(out / ids[index]), IDS[labels]) and len(np.unique(labels)) > 3
        difference = np.abs(np.asarray(colors[index], float) - CITYSCAPES.palette[labels])
        assert difference.mean() < 20  # what compression costs


def test_a_turned_video_of_odd_size(weights, tmp_path) -> None:
    picture = Image.new("RGB", (65, 33), (0, 0, 255))
    picture.paste((255, 0, 0), (0, 0, 32, 33))  # the left half is red
    with av.open(str(tmp_path / "phone.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=5)
        stream.width, stream.height = picture.size
        stream.pix_fmt = "yuv444p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        stream.set_display_rotation(90)  # players then show the left half below
        container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode(None))
    out = tmp_path / "out"
    main(Options((str(tmp_path / "phone.mp4"),), weights, out, kinds=("overlay",), alpha=0))
    (frame,), _, shape = shown(out / "overlay" / "phone.mp4")
    assert shape == Fraction(3, 4)
    top, bottom = (np.asarray(frame)[y, 16].astype(int) for y in (4, 60))
    assert frame.size == (33, 65) and top[2] > 200 > top[0] and bottom[0] > 200 > bottom[2]


def test_an_end_in_the_middle_leaves_no_half_video(weights, tmp_path, monkeypatch) -> None:
    def some_frames(self: Video) -> Any:
        yield from ((time, Image.new("RGB", (150, 80))) for time in range(80))
        raise KeyboardInterrupt

    monkeypatch.setattr(Video, "frames", some_frames)
    film(tmp_path / "a.mkv", 0)
    with pytest.raises(KeyboardInterrupt):
        main(Options((str(tmp_path / "a.mkv"),), weights, tmp_path / "out", batch_size=4))
    assert not names(tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"inputs": ("in/*.txt",)}, r"no photograph or video at 'in/\*\.txt'"),
        ({"inputs": ("in/a.png", "color/a.png")}, "2 of the inputs would become"),
        ({"alpha": 1.5}, "--alpha"),
        ({"inputs": ("a.mp4",)}, r"pip install -r requirements/video\.txt"),
    ],
)
def test_mistakes(flags, says, photographs, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "av", None)
    Path("in").symlink_to(photographs)
    Path("a.mp4").touch()
    write(Path("color/a.png"), np.zeros((80, 150, 3)))
    given = {"inputs": ("in",), "weights": Path("nowhere.pth"), "output_dir": Path("out")}
    with pytest.raises(UserError, match=says) as error:
        main(Options(**given | flags))
    assert "\n" not in str(error.value) and not Path("out").exists()
