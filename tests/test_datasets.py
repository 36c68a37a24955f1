"""Classes, pairing, augmentation and batches, on small trees of random pixels."""

import gc
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from datasets import LAYOUTS, Augmentation, open_split, training_batches
from datasets.classes import CITYSCAPES
from datasets.scenes import SceneDataset
from datasets.transforms import Draw, label_size, resize_label, shift
from errors import UserError
from tests.trees import limited, open_tree, write, write_scene

IGNORE = CITYSCAPES.ignore
NAMES = list(CITYSCAPES.names)


def test_classes_agree_with_cityscapes_own_table() -> None:
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    table = CITYSCAPES.table("label_ids")
    for label in labels:
        counts = 0 <= label.trainId < 19
        assert table[label.id % 256] == (label.trainId if counts else IGNORE), label.name
        if counts:
            assert CITYSCAPES.names[label.trainId] == label.name
            assert tuple(CITYSCAPES.palette[label.trainId]) == label.color
            assert CITYSCAPES.label_ids[label.trainId] == label.id
    assert CITYSCAPES.table("train_ids")[255] == IGNORE and CITYSCAPES.label_ids[IGNORE] == 0
    assert CITYSCAPES.weights is not None and CITYSCAPES.weights[IGNORE] == 0


def test_a_networks_classes_in_our_order() -> None:
    assert CITYSCAPES.order("w.pth", 19, [f"LABEL_{i}" for i in range(19)]) == list(range(19))
    names = [name.title().replace(" ", "_") for name in NAMES[1:] + NAMES[:1]]
    assert CITYSCAPES.order("w.pth", 19, names) == [18, *range(18)]
    with pytest.raises(UserError, match=r"w\.pth predicts .*it has lawn; it lacks road"):
        CITYSCAPES.order("w.pth", 19, ["lawn", *NAMES[1:]])


def test_pairing_is_by_name(tmp_path: Path) -> None:
    """Eight names that begin alike have an image, train ids and label ids, or some of these."""
    kinds = ("leftImg8bit", "gtFine_labelTrainIds", "gtFine_labelIds")
    for number in range(8):
        for bit, kind in enumerate(kinds):
            path = tmp_path / kind.partition("_")[0] / "val/a" / f"1{number * '0'}_{kind}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if number & 2**bit:
                path.touch()
    samples, orphans = LAYOUTS["cityscapes"].find(tmp_path, "val")
    found = [(x.image.name, x.label and x.label.name, x.encoding) for x in samples]
    assert found == [
        ("10000000_leftImg8bit.png", "10000000_gtFine_labelTrainIds.png", "train_ids"),
        ("100000_leftImg8bit.png", "100000_gtFine_labelIds.png", "label_ids"),
        ("1000_leftImg8bit.png", "1000_gtFine_labelTrainIds.png", "train_ids"),
        ("10_leftImg8bit.png", None, "train_ids"),
    ]
    assert sorted(path.name.count("0") for path in orphans) == [2, 4, 6, 6]


def test_missing_partners_are_named_and_can_be_allowed(tree: Path) -> None:
    next((tree / "gtFine").rglob("town_03*")).unlink()
    next((tree / "leftImg8bit").rglob("town_08*")).unlink()
    with pytest.raises(UserError) as caught:
        open_tree(tree)
    assert "images without label: 1, such as town_03_leftImg8bit.jpg" in str(caught.value)
    assert "labels without image: 1, such as town_08_gtFine_labelTrainIds.png" in str(caught.value)
    item = open_tree(tree, require_labels=False)[3]
    assert item.label.shape == (8, 12) and (item.label == IGNORE).all()
    write_scene(tree, "town_05", extension="png")  # beside town_05_leftImg8bit.jpg
    with pytest.raises(UserError, match=r"town_05.* and .*town_05.* have one name"):
        open_tree(tree)
    with pytest.raises(UserError, match="height 31 is too small"):
        open_tree(tree, height=31)


ROOMS = ("living", "living room 1", "a/1", "images/a/1", "a 2/hall", "c.png", "c")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("\ufeffliving.png\n\n living ", "living"),
        ("/images/living.png labels40/living.png", "living"),
        ("images/a/1.png", "a/1"),  # not images/images/a/1.png
        (r"images\a\1.png labels40\a\1.png", "a/1"),
        ("images/a 2/hall.png", "a 2/hall"),  # no pair
        ("c.png", r"fit no image, or several: 1 \(c.png\)"),
        ("living room 2", r"several: 1 \(living room 2\); give paths like images/"),
        ("", "it names none"),
        ("caf\udce9", "can't read the list .*decode"),
    ],
)
def test_lists(lines: str, expected: str, tmp_path: Path) -> None:
    """Beside a file `living.png`, a line `living room 2` means none."""
    for name in ROOMS:
        write(tmp_path / f"images/{name}.png", np.zeros((32, 32, 3)))
        write(tmp_path / f"labels40/{name}.png", np.ones((32, 32)))
    (tmp_path / "train.txt").write_text(lines, errors="surrogateescape")
    if expected in ROOMS:
        (sample,) = open_split("NYUv2", tmp_path, "train").samples
        assert sample.name == f"images/{expected}.png"
    else:
        with pytest.raises(UserError, match=expected):
            open_split("NYUv2", tmp_path, "train")


@settings(max_examples=100, deadline=None)
@given(source=st.integers(1, 250), target=st.integers(1, 300), across=st.booleans())
def test_a_label_takes_the_nearest_source_pixel(source: int, target: int, across: bool) -> None:
    ramp = np.arange(source, dtype=np.uint8).reshape(-1, 1)
    taken = resize_label(ramp.T if across else ramp, (1, target) if across else (target, 1)).ravel()
    quarter = label_size((target, 1))[0]
    position = (np.arange(quarter) + 0.5) * source / quarter
    # Pillow adds the step up from pixel to pixel, and may end just below a whole number.
    assert ((taken == np.floor(position)) | (taken == np.floor(position - 1e-9))).all()


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    draw=st.builds(Draw, st.booleans(), st.integers(-14, 14), st.integers(-14, 14)),
)
def test_image_and_label_stay_aligned(size: tuple[int, int], draw: Draw) -> None:
    """Every 4×4 block of the image holds its label + 1; nothing is black before."""
    label = torch.arange(size[0] * size[1]).reshape(size).remainder(19).to(torch.uint8)
    image = (label + 1).repeat_interleave(4, 0).repeat_interleave(4, 1).expand(3, -1, -1)
    moved, moved_label = Augmentation()(image.contiguous(), label, draw, IGNORE)
    mirrored = label.flip(-1) if draw.flip else label
    assert torch.equal(moved_label, shift(mirrored, draw.tx, draw.ty, IGNORE))
    seen = torch.where(moved_label == IGNORE, 0, moved_label + 1)
    assert torch.equal(moved[0], seen.repeat_interleave(4, 0).repeat_interleave(4, 1))
    kept = max(size[0] - abs(draw.ty), 0) * max(size[1] - abs(draw.tx), 0)
    assert int((seen > 0).sum()) == kept and torch.equal(moved[0], moved[2])


@pytest.mark.parametrize(("tx", "ty"), [*itertools.product((-2, -1, 0, 2), (-1, 0, 2))])
def test_published_shift_is_pads_then_crop(tx: int, ty: int) -> None:
    """As Pillow does it: a border, cut off where negative, then a crop that fills with 0."""
    rng = np.random.default_rng(0)
    image = rng.integers(1, 256, (3, 24, 32), dtype=np.uint8)
    label = rng.integers(1, 19, (6, 8), dtype=np.uint8)

    def published(array: np.ndarray, fill: int) -> np.ndarray:
        bordered = ImageOps.expand(Image.fromarray(array), (tx, ty, 0, 0), fill)
        return np.asarray(bordered.crop((0, 0, *array.shape[::-1])))

    augment = Augmentation(published_shift=True)
    tensors = torch.tensor(image), torch.tensor(label)
    moved, moved_label = augment(*tensors, Draw(False, tx, ty), IGNORE)
    assert (moved.numpy() == np.stack([published(channel, 0) for channel in image])).all()
    expected = published(label, 255)
    assert (moved_label.numpy() == np.where(expected == 255, IGNORE, expected)).all()


def test_draws_depend_on_seed_epoch_and_index_alone() -> None:
    def draws(**options: Any) -> list[Any]:
        augment = Augmentation(**options)
        return [augment.draw(epoch, index) for epoch in range(20) for index in range(100)]

    assert draws(seed=3) == draws(seed=3) != draws(seed=4)
    assert draws()[:100] != draws()[100:200]
    counts = Counter(draw[:3] for draw in draws(seed=3))  # 2 flips, 5×5 shifts: 40 of each
    assert len(counts) == 50 and min(counts.values()) > 15 and max(counts.values()) < 75
    assert {draw[:3] for draw in draws(flip=False, shift=0)} == {(False, 0, 0)}


def content(batches: Any) -> list[Any]:
    return [(b.indices.tolist(), b.images.tolist(), b.labels.tolist()) for b in batches]


def test_epoch_holds_every_image_and_ignores_the_number_of_workers(tree: Path) -> None:
    dataset = open_tree(tree, augment=Augmentation(seed=1))
    epoch: dict[str, Any] = {"batch_size": 2, "seed": 1, "epochs": [3]}
    state = torch.get_rng_state()
    whole = content(training_batches(dataset, **epoch))
    assert torch.equal(state, torch.get_rng_state()), "reading must not disturb dropout"
    assert [len(indices) for indices, _, _ in whole] == [2, 2, 2, 2, 1]
    assert sorted(index for indices, _, _ in whole for index in indices) == list(range(9))
    assert content(training_batches(dataset, **epoch, start=3)) == whole[3:]
    other = content(training_batches(dataset, **epoch | {"epochs": [4]}))
    assert [indices for indices, _, _ in other] != [indices for indices, _, _ in whole]
    both = iter(training_batches(dataset, **epoch | {"epochs": [3, 4]}, num_workers=2))
    read = [next(both), next(both)]  # one of each worker
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGHUP)  # a terminal that closes
    assert content([*read, *both]) == whole + other
    assert any(not torch.equal(dataset[4].image, dataset[e, 4].image) for e in range(9))


@settings(max_examples=100, deadline=None)
@given(*(st.integers(*limits) for limits in ((1, 40), (1, 5), (1, 4), (0, 3))))
def test_ranks_share_every_global_batch(n: int, batch: int, world: int, start: int) -> None:
    dataset = SceneDataset([None] * n, CITYSCAPES)
    options: dict[str, Any] = {"batch_size": batch, "world_size": world}
    epoch: dict[str, Any] = {"seed": 0, "epochs": [1]}
    if n < world:
        with pytest.raises(UserError, match="too few"):
            training_batches(dataset, **options, **epoch)
        return
    ranks = [
        training_batches(dataset, **options, **epoch, start=start, rank=rank).keys
        for rank in range(world)
    ]
    (order,) = training_batches(dataset, batch_size=n, **epoch).keys
    steps = list(zip(*ranks, strict=True))
    keys = [key for step in steps for part in step for key in part]
    assert keys == (order[start * batch * world :] if steps else [])
    for step in steps:
        assert 1 <= max(map(len, step)) <= min(map(len, step)) + 1


def test_mixed_sizes(tmp_path: Path) -> None:
    for i, width in enumerate((40, 40, 64, 40)):
        write_scene(tmp_path, f"town_{i}", (32, width))
    dataset = open_tree(tmp_path)
    (batch,) = training_batches(dataset, batch_size=4, seed=0, epochs=[1])
    assert batch.images.shape == (4, 3, 32, 64) and batch.labels.shape == (4, 8, 16)
    for image, label, index in zip(*batch, strict=True):
        item, width = dataset[int(index)], dataset[int(index)].image.shape[-1]
        assert torch.equal(image[..., :width], item.image) and not image[..., width:].any()
        assert torch.equal(label[:, : width // 4], item.label)
        assert (label[:, width // 4 :] == IGNORE).all()


@pytest.mark.parametrize(
    ("failing", "kind", "says"),
    [
        (UserError("x is gone"), UserError, "^x is gone$"),  # without the worker's traceback
        (OSError("a bug"), OSError, "a bug"),
        (lambda: signal.raise_signal(9), UserError, r"worker died .*--num-workers.*--shm-size"),
    ],
)
def test_a_worker_that_fails_ends_the_run(failing, kind, says, tree, monkeypatch) -> None:
    seconds = (0.2,)  # of torch's 5 between checks
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", seconds)
    read, fail = SceneDataset.read, Mock(side_effect=failing)
    monkeypatch.setattr(SceneDataset, "read", lambda self, i: fail() if i == 3 else read(self, i))
    with pytest.raises(kind, match=says):
        list(training_batches(open_tree(tree), batch_size=2, num_workers=2, seed=0, epochs=[1]))
    assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_workers_end_with_a_process_that_is_killed(tree: Path) -> None:
    """They wait at a full pipe by then, which nobody will read, and hold an end of another one."""
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe()

    def target() -> None:
        batches = iter(
            training_batches(open_tree(tree), batch_size=3, num_workers=2, seed=0, epochs=[1])
        )
        next(batches)
        its.send(len(multiprocessing.active_children()))
        time.sleep(60)

    process = context.Process(target=target)
    process.start()
    its.close()
    assert ours.recv() == 2
    process.kill()
    assert ours.poll(2), "a worker still has its end"
    process.join()


def test_batches_need_neither_shared_memory_nor_files(tree: Path) -> None:
    """Containers have little of /dev/shm, and a worker that can't hand over must not hang."""
    dataset = open_tree(tree)
    (batch,) = training_batches(dataset, batch_size=9, seed=0, epochs=[1])
    assert len(ForkingPickler.dumps(batch)) > batch.images.nbytes  # of a tensor it is a handle

    gc.collect()  # files that earlier tests left open would be closed within the limit
    used = {int(file.name) for file in Path("/proc/self/fd").iterdir()}
    unused = [number for number in range(1000) if number not in used]
    refused = pytest.raises(UserError, match=r"Too many open files.*ulimit -n")
    with limited(resource.RLIMIT_NOFILE, unused[4]), refused:
        list(training_batches(dataset, batch_size=1, num_workers=2, seed=0, epochs=[1]))


def test_class_weights_and_identity(tree: Path) -> None:
    """Weights are 1 / ln(1.1 + frequency); data that moved is the same, changed is not."""
    dataset = open_tree(tree, augment=Augmentation())
    labels = np.concatenate([item.label.numpy().ravel() for item in dataset])
    counted = labels[labels != IGNORE]
    expected = [1 / np.log(1.1 + np.mean(counted == k)) for k in range(19)]
    np.testing.assert_allclose(dataset.count_class_weights(), [*expected, 0])
    before = dataset.identity()
    moved = tree.rename(tree.with_name("moved"))
    assert open_tree(moved).identity() == before
    next(moved.rglob("town_03*.jpg")).write_bytes(b"other")
    changed = open_tree(moved).identity()
    if sys.platform == "linux":  # where a name may be no UTF-8
        write_scene(moved, os.fsdecode(b"caf\xe9"))
    assert len({before, changed, open_tree(moved).identity()}) == 3
