"""Predicting on any photographs and videos: what is written, kept and refused."""

import sys
import time
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
from errors import UserError
from eval.predict import Options, main
from eval.predictor import Predictor
from eval.video import Video, writing_video
from models import SegmentationModel, create_model, save_model
from tests.golden_data import seed
from tests.trees import write

KINDS: Any = ("color", "overlay", "label_ids", "side_by_side")
IDS = np.asarray(CITYSCAPES.label_ids)
MILLISECOND = Fraction(1, 1000)


@pytest.fixture(scope="module")
def network() -> SegmentationModel:
    """Random weights that predict many classes; "ignore" would win everywhere if it might."""
    model = seed(create_model("segformer_b0")).eval()
    classifier: Any = model.head.classifier
    with torch.no_grad():
        logits = model(torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))).logits
        classifier.bias -= logits.mean(dim=(0, 2, 3))
        classifier.bias[19] += 1e6
    return model


@pytest.fixture(scope="module")
def weights(network: SegmentationModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the height of a training, 64."""
    path = tmp_path_factory.mktemp("weights") / "student.safetensors"
    save_model(network, path, height=64)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of one size, one of which EXIF turns, and one upright; and something else."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name, size in (("a.png", (80, 150)), ("sub/b.JPG", (150, 80)), ("sub/c.png", (101, 75))):
        write(root / name, rng.integers(0, 256, (*size, 3)))
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.open(root / "sub/b.JPG").save(root / "sub/b.JPG", exif=exif)
    (root / "notes.txt").write_text("no photograph")
    return root


def film(path: Path, times: Any, codec: str = "libx264", aspect: Any = 1) -> list[bytes]:
    """A video of 80×150 whose frames are shown at these milliseconds; returns its packets."""
    rng, packets = np.random.default_rng(1), []
    with av.open(str(path), "w", metadata_errors="surrogateescape") as container:
        container.metadata["title"] = "caf\udce9"  # in an encoding of old
        stream: Any = container.add_stream(codec, rate=Fraction(25, 2))
        stream.width, stream.height = 150, 80
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = MILLISECOND
        stream.codec_context.sample_aspect_ratio = aspect
        for time in times:
            blocks = rng.integers(0, 256, (8, 15, 3), np.uint8).repeat(10, 0).repeat(10, 1)
            frame = av.VideoFrame.from_ndarray(blocks).reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = time, MILLISECOND
            packets += stream.encode(frame)
        packets += stream.encode(None)
        payloads = [bytes(packet) for packet in packets]
        container.mux(packets)
    return payloads


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five frames, 12.5 a second."""
    path = tmp_path_factory.mktemp("videos") / "drive.mkv"
    film(path, range(0, 400, 80))
    return path


def shown(path: Path) -> tuple[list[Image.Image], list[float], Any]:
    """A video's frames, when they are shown in seconds, and the shape of its pixels."""
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        times = [float(frame.pts * frame.time_base) for frame in frames]
        return [frame.to_image() for frame in frames], times, stream.sample_aspect_ratio


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def expected(network: SegmentationModel, photograph: Image.Image, height: int = 64) -> np.ndarray:
    """From the definition: resize, logits, upsample, the likeliest real class."""
    scale = height / min(photograph.size)
    size = [max(height, int(side * scale)) for side in photograph.size]
    pixels = np.array(photograph.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    with torch.no_grad():
        logits = network(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255).logits[:, :19]
    return F.interpolate(logits, photograph.size[::-1], mode="bilinear")[0].argmax(0).numpy()


def equal(a: Any, b: Any) -> bool:
    """Ties between classes apart."""
    return bool(np.mean(np.asarray(a) == np.asarray(b)) > 0.999)


def test_a_folder(network, weights, photographs, tmp_path) -> None:
    out = tmp_path / "new" / "out"
    main(Options((str(photographs),), weights, out, kinds=KINDS, batch_size=2))
    sources = ("a.png", "sub/b.JPG", "sub/c.png")
    assert names(out) == {f"{kind}/{name[:-3]}png" for kind in KINDS for name in sources}
    for source in sources:
        photograph = ImageOps.exif_transpose(Image.open(photographs / source))
        labels = expected(network, photograph)
        made = {kind: Image.open(out / kind / f"{source[:-3]}png") for kind in KINDS}
        color = np.asarray(made["color"])
        assert equal(color, CITYSCAPES.palette[labels]) and len(np.unique(labels)) > 3
        assert equal(made["label_ids"], IDS[labels])
        blend = (np.asarray(photograph.convert("RGB"), float) + color) / 2
        assert np.abs(np.asarray(made["overlay"]) - blend).max() <= 1
        assert made["side_by_side"].height > photograph.height


def test_predictor(network, weights, photographs) -> None:
    """From Python: a path, picture or array, at the height of the weights or another one."""
    path = photographs / "sub/b.JPG"
    photograph = ImageOps.exif_transpose(Image.open(path))
    for height in (64, 96):
        predictor = Predictor(weights, height=None if height == 64 else height)
        for given in (path, str(path), photograph, np.asarray(photograph)):
            labels, colours = predictor(given)
            assert labels.dtype == np.uint8 and equal(labels, expected(network, photograph, height))
            assert (np.asarray(colours) == CITYSCAPES.palette[labels]).all()


def test_folders_as_they_are(weights, photographs, tmp_path, monkeypatch) -> None:
    """Links are followed, hidden files are none of ours, and pictures made before are no inputs."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "linked").symlink_to(photographs / "sub")
    (folder / "straße.png").symlink_to(photographs / "a.png")
    (folder / "._straße.png").write_bytes(b"AppleDouble")
    for inputs in ("~/a folder", str(folder / "**" / "*")):
        for kind in ("color", "label_ids"):
            main(Options((inputs,), weights, Path("~/a folder/out"), kinds=(kind,)))
            made = names(folder / "out" / kind)
            assert made == {"linked/b.png", "linked/c.png", "straße.png"}


def test_a_damaged_file_costs_itself_alone(
    weights, photographs, tmp_path, caplog, monkeypatch
) -> None:
    """Photographs that can't be read, a video that is none. Names may have 255 bytes."""

    def slowly(path: Path) -> Image.Image:
        time.sleep(0.2 * (path.name == "a.png"))  # it is found damaged last
        return read_photograph(path)

    monkeypatch.setattr("eval.predictor.read_photograph", slowly)
    whole = (photographs / "a.png").read_bytes()
    broken, place = bytearray(whole), whole.index(b"IDAT") - 4
    broken[place : place + 4] = (100).to_bytes(4)  # a length that its checksum doesn't fit
    folder, long = tmp_path / "in", 251 * "x"
    folder.mkdir()
    Image.fromarray(np.full((80, 150), 30000, np.uint16)).save(folder / "c.png")
    for name, content in (
        ("a.png", whole[:2000]),
        ("b.png", bytes(broken)),
        ("d.png", whole),
        (f"{long}.png", whole),
        ("cut.mp4", b"no video"),
    ):
        (folder / name).write_bytes(content)
    film(folder / "z.mkv", [0, 80])
    with pytest.raises(UserError, match=r"4 of 7 inputs can't be done: .*…"):
        main(Options((str(folder),), weights, tmp_path / "out", kinds=("color",)))
    assert names(tmp_path / "out") == {"color/d.png", f"color/{long}.png", "color/z.mp4"}
    for words in ("a.png can't be read", "b.png can't be read", "c.png has more than 8 bits"):
        assert words in caplog.text
    assert "cut.mp4 can't be read as a video: Invalid data" in caplog.text


# --- videos


def test_a_video(network, weights, drive, tmp_path) -> None:
    main(Options((str(drive),), weights, tmp_path, kinds=KINDS, batch_size=2))
    ids = [f"label_ids/drive.mkv/{index:06}.png" for index in range(5)]
    videos = [f"{kind}/drive.mp4" for kind in KINDS if kind != "label_ids"]
    assert names(tmp_path) == {*videos, *ids}
    colors, overlays, rows = (shown(tmp_path / name)[0] for name in videos)
    assert len(rows) == 5 and len({row.size for row in rows}) == 1
    for index, frame in enumerate(shown(drive)[0]):
        labels = expected(network, frame)
        assert equal(Image.open(tmp_path / ids[index]), IDS[labels]) and len(np.unique(labels)) > 3
        palette = CITYSCAPES.palette[labels]
        blend = (np.asarray(frame, float) + palette) / 2
        for video, exact in ((colors, palette), (overlays, blend)):
            difference = np.abs(np.asarray(video[index], float) - exact)
            assert difference.mean() < 20  # what compression costs


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_times_and_shape_are_kept(name, weights, tmp_path) -> None:
    times, aspect = [0, 40, 400, 440, 1000], Fraction(4, 3)
    film(tmp_path / name, times, aspect=aspect)
    main(Options((str(tmp_path / name),), weights, tmp_path, kinds=("color",)))
    _, found, shape = shown(tmp_path / "color/a.mp4")
    assert found == pytest.approx([time / 1000 for time in times], abs=1e-3) and shape == aspect


def test_a_broken_packet_is_skipped(weights, tmp_path, caplog) -> None:
    path = tmp_path / "a.mp4"
    packet = film(path, range(0, 400, 80), "mjpeg")[2]
    path.write_bytes(path.read_bytes().replace(packet, bytes(len(packet))))
    main(Options((str(path),), weights, tmp_path, kinds=("color",)))
    assert shown(tmp_path / "color/a.mp4")[1] == pytest.approx([0, 0.08, 0.24, 0.32], abs=1e-3)
    assert "packets that can't be decoded and are skipped: 1" in caplog.text


def test_odd_sizes_and_turned_videos(drive, tmp_path) -> None:
    picture = Image.new("RGB", (65, 33), (0, 0, 255))
    picture.paste((255, 0, 0), (0, 0, 32, 33))  # the left half is red
    with writing_video(tmp_path / "new" / "odd.mp4", Video(drive).stream) as add:
        add(picture, 0)
    assert [frame.size for frame in shown(tmp_path / "new" / "odd.mp4")[0]] == [(65, 33)]
    with av.open(str(tmp_path / "phone.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=5)
        stream.width, stream.height = 64, 32
        stream.set_display_rotation(90)  # players then show the left half below
        container.mux(stream.encode(av.VideoFrame.from_image(picture.crop((0, 0, 64, 32)))))
        container.mux(stream.encode(None))
    ((_, frame),) = Video(tmp_path / "phone.mp4").frames()
    top, bottom = (np.asarray(frame)[y, 16].astype(int) for y in (4, 60))
    assert frame.size == (32, 64) and top[2] > 200 > top[0] and bottom[0] > 200 > bottom[2]


@pytest.mark.parametrize("end", [UserError("broken"), KeyboardInterrupt()])
def test_an_end_in_the_middle_leaves_no_half_video(
    end, weights, drive, tmp_path, monkeypatch
) -> None:
    def some_frames(self: Video) -> Any:
        yield from ((time, Image.new("RGB", (150, 80))) for time in range(20))
        raise end

    monkeypatch.setattr(Video, "frames", some_frames)
    with pytest.raises(type(end)):
        main(Options((str(drive),), weights, tmp_path, batch_size=4))
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"inputs": ()}, "name inputs"),
        ({"inputs": ("in/*.txt",)}, r"no photograph or video at 'in/\*\.txt'"),
        ({"inputs": ("in/a.png", "color/a.png")}, "2 of the inputs would become"),
        ({"alpha": 1.5}, "--alpha"),
        ({"weights": Path("twelve.safetensors")}, "predicts 12 classes, and Cityscapes has 19"),
        ({"inputs": ("a.mp4",)}, r"pip install -r requirements/video\.txt"),
    ],
)
def test_mistakes(flags, says, photographs, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "av", None)
    Path("in").symlink_to(photographs)
    Path("a.mp4").touch()
    write(Path("color/a.png"), np.zeros((80, 150, 3)))
    save_model(create_model("segformer_b0", 12), Path("twelve.safetensors"))
    given = {"inputs": ("in",), "weights": Path("nowhere.pth"), "output_dir": Path("out")}
    with pytest.raises(UserError, match=says) as error:
        main(Options(**given | flags))
    assert "\n" not in str(error.value) and not Path("out").exists()
