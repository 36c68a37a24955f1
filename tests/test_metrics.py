"""The confusion matrix against the published code's counts and against the definitions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.classes import CITYSCAPES
from eval.metrics import confusion_matrix, percent, scores

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


def count(*batches: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
    counts = torch.zeros(20, 20, dtype=torch.int64)
    for prediction, labels in batches:
        truth = torch.from_numpy(labels.astype(np.uint8))
        counts += confusion_matrix(torch.from_numpy(prediction), truth, 20)
    return counts


@pytest.mark.parametrize("case", GOLDEN)
def test_counts_are_the_published_ones(case: str) -> None:
    matrix, expected = count(*golden_inputs()[case]), GOLDEN[case]
    tp = matrix[:19].diagonal()
    found = {"tp": tp, "fp": matrix[:19, :19].sum(0) - tp, "fn": matrix[:19].sum(1) - tp}
    for name, counts in found.items():
        if name in expected:
            assert counts.tolist() == expected[name]
    result = scores(matrix, CITYSCAPES)
    ious = [iou or 0.0 for iou in result["per_class"].values()]
    assert ious == pytest.approx(expected["per_class"], abs=1e-12)
    assert result["mean_iou_published"] == pytest.approx(expected["mean"], abs=1e-12)


def test_scores_of_a_map_counted_by_hand() -> None:
    """Logits count as their argmax; what does not fit is no silent count."""
    truth = torch.tensor([[[0, 0, 0, 1, 19]]], dtype=torch.uint8)
    prediction = torch.tensor([[[0, 0, 1, 1, 0]]])
    logits = torch.nn.functional.one_hot(prediction, 20).movedim(3, 1).float()
    result = scores(confusion_matrix(logits, truth, 20), CITYSCAPES)
    assert list(result["per_class"].values())[:3] == pytest.approx([2 / 3, 1 / 2, None])
    assert result["mean_iou"] == pytest.approx(7 / 12)
    assert result["mean_accuracy"] == pytest.approx(5 / 6)
    assert result["pixel_accuracy"] == pytest.approx(3 / 4)
    for wrong, error in ((prediction[..., :1], "differ"), (torch.zeros(1, 21, 1, 5), "21")):
        with pytest.raises(ValueError, match=error):
            confusion_matrix(wrong, truth, 20)
    nothing = scores(torch.zeros(20, 20), CITYSCAPES)
    assert json.loads(json.dumps(nothing, allow_nan=False)) == nothing
    assert percent(nothing["mean_iou"]) == "–"
