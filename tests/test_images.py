"""What image files mean: sizes, label values, palettes, bit depths, EXIF, damage."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets import use_cache
from datasets.classes import CITYSCAPES, VOC2012, colormap
from datasets.images import TURNS, read_label, read_photograph, upright_size
from datasets.transforms import label_size, resize_label, resized_size
from errors import UserError
from tests.trees import open_tree, same, write, write_scene


def write_png(path: Path, values: np.ndarray, depth: int, colour: int = 0) -> Path:
    """A PNG of any bit depth, which Pillow writes in part only; colour type 0 is grey, 2 RGB."""
    height, width = values.shape[:2]
    bits = (values[..., None] >> np.arange(depth)[::-1]).astype(np.uint8) & 1
    rows = np.packbits(bits.reshape(height, -1), axis=1)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + pixels, b"IEND"):
        chunks += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(chunks)
    return path


@settings(max_examples=100, deadline=None)
@given(source=st.integers(1, 250), target=st.integers(1, 300), across=st.booleans())
def test_a_label_takes_the_nearest_source_pixel(source: int, target: int, across: bool) -> None:
    ramp = np.arange(source, dtype=np.uint8).reshape(-1, 1)
    taken = resize_label(ramp.T if across else ramp, (1, target) if across else (target, 1)).ravel()
    quarter = label_size((target, 1))[0]
    position = (np.arange(quarter) + 0.5) * source / quarter
    # Pillow adds the step up from pixel to pixel, and may end just below a whole number.
    assert ((taken == np.floor(position)) | (taken == np.floor(position - 1e-9))).all()


def test_sizes(tmp_path: Path) -> None:
    """Those of the paper; an image at the right size is untouched."""
    sizes = [resized_size(512, size) for size in ((1024, 2048), (1080, 1920), (1920, 1080))]
    assert sizes == [(512, 1024), (512, 910), (910, 512)]
    image, label = write_scene(tmp_path, "town_1", (33, 50), kind="Ids")
    dataset = open_tree(tmp_path, height=33)
    assert (dataset[0].image.permute(1, 2, 0).numpy() == np.asarray(Image.open(image))).all()
    assert dataset[0].label.shape == (9, 13) and dataset.photograph(0).size == (50, 33)
    raw = np.asarray(Image.open(label))
    assert (dataset.full_label(0) == CITYSCAPES.table("label_ids")[raw]).all()


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((64, 96), 26), "no train ids .*: 26; these look like label ids: name .*_labelIds"),
        (np.full((64, 96), 200), "no train ids .*: 200; is this a colour map"),
        (np.full((64, 96, 3), 0), "looks like a colour map"),
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
    for damage in (whole[:5000], b"", b"no image", whole[:40] + bytes(60) + whole[100:]):
        image.write_bytes(damage)
        with pytest.raises(UserError, match=f"{image} can't be read as an image"):
            dataset[0]
    image.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="decompression bomb"):
        dataset[0]
    image.unlink()
    with pytest.raises(UserError, match="No such file"):
        dataset[0]


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_bit_depths(depth: int, tmp_path: Path) -> None:
    """Labels mean their numbers; photographs go from black to white."""
    grey = np.random.default_rng(depth).integers(0, 2**depth, (40, 60))
    ids = grey % 19
    assert (read_label(write_png(tmp_path / "l", ids, depth), "train_ids", CITYSCAPES) == ids).all()
    path = write_png(tmp_path / "p.png", grey, depth)
    if depth < 16:
        expected = np.round(grey * 255 / (2**depth - 1))[..., None]
        assert (np.asarray(read_photograph(path)) == expected).all()
        return
    with pytest.raises(UserError, match="more than 8 bits a channel"):
        read_photograph(path)
    rgb = write_png(tmp_path / "c.png", np.stack([grey, grey // 2, grey // 3], 2), 16, colour=2)
    assert (np.asarray(read_photograph(rgb))[..., 1] == grey // 2 >> 8).all()
    with pytest.raises(UserError, match="26001; is this a colour map, or a label of another"):
        read_label(write_png(path, ids // 99 + 26001, 16), "train_ids", CITYSCAPES)


def indexed(values: np.ndarray, colours: np.ndarray, order: np.ndarray | None = None) -> Any:
    """A picture with a palette. With an `order`, index i has the colour of `order[i]`."""
    order = np.arange(len(colours)) if order is None else order
    picture = Image.fromarray(np.argsort(order)[values].astype(np.uint8))
    picture.putpalette(colours[order].astype(np.uint8).tobytes())
    return picture


GREYS = np.arange(256)[:, None].repeat(3, 1)
SHUFFLED = np.random.default_rng(1).permutation(256)
CITY = np.concatenate([CITYSCAPES.palette, np.zeros((236, 3), np.uint8)])
BY_ID = np.zeros((256, 3), np.uint8)
BY_ID[list(CITYSCAPES.label_ids)] = CITYSCAPES.palette
BY_ID[255] = CITYSCAPES.palette[13]  # as licence plates are coloured
PLAIN, COLOURS = np.arange(256), colormap(256)


@pytest.mark.parametrize(
    ("classes", "encoding", "colours", "order", "values", "right"),
    [
        (CITYSCAPES, "train_ids", GREYS, PLAIN, [0, 3, 18, 255], True),
        (CITYSCAPES, "train_ids", GREYS, SHUFFLED, [0, 3, 18, 255], True),
        (CITYSCAPES, "train_ids", CITY, PLAIN, [0, 3, 18, 255], True),
        (CITYSCAPES, "train_ids", CITY, SHUFFLED, [0, 3, 18], "has the colour of"),
        (CITYSCAPES, "train_ids", CITY, np.roll(PLAIN, 1), [2], "3 has the colour of build"),
        (CITYSCAPES, "label_ids", BY_ID, PLAIN, [0, 7, 26, 255], True),
        (CITYSCAPES, "label_ids", BY_ID, np.roll(PLAIN, 5), [254, 255], "4 has the colour of car"),
        (CITYSCAPES, "train_ids", COLOURS, PLAIN, [0, 3, 18, 255], True),
        (VOC2012, "label_ids", COLOURS, PLAIN, [0, 1, 20, 255], True),
        (VOC2012, "label_ids", COLOURS, np.roll(PLAIN, 2), [255], "1 has the colour of ignore"),
    ],
)
def test_palettes(classes, encoding, colours, order, values, right, tmp_path) -> None:
    """Grey ones mean their grey, colours the index, which must not be another class's."""
    label = np.random.default_rng(0).choice(values, (40, 60))
    indexed(label, colours, order).save(tmp_path / "l.png")
    if right is True:
        expected = classes.table(encoding)[label]
        assert (read_label(tmp_path / "l.png", encoding, classes) == expected).all()
    else:
        with pytest.raises(UserError, match=right):
            read_label(tmp_path / "l.png", encoding, classes)


def exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """A block of (tag, type, count, four bytes)."""
    entries = b"".join(struct.pack("<HHI4s", *tag) for tag in sorted(tags))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("block", "turned"),
    [
        (exif((0x112, 3, 1, b"\6"), (0x11A, 2, 4, b"72\0\0")), True),  # resolution as a text
        (exif((0x112, 3, 1, b"\6"), (0x10F, 5, 1, b"\x08\0\0\0")), True),  # maker as a fraction
        (exif((0x112, 3, 1, b"\6"), (0x10F, 99, 7, b"????")), True),
        (exif((0x112, 2, 4, b"up\0\0")), False),
        (exif((0x112, 3, 1, b"\x63")), False),
        (b"Exif\0\0garbage", False),
    ],
)  # fmt: skip
def test_malformed_exif(block: bytes, turned: bool, tmp_path: Path) -> None:
    """The photograph is turned by the one tag that counts, or taken as it lies."""
    plain = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))
    plain.save(tmp_path / "p.jpg", exif=block)
    assert upright_size(tmp_path / "p.jpg") == ((48, 32) if turned else (32, 48))
    assert read_photograph(tmp_path / "p.jpg").size == ((32, 48) if turned else (48, 32))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_turned_photographs(kind: str, tmp_path: Path) -> None:
    """Also TIFF, which Pillow turns itself; the cache holds what is read."""
    image, label = write_scene(tmp_path, "town_1")
    pixels = Image.open(image).copy()
    pixels.save(tmp_path / "lying", kind)
    for orientation, turn in TURNS.items():
        pixels.save(image, kind, exif=exif((0x112, 3, 1, bytes([orientation]))))
        upright = Image.open(tmp_path / "lying").transpose(turn)
        write(label, np.zeros(upright.size[::-1]))
        assert upright_size(image) == upright.size[::-1]
        assert (np.asarray(read_photograph(image)) == np.asarray(upright)).all()
        cached = open_tree(tmp_path)
        use_cache(cached, tmp_path / "cache")
        assert cached.cache is not None and same(cached, open_tree(tmp_path))
