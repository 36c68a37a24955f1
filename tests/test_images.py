"""What image files mean: sizes, label values, palettes, bit depths, EXIF, damage."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from datasets import use_cache
from datasets.classes import CITYSCAPES, colormap
from datasets.images import read_label, read_photograph, upright_size
from datasets.transforms import resized_size
from errors import UserError
from tests.trees import open_tree, same, write, write_scene


def write_png(path: Path, values: np.ndarray, depth: int) -> Path:
    """A grey PNG of any bit depth, which Pillow writes in part only."""
    height, width = values.shape
    bits = (values[..., None] >> np.arange(depth)[::-1]).astype(np.uint8) & 1
    rows = np.packbits(bits.reshape(height, -1), axis=1)
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + pixels, b"IEND"):
        chunks += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(chunks)
    return path


def test_sizes_of_the_paper() -> None:
    sizes = [resized_size(512, size) for size in ((1024, 2048), (1080, 1920), (1920, 1080))]
    assert sizes == [(512, 1024), (512, 910), (910, 512)]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((64, 96), 26), "no train ids .*: 26; these look like label ids: name .*_labelIds"),
        (np.full((64, 96, 3), 0), r"looks like a picture \(PNG, mode RGB\)"),
        (np.zeros((32, 48)), "is 64×96 pixels .* is 32×48"),
    ],
)
def test_labels_that_cannot_be_right(tmp_path: Path, array: np.ndarray, words: str) -> None:
    _, label = write_scene(tmp_path, "town_1")
    write(label, array)
    with pytest.raises(UserError, match=words) as caught:
        open_tree(tmp_path)[0]
    assert str(label) in str(caught.value) and "\n" not in str(caught.value)


def test_broken_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, _ = write_scene(tmp_path, "town_1")
    dataset = open_tree(tmp_path)
    whole = image.read_bytes()
    for damaged in (b"", whole[:5000], whole[:40] + bytes(60) + whole[100:]):
        image.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{image} can't be read as an image"):
            dataset[0]
    image.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="decompression bomb"):
        dataset[0]
    image.unlink()
    with pytest.raises(UserError, match="No such file"):
        dataset[0]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_bit_depths(depth: int, tmp_path: Path) -> None:
    """Labels mean their numbers; photographs go from black to white."""
    grey = np.random.default_rng(depth).integers(0, 2**depth, (40, 60))
    ids = grey % 19
    assert (read_label(write_png(tmp_path / "l", ids, depth), "train_ids", CITYSCAPES) == ids).all()
    photograph = read_photograph(write_png(tmp_path / "p.png", grey, depth))
    assert (np.asarray(photograph) == np.round(grey * 255 / (2**depth - 1))[..., None]).all()


def test_16_bits(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 2**16, (40, 60))
    path = write_png(tmp_path / "grey.png", grey, 16)
    with pytest.raises(UserError, match="more than 8 bits a channel"):
        read_photograph(path)
    with pytest.raises(UserError, match="is this a colour map, or a label of another"):
        read_label(path, "train_ids", CITYSCAPES)
    ids = grey % 19
    assert (read_label(write_png(path, ids, 16), "train_ids", CITYSCAPES) == ids).all()


GREYS = np.arange(256)[:, None].repeat(3, 1)
CITY = np.zeros((256, 3))
CITY[:20] = CITYSCAPES.palette
CITY[255] = CITYSCAPES.palette[13]  # as licence plates are coloured


@pytest.mark.parametrize(
    ("encoding", "colours", "indices", "meaning"),
    [
        ("train_ids", GREYS[::-1], [255, 252, 237, 0], [0, 3, 18, 19]),
        ("train_ids", CITY, [0, 3, 18, 255], [0, 3, 18, 19]),
        ("train_ids", np.roll(CITY, -1, axis=0), [0, 3], "0 has the colour of sidewalk"),
        ("label_ids", np.roll(CITY, 7, axis=0), [0, 7, 8], [19, 0, 1]),  # sidewalk is 8
        ("train_ids", colormap(256), [0, 3, 18, 255], [0, 3, 18, 19]),  # VOC's
        ("train_ids", 0 * GREYS, [0, 3], "3 has the colour of ignore"),
    ],
)
def test_palettes(encoding, colours, indices, meaning, tmp_path) -> None:
    """Grey ones mean their grey, colours the index, which must not be another class's."""
    picture = Image.fromarray(np.array([indices], np.uint8))
    picture.putpalette(colours.astype(np.uint8).tobytes())
    picture.save(tmp_path / "l.png")
    if isinstance(meaning, list):
        assert read_label(tmp_path / "l.png", encoding, CITYSCAPES).tolist() == [meaning]
    else:
        with pytest.raises(UserError, match=meaning):
            read_label(tmp_path / "l.png", encoding, CITYSCAPES)


def test_labels_that_would_be_misread(tmp_path: Path) -> None:
    ids = Image.fromarray(np.array([[0, 1, 10, 18, 255]], np.uint8))
    for kind, says in (("PNG", "1, 10, 18; these look like train ids"), ("JPEG", "a picture")):
        ids.save(tmp_path / "l.png", kind)
        with pytest.raises(UserError, match=says):
            read_label(tmp_path / "l.png", "label_ids", CITYSCAPES)


def exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """A block of (tag, type, count, four bytes)."""
    entries = b"".join(struct.pack("<HHI4s", *tag) for tag in sorted(tags))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def test_malformed_exif(tmp_path: Path) -> None:
    """The photograph is turned by the one tag that counts, or taken as it lies."""
    path = tmp_path / "p.jpg"
    for block, size in (
        (exif((0x112, 3, 1, b"\6"), (0x10F, 5, 1, b"\x08\0\0\0")), (48, 32)),  # a maker's fraction
        (exif((0x112, 2, 4, b"up\0\0")), (32, 48)),
        (b"Exif\0\0garbage", (32, 48)),
    ):
        Image.new("RGB", (48, 32)).save(path, exif=block)
        assert upright_size(path) == read_photograph(path).size[::-1] == size


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_turned_photographs(kind: str, tmp_path: Path) -> None:
    """Also TIFF, which Pillow turns itself; the cache holds what is read."""
    image, label = write_scene(tmp_path, "town_1")
    pixels = Image.open(image).copy()
    for number in range(1, 9):
        pixels.save(image, kind, exif=exif((0x112, 3, 1, bytes([number]))))
        upright = ImageOps.exif_transpose(Image.open(image))
        write(label, np.zeros(upright.size[::-1]))
        assert upright_size(image) == upright.size[::-1]
        assert (np.asarray(read_photograph(image)) == np.asarray(upright)).all()
        cached = open_tree(tmp_path)
        use_cache(cached, tmp_path / "cache")
        assert cached.cache is not None and same(cached, open_tree(tmp_path))
