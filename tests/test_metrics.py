"""The confusion matrix against the published code's counts and against the definition."""

import json
from math import isnan
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.classes import CITYSCAPES
from eval.metrics import ConfusionMatrix, percent

GOLDEN = json.loads((Path(__file__).parent / "golden" / "iou_golden.json").read_text())


def golden_inputs() -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Predictions and labels (0..18, ignore 19) that the golden counts were made from."""
    rng = np.random.default_rng(3)
    p, y = rng.integers(0, 20, (3, 1, 40, 60)), rng.integers(0, 20, (3, 1, 40, 60))
    p2, y2 = p.copy(), y.copy()
    for absent in (3, 7, 16):
        y2[y2 == absent], p2[p2 == absent] = 0, 1
    y2[y2 == 12], p2[p2 == 14] = 5, 13
    p3 = np.where(np.random.default_rng(4).random(y.shape) < 0.3, p, y)
    return {
        "random_incl19": [(p, y)],
        "absent_3_7_16_gt12_pred14": [(p2, y2)],
        "two_batches": [(p, y), (p2, y2)],
        "correlated": [(p3, y)],
        "all_ignored": [(p, np.full_like(y, 19))],
        "nClasses19_no_ignore": [(p.clip(max=18), y.clip(max=18))],
    }


def count(*batches: tuple[np.ndarray, np.ndarray]) -> ConfusionMatrix:
    matrix = ConfusionMatrix(CITYSCAPES)
    for prediction, labels in batches:
        matrix.update(torch.from_numpy(prediction), torch.from_numpy(labels.astype(np.uint8)))
    return matrix


@pytest.mark.parametrize("case", golden_inputs())
def test_counts_are_the_published_ones(case: str) -> None:
    matrix, expected = count(*golden_inputs()[case]), GOLDEN[case]
    for name in ("tp", "fp", "fn"):
        if name in expected:
            assert getattr(matrix, name).tolist() == expected[name]
    assert matrix.iou.nan_to_num(0.0).tolist() == pytest.approx(expected["per_class"], abs=1e-12)
    assert matrix.mean_iou_published == pytest.approx(expected["mean"], abs=1e-12)


def test_golden_cases_are_all_used() -> None:
    assert set(golden_inputs()) == set(GOLDEN)


def test_what_occurs() -> None:
    """Truth 0 0 1, predicted 0 2 ignore; an ignored pixel is predicted as 3."""
    matrix = count((np.array([[[0, 2, 19, 3]]]), np.array([[[0, 0, 1, 19]]])))
    iou = matrix.iou.tolist()
    assert iou[0] == 0.5  # 1 of 2 pixels
    assert iou[1] == 0.0 and matrix.fn[1] == 1  # ignore predicted: missed
    assert iou[2] == 0.0 and matrix.fp[2] == 1  # predicted where there is none: counts
    assert all(isnan(value) for value in iou[3:])  # predicted on an ignored pixel: does not count
    assert matrix.mean_iou == pytest.approx(0.5 / 3)
    assert matrix.mean_iou_published == pytest.approx(0.5 / 19)


def test_nothing_counted() -> None:
    scores = count((np.zeros((1, 2, 2), int), np.full((1, 2, 2), 19))).scores()
    assert scores["mean_iou"] is None and scores["mean_iou_published"] == 0.0
    assert scores["per_class"] == dict.fromkeys(CITYSCAPES.names)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_logits_count_as_their_argmax_and_parts_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 20, 6, 7, generator=generator)
    labels = torch.randint(0, 20, (4, 6, 7), generator=generator, dtype=torch.uint8)
    parts = [ConfusionMatrix(CITYSCAPES) for _ in range(2)]
    parts[0].update(logits[:1], labels[:1])
    parts[1].update(logits[1:].argmax(1), labels[1:])
    whole = count((logits.argmax(1).numpy(), labels.numpy()))
    assert torch.equal((parts[0] + parts[1]).counts, whole.counts)
    assert int(parts[0].counts.sum()) == 6 * 7  # adding left the parts alone


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_counts_the_same() -> None:
    prediction, labels = (torch.from_numpy(x) for x in golden_inputs()["correlated"][0])
    matrices = [ConfusionMatrix(CITYSCAPES, device) for device in ("cpu", "cuda")]
    for matrix in matrices:
        device = matrix.counts.device
        matrix.update(prediction.to(device), labels.to(device))
    assert torch.equal(matrices[0].counts, matrices[1].counts.cpu())


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="differ"):
        ConfusionMatrix(CITYSCAPES).update(torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 3).long())


def test_a_label_outside_the_classes_is_no_silent_count() -> None:
    with pytest.raises(RuntimeError):
        count((np.zeros((1, 1, 1), int), np.full((1, 1, 1), 255)))
    with pytest.raises(ValueError, match="logits of 21 classes, where there are 20"):
        ConfusionMatrix(CITYSCAPES).update(torch.zeros(1, 21, 1, 1), torch.zeros(1, 1, 1).long())


@pytest.mark.parametrize(("fraction", "text"), [(0.68576, "68.58"), (0.0, "0.00"), (None, "–")])
def test_percent(fraction: float | None, text: str) -> None:
    assert percent(fraction) == text


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sets(st.integers(0, 19), min_size=1),
)
def test_iou_equals_a_naive_count(seed: int, height: int, width: int, occurring: set[int]) -> None:
    """Pixel by pixel, for any size and any set of classes."""
    rng = np.random.default_rng(seed)
    truth, prediction = rng.choice(sorted(occurring), (2, 1, height, width))
    matrix = ConfusionMatrix(CITYSCAPES)
    matrix.update(torch.from_numpy(prediction), torch.from_numpy(truth))
    for k in range(19):
        counted = [
            (t, p) for t, p in zip(truth.ravel(), prediction.ravel(), strict=True) if t != 19
        ]
        both = sum(t == p == k for t, p in counted)
        either = sum(k in (t, p) for t, p in counted)
        assert matrix.iou[k].item() == pytest.approx(
            both / either if either else float("nan"), nan_ok=True
        )
