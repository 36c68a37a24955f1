"""The paper's ablations and baselines: what each compares, and that a name trains what its own script trains."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from datasets.classes import CITYSCAPES
from errors import UserError
from models import SegmentationModel, SegmentationOutput, create_model, load_model, save_model
from models.checkpoints import strip_wrappers
from models.distillation import Distiller
from models.distillation.methods import METHODS, Settings
from models.distillation.skd import pairwise_similarity_loss
from tests.golden_data import golden_input, golden_labels, seed
from train import TransKDBase, distill

EMBEDS = ["embed1", "embed2", "embed3", "embed4"]
LOSSES = {
    **{
        name: ["hcl", *EMBEDS]
        for name in ("transkd_base", "transkd_gl", "transkd_gl_add", "transkd_ea", "gl_ea")
    },
    **{name: ["hcl"] for name in ("csf", "reviewkd")},
    **{name: EMBEDS for name in ("pea", "ea")},
    **{name: [name] for name in ("response", "cwd", "cwd_logits")},
    "skd": ["pairwise"],
}


@pytest.fixture(scope="module")
def teacher() -> SegmentationModel:
    return seed(create_model("segformer_b1"))


def build(name: str, teacher: SegmentationModel, **settings: object) -> Distiller:
    return seed(
        METHODS[name](
            create_model("segformer_b0"), teacher, CITYSCAPES.weights, Settings(**settings)
        )
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(
    name: str, teacher: SegmentationModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its terms, a gradient for every parameter, and the teacher's head only where its logits are compared."""
    heads = []
    decode = teacher.decode
    monkeypatch.setattr(teacher, "decode", lambda features: heads.append(1) or decode(features))
    distiller = build(name, teacher).train()
    losses = distiller(golden_input("A"), golden_labels())
    assert list(losses) == ["ce", *LOSSES[name]]
    assert len(heads) == (name in ("response", "cwd_logits"))
    sum(losses[term] for term in LOSSES[name]).backward()
    for term, loss in losses.items():
        assert torch.isfinite(loss) and loss > 0, term
    untouched = {
        k
        for k, p in distiller.named_parameters()
        if p.grad is None and not k.startswith("student.")
    }
    assert all("fc1.0" in key for key in untouched)  # CSF's squeeze for a batch of one
    assert distiller.student.patch_embed1.proj.weight.grad.abs().max() > 0
    assert strip_wrappers(distiller.state_dict()).keys() == distiller.student.state_dict().keys()


def test_what_the_baselines_weigh(teacher: SegmentationModel) -> None:
    """As their docstrings and docs/RESULTS.md say."""
    response, logits, cwd, skd = (
        build(name, teacher) for name in ("response", "cwd_logits", "cwd", "skd")
    )
    assert response.logit_losses["response"][1:] == (1.0, 1.0)
    assert logits.logit_losses["cwd_logits"][1:] == (3.0, 4.0)
    assert (cwd.weight, cwd.temperature, skd.weight) == (50.0, 4.0, 0.5)


@pytest.mark.parametrize("name", ["response", "cwd", "cwd_logits", "skd", "reviewkd"])
def test_losses_stay_in_float32(name: str, teacher: SegmentationModel) -> None:
    distiller = build(name, teacher).eval()
    with torch.no_grad():
        exact = distiller(golden_input("A"), golden_labels())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = distiller(golden_input("A"), golden_labels())
    for term, loss in rounded.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[term].item(), rel=0.1), term


def outputs(classes: int) -> SegmentationOutput:
    return SegmentationOutput(torch.randn(2, classes, 3, 5), (), ())


def test_response_is_hintons_loss_over_the_classes_that_count(teacher: SegmentationModel) -> None:
    distiller = build("response", teacher, baseline={"weight": 2.0, "temperature": 3.0})
    s, t = outputs(20), outputs(20)
    p, q = (
        out.logits[:, :19].permute(0, 2, 3, 1).reshape(-1, 19).div(3).softmax(1) for out in (t, s)
    )
    expected = 2 * 3**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distiller.compare_logits(s, t)["response"], expected)
    s.logits[:, 19], t.logits[:, 19] = 50, -50  # "ignore"
    torch.testing.assert_close(distiller.compare_logits(s, t)["response"], expected)


@pytest.mark.parametrize("name", ["response", "cwd_logits"])
def test_logits_of_other_classes_are_refused(name: str) -> None:
    """A teacher without an output for "ignore" is welcome."""
    assert build(name, create_model("segformer_b1", 19)).needs_teacher_logits
    with pytest.raises(UserError, match="the teacher has 40 outputs and the student 20"):
        build(name, create_model("segformer_b1", 40))


def test_pairwise_similarities() -> None:
    """Of the maxima of 2×2 windows: two rows of them, and three columns, of which the last is one pixel wide."""
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 5, 4, 5)
    expected = 0.0
    for b in range(2):
        windows = [
            [x[b, :, i : i + 2, j : j + 2].amax((1, 2)) for i in (0, 2) for j in (0, 2, 4)]
            for x in (s, t)
        ]
        for i in range(6):
            for j in range(6):
                a_s, a_t = (F.cosine_similarity(x[i], x[j], dim=0) for x in windows)
                expected += (a_s - a_t) ** 2 / (2 * 6 * 6)
    torch.testing.assert_close(pairwise_similarity_loss(s, t), expected)
    assert pairwise_similarity_loss(t, 3 * t) < 1e-12
    assert pairwise_similarity_loss(s[:, :, :1, :1], t[:, :, :1, :1]) < 1e-12  # a single place


def test_one_stage_and_its_limits(teacher: SegmentationModel) -> None:
    distiller = build("pea", teacher, stages=(3,), losses={"embed_weights": (1.0,)})
    assert list(distiller(golden_input("A"), golden_labels())) == ["ce", "embed3"]
    for name in ("transkd_gl", "gl_ea"):
        with pytest.raises(UserError, match="stage 4"):
            build(name, teacher, stages=(3,))


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("skd", {"kd_temperature": 2.0}, "no --kd-temperature"),
        ("csf", {"kd_weight": 2.0}, "no --kd-weight"),
        ("csf", {"embed": 3}, "no --embed"),
        ("reviewkd", {"embed_weights": (1.0, 1.0, 1.0, 1.0)}, "no --embed"),
        ("response", {"embed": 3}, "no --embed"),
        ("cwd", {"knowledge_distillation_loss": "KL"}, "no --knowledge-distillation-loss"),
        ("pea", {"review_kd_loss_weight": 2.0}, "no --knowledge-distillation-loss"),
        *(
            (name, {"embed": 0}, "--embed 0|stage 4")
            for name in ("pea", "ea", "transkd_gl", "transkd_ea", "gl_ea")
        ),
        ("student", {"embed": 2}, "no --embed"),
        ("student", {"kd_weight": 2.0}, "no --kd-weight"),
        ("student", {"logits_weight": 5.0}, "--logits-weight is 5.0"),
        ("response", {"logits_weight": 5.0}, "--logits-weight is 5.0"),
    ],
)
def test_flags_that_a_method_does_not_have(
    name: str, flags: dict, says: str, teacher: SegmentationModel
) -> None:
    with pytest.raises(UserError, match=says):
        settings = distill.Options(datadir=Path(), method=name, **flags).settings
        METHODS[name](create_model("segformer_b0"), teacher, None, settings)


@pytest.mark.parametrize(
    ("name", "fusion"), [("transkd_base", True), ("csf", True), ("cwd_logits", False)]
)
def test_flags_that_change_nothing_else(
    name: str, fusion: bool, teacher: SegmentationModel
) -> None:
    """`--embed 0` is CSF alone, and says nothing new to who aligns nothing."""
    settings = distill.Options(datadir=Path(), method=name, embed=0).settings
    distiller = METHODS[name](create_model("segformer_b0"), teacher, None, settings)
    assert distiller.alignment is None and (distiller.fusion is not None) == fusion


def test_a_narrow_teacher_is_refused_where_it_would_be_projected_onto(
    teacher: SegmentationModel,
) -> None:
    for name, method in METHODS.items():
        student, narrow = create_model("segformer_b1"), create_model("segformer_b0")
        if name in ("response", "cwd_logits", "skd"):
            losses = method(student, narrow, None, Settings())(golden_input("A"), golden_labels())
            assert losses["ce"] > 0 and len(losses) == 2
        else:
            with pytest.raises(
                UserError, match="segformer_b0 is narrower than the student segformer_b1"
            ):
                method(student, narrow, None, Settings())


def test_weight_and_temperature_reach_the_loss(teacher: SegmentationModel) -> None:
    once, twice = (
        build("cwd", teacher, baseline={"weight": w, "temperature": 2.0}).eval() for w in (1.0, 2.0)
    )
    with torch.no_grad():
        a, b = (d(golden_input("A"), golden_labels())["cwd"] for d in (once, twice))
    assert once.temperature == 2 and b.item() == pytest.approx(2 * a.item())


@pytest.mark.slow
def test_a_name_trains_as_the_methods_own_script(
    teacher: SegmentationModel, scenes: Path, tmp_path: Path
) -> None:
    save_model(teacher, tmp_path / "teacher.safetensors")
    common: dict[str, Any] = {
        "datadir": scenes,
        "height": 64,
        "max_steps": 2,
        "num_workers": 0,
        "tensorboard": False,
        "device": "cpu",
        "teacher_model": teacher.name,
        "teacher_weights": tmp_path / "teacher.safetensors",
    }
    TransKDBase.main(TransKDBase.Options(output_dir=tmp_path / "script", **common))
    distill.main(distill.Options(method="transkd_base", output_dir=tmp_path / "name", **common))
    distill.main(
        distill.Options(method="skd", student_model="lvt", output_dir=tmp_path / "skd", **common)
    )
    a, b, lvt = (
        load_model(tmp_path / run / "student.safetensors") for run in ("script", "name", "skd")
    )
    assert all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
    assert lvt.name == "lvt"
    assert '"pairwise"' in (tmp_path / "skd" / "metrics.jsonl").read_text()
    assert json.loads((tmp_path / "name" / "options.json").read_text())["method"] == "transkd_base"


def test_names() -> None:
    assert set(LOSSES) | {"student"} == set(distill.NAMES)
