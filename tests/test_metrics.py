"""The confusion matrix against the published code's counts and against the definitions."""

import json
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("case", GOLDEN)
def test_counts_are_the_published_ones(case: str) -> None:
    matrix, expected = count(*golden_inputs()[case]), GOLDEN[case]
    for name in ("tp", "fp", "fn"):
        if name in expected:
            assert getattr(matrix, name).tolist() == expected[name]
    scores = matrix.scores()
    ious = [iou or 0.0 for iou in scores["per_class"].values()]
    assert ious == pytest.approx(expected["per_class"], abs=1e-12)
    assert scores["mean_iou_published"] == pytest.approx(expected["mean"], abs=1e-12)


def test_nothing_counted() -> None:
    scores = count((np.zeros((1, 2, 2), int), np.full((1, 2, 2), 19))).scores()
    assert scores["mean_iou"] is scores["pixel_accuracy"] is scores["mean_accuracy"] is None
    assert scores["per_class"] == dict.fromkeys(CITYSCAPES.names)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert [percent(fraction) for fraction in (0.68576, 0.0, None)] == ["68.58", "0.00", "–"]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.sets(st.integers(0, 19), min_size=1),
)
def test_scores_equal_a_naive_count(seed: int, size: Any, occurring: set[int]) -> None:
    """Pixel by pixel, for any set of classes; logits count as their argmax, and parts add up."""
    rng = np.random.default_rng(seed)
    truth, prediction = rng.choice(sorted(occurring), (2, 2, *size))
    matrix = count((prediction[:1], truth[:1]))
    logits = torch.nn.functional.one_hot(torch.from_numpy(prediction[1:]), 20).movedim(3, 1)
    matrix.update(logits.float(), torch.from_numpy(truth[1:]))

    pairs = [(t, p) for t, p in zip(truth.flat, prediction.flat, strict=True) if t != 19]
    ious, accuracies = [], []
    for k in range(19):
        both = sum(t == p == k for t, p in pairs)
        either = sum(k in (t, p) for t, p in pairs)
        true = sum(t == k for t, _ in pairs)
        ious.append(both / either if either else None)
        accuracies += [both / true] if true else []
    scores = matrix.scores()
    assert list(scores["per_class"].values()) == pytest.approx(ious)
    if pairs:
        assert scores["mean_iou"] == pytest.approx(np.mean([x for x in ious if x is not None]))
        assert scores["mean_accuracy"] == pytest.approx(np.mean(accuracies))
        assert scores["pixel_accuracy"] == pytest.approx(sum(t == p for t, p in pairs) / len(pairs))


def test_what_does_not_fit_is_no_silent_count() -> None:
    labels = torch.zeros(1, 1, 1, dtype=torch.long)
    for wrong, error in ((torch.zeros(1, 1, 2).long(), "differ"), (torch.zeros(1, 21, 1, 1), "21")):
        with pytest.raises(ValueError, match=error):
            ConfusionMatrix(CITYSCAPES).update(wrong, labels)
    with pytest.raises(RuntimeError):
        ConfusionMatrix(CITYSCAPES).update(labels, labels + 255)
