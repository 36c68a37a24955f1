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

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from datasets import (
    LAYOUTS,
    Augmentation,
    evaluation_batches,
    open_split,
    training_batches,
    use_cache,
)
from datasets.classes import CITYSCAPES
from datasets.scenes import SceneDataset
from datasets.transforms import Draw, shift
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


@pytest.mark.parametrize(
    ("outputs", "names", "expected"),
    [
        (20, None, list(range(20))),
        (19, [f"LABEL_{i}" for i in range(19)], list(range(19))),
        (20, ["void", *NAMES[::-1]], [*range(19, 0, -1), 0]),
        (19, [name.title().replace(" ", "_") for name in NAMES[1:] + NAMES[:1]], [18, *range(18)]),
        (12, None, "12 classes, and Cityscapes has 19"),
        (19, ["lawn", *NAMES[1:]], "it has lawn; it lacks road"),
        (19, NAMES[:1] + NAMES[:18], "it lacks bicycle"),
    ],
)
def test_a_networks_classes_in_our_order(outputs: int, names: Any, expected: Any) -> None:
    if isinstance(expected, list):
        assert CITYSCAPES.order("w.pth", outputs, names) == expected
    else:
        with pytest.raises(UserError, match=rf"w\.pth predicts .*{expected}"):
            CITYSCAPES.order("w.pth", outputs, names)


# --- pairing


@settings(max_examples=25, deadline=None)
@given(*(st.sets(st.sampled_from(["a_1", "a_2", "a_10", "b_1"])) for _ in range(3)))
def test_pairing_is_by_name(tmp_path_factory: Any, images: Any, train_ids: Any, ids: Any) -> None:
    root = tmp_path_factory.mktemp("pairs")
    images = images | {"z_0"}
    for names, place, ending in (
        (images, "leftImg8bit", "leftImg8bit"),
        (train_ids, "gtFine", "gtFine_labelTrainIds"),
        (ids, "gtFine", "gtFine_labelIds"),
    ):
        for name in names:
            path = root / place / "val" / name[0] / f"{name}_{ending}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    samples, orphans = LAYOUTS["cityscapes"].find(root, "val")
    found = {}
    for sample in samples:
        name = sample.image.name.removesuffix("_leftImg8bit.png")
        found[name] = (sample.label and sample.label.name, sample.encoding)
    expected = dict.fromkeys(images, (None, "train_ids"))
    expected |= {name: (f"{name}_gtFine_labelIds.png", "label_ids") for name in images & ids}
    for name in images & train_ids:  # which come first
        expected[name] = (f"{name}_gtFine_labelTrainIds.png", "train_ids")
    assert found == expected and list(found) == sorted(found, key=lambda name: f"{name}_")
    assert len(orphans) == len(train_ids - images) + len(ids - images)


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


@pytest.mark.parametrize(
    ("dataset", "options", "words"),
    [
        ("ACDC", {}, "no .* images in .*rgb_anon/fog/train; expected rgb_anon/{condition}/train/"),
        ("cityscapes", {"height": 31}, "height 31 is too small"),
    ],
)
def test_splits_that_are_not_there(dataset: str, options: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "leftImg8bit/train").mkdir(parents=True)
    with pytest.raises(UserError, match=words):
        open_split(dataset, tmp_path, "train", **options)


ROOMS = ("living", "living room 1", "a/1", "b/1", "images/a/1", "a 2/hall", "c.png", "c")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("\ufeffliving\n\n", ["living"]),
        ("living room 1", ["living room 1"]),
        ("living.png\n living ", ["living"]),
        ("images/../images//living", ["living"]),
        ("ROOT/images/living.png", ["living"]),
        ("/images/living.png labels40/living.png", ["living"]),
        ("images/living.png,labels40/living_gt.png", ["living"]),
        ("images/c.png", ["c"]),  # not c.png.png
        ("images/a/1.png", ["a/1"]),  # not images/images/a/1.png
        ("images/a 2/hall.png", ["a 2/hall"]),  # no pair
        ("c.png", r"fit no image, or several: 1 \(c.png\)"),
        ("living room 2", r"several: 1 \(living room 2\); give paths like images/"),
        ("living\nzebra\nhorse", r"several: 2 \(zebra, horse\)"),
        ("", "it names none"),
        ("caf\udce9", "can't read the list .*decode"),
        (None, "can't read the list .*No such file"),
    ],
)
def test_lists(lines: str | None, expected: Any, tmp_path: Path) -> None:
    """Beside a file `living.png`, a line `living room 2` means none."""
    for name in ROOMS:
        write(tmp_path / f"images/{name}.png", np.zeros((32, 32, 3)))
        write(tmp_path / f"labels40/{name}.png", np.ones((32, 32)))
    if lines is not None:
        text = lines.replace("ROOT", str(tmp_path))
        (tmp_path / "train.txt").write_text(text, errors="surrogateescape")
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            open_split("NYUv2", tmp_path, "train")
        return
    names = [f"images/{name}.png" for name in expected]
    assert [s.name for s in open_split("NYUv2", tmp_path, "train").samples] == names
    # There is no val.txt: test.txt validates.
    (tmp_path / "test.txt").write_text("\n".join(f"images/{name}.png" for name in ROOMS))
    chosen = {"list_file": tmp_path / "train.txt"}
    assert [s.name for s in open_split("NYUv2", tmp_path, "val", **chosen).samples] == names


@pytest.mark.skipif(sys.platform == "darwin", reason="its names are UTF-8")
def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    write_scene(tmp_path, os.fsdecode(b"caf\xe9"))
    found = open_tree(tmp_path)
    use_cache(found, tmp_path / "cache")
    assert found.cache is not None and len(found.identity()) == 20


# --- augmentation


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


# --- batches


def content(batches: Any) -> list[Any]:
    return [(b.indices.tolist(), b.images.tolist(), b.labels.tolist()) for b in batches]


def test_epoch_holds_every_image_and_ignores_the_number_of_workers(tree: Path) -> None:
    dataset = open_tree(tree, augment=Augmentation(seed=1))
    epoch: dict[str, Any] = {"batch_size": 2, "seed": 1, "epoch": 3}
    state = torch.get_rng_state()
    whole = content(training_batches(dataset, **epoch))
    assert torch.equal(state, torch.get_rng_state()), "reading must not disturb dropout"
    assert [len(indices) for indices, _, _ in whole] == [2, 2, 2, 2, 1]
    assert sorted(index for indices, _, _ in whole for index in indices) == list(range(9))
    assert content(training_batches(dataset, **epoch, num_workers=2)) == whole
    assert content(training_batches(dataset, **epoch, start=3)) == whole[3:]
    other = content(training_batches(dataset, **epoch | {"epoch": 4}))
    assert [indices for indices, _, _ in other] != [indices for indices, _, _ in whole]
    assert any(not torch.equal(dataset[4].image, dataset[e, 4].image) for e in range(9))


@settings(max_examples=100, deadline=None)
@given(*(st.integers(*limits) for limits in ((1, 40), (1, 5), (1, 4), (0, 3))))
def test_ranks_share_every_global_batch(n: int, batch: int, world: int, start: int) -> None:
    dataset = SceneDataset([None] * n, CITYSCAPES)
    options: dict[str, Any] = {"batch_size": batch, "world_size": world}
    epoch: dict[str, Any] = {"seed": 0, "epoch": 1}
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
    ranks = [evaluation_batches(dataset, **options, rank=rank).keys for rank in range(world)]
    assert sorted(key for keys in ranks for step in keys for key in step) == list(range(n))


def test_mixed_sizes(tmp_path: Path) -> None:
    for i, width in enumerate((40, 40, 64, 40)):
        write_scene(tmp_path, f"town_{i}", (32, width))
    dataset = open_tree(tmp_path)
    batches = list(evaluation_batches(dataset, batch_size=3))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1], [2], [3]]
    (batch,) = training_batches(dataset, batch_size=4, seed=0, epoch=1)
    assert batch.images.shape == (4, 3, 32, 64) and batch.labels.shape == (4, 8, 16)
    for image, label, index in zip(*batch, strict=True):
        item, width = dataset[int(index)], dataset[int(index)].image.shape[-1]
        assert torch.equal(image[..., :width], item.image) and not image[..., width:].any()
        assert torch.equal(label[:, : width // 4], item.label)
        assert (label[:, width // 4 :] == IGNORE).all()


class Failing(SceneDataset):
    """Reading sample 3 raises an error, or kills the process."""

    error: Exception | None = None

    def __getitem__(self, key: Any) -> Any:
        if key == 3 and self.error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if key == 3 and self.error is not None:
            raise self.error
        return super().__getitem__(key)


@pytest.mark.parametrize("error", [UserError("x is gone"), OSError("a bug"), KeyError("a bug")])
@pytest.mark.parametrize("workers", [0, 2])
def test_errors_arrive_from_workers(tree: Path, error: Exception, workers: int) -> None:
    """A user's mistake without the worker's traceback; no worker outlives them."""
    dataset = Failing(open_tree(tree).samples, CITYSCAPES, height=32)
    dataset.error = error
    with pytest.raises(type(error), match=str(error)) as caught:
        list(evaluation_batches(dataset, batch_size=2, num_workers=workers))
    assert not multiprocessing.active_children()
    assert not isinstance(error, UserError) or str(caught.value) == "x is gone"


def test_a_dead_worker_ends_the_run(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = (0.2,)  # of torch's 5 between checks
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", seconds)
    dataset = Failing(open_tree(tree).samples, CITYSCAPES, height=32)
    with pytest.raises(UserError, match=r"worker died \(.*exited.*--num-workers.*--shm-size"):
        list(evaluation_batches(dataset, num_workers=2))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_workers_end_with_a_process_that_is_killed(tree: Path) -> None:
    """They wait at a full pipe by then, which nobody will read."""
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe()

    def target() -> None:
        batches = iter(evaluation_batches(open_tree(tree), batch_size=3, num_workers=2))
        next(batches)
        its.send([worker.pid for worker in multiprocessing.active_children()])
        time.sleep(60)

    def is_alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
        except OSError:
            return False

    process = context.Process(target=target)
    process.start()
    workers = ours.recv()
    assert len(workers) == 2 and all(map(is_alive, workers))
    process.kill()
    process.join()
    time.sleep(0.5)
    left = list(filter(is_alive, workers))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def test_batches_need_neither_shared_memory_nor_files(tree: Path) -> None:
    """Containers have little of /dev/shm, and a worker that can't hand over must not hang."""
    dataset = open_tree(tree)
    (batch,) = evaluation_batches(dataset, batch_size=9)
    assert len(ForkingPickler.dumps(batch)) > batch.images.nbytes  # of a tensor it is a handle

    expected = content(evaluation_batches(dataset))
    gc.collect()  # files that earlier tests left open would be closed within the limit
    used = {int(file.name) for file in Path("/proc/self/fd").iterdir()}
    unused = [number for number in range(1000) if number not in used]
    with limited(resource.RLIMIT_NOFILE, unused[16]):  # two workers take about twelve
        found = list(evaluation_batches(dataset, num_workers=2))
    assert content(found) == expected
    refused = pytest.raises(UserError, match=r"Too many open files.*ulimit -n")
    with limited(resource.RLIMIT_NOFILE, unused[4]), refused:
        list(evaluation_batches(dataset, num_workers=2))


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
    assert open_tree(moved).identity() != before
