"""Weights in and out: every layout gives the same network, everything else is refused in one line that names it."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from datasets.classes import CITYSCAPES
from errors import UserError
from models import create_model, load_backbone, load_model, load_weights, save_model
from models.info import build
from models.segformer import SegFormer
from tests.conftest import ROOT
from tests.golden_data import published_key, seed

State = dict[str, Tensor]
IMAGES = torch.rand((1, 3, 64, 96), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network() -> SegFormer:
    return seed(create_model("segformer_b0")).eval()


@pytest.fixture(scope="module")
def plain(network: SegFormer) -> State:
    return network.state_dict()


@pytest.fixture(scope="module")
def logits(network: SegFormer) -> Tensor:
    with torch.no_grad():
        return network(IMAGES).logits


def modules(method: str) -> State:
    """What a distiller owns beside its student, under our names."""
    return {
        key: value
        for key, value in build(method).state_dict().items()
        if not key.startswith("student.")
    }


def released(method: str, student: State) -> State:
    """A distilled checkpoint as published: the student under `student.`, the modules beside it."""
    prefixed = {f"student.{key}": value for key, value in student.items()}
    return prefixed | {published_key(key): value for key, value in modules(method).items()}


def with_module(state: State) -> State:
    return {f"module.{key}": value for key, value in state.items()}


CHECKPOINT = {
    "epoch": 3,
    "arch": "SegFormer",
    "best_acc": torch.tensor(0.5),
    "optimizer": {"state": {}},
}
SCORES = {"best_acc": np.float64(0.5), "iou": np.float32(0.5), "step": np.int64(7)}
LAYOUTS: dict[str, Callable[[State], dict[str, Any]]] = {
    "plain": lambda s: s,
    "base": lambda s: released("TransKDBase", s),
    "gl": lambda s: released("TransKD_GL", s),
    "ea": lambda s: released("TransKD_EA", s),
    "ours_distilling": lambda s: {f"student.{k}": v for k, v in s.items()} | modules("TransKD_EA"),
    "module": with_module,
    "module_ea": lambda s: with_module(released("TransKD_EA", s)),
    "module_twice": lambda s: with_module(with_module(s)),
    "state_dict": lambda s: CHECKPOINT | {"state_dict": s},
    "model": lambda s: CHECKPOINT | {"model": s},
    "numbers_of_numpy": lambda s: CHECKPOINT | SCORES | {"model": "segformer_b0", "state_dict": s},
    "averaged": lambda s: {"model": {f"student.{k}": 2 * v for k, v in s.items()}, "averaged": s},
    "compiled": lambda s: with_module({f"_orig_mod.{k}": v for k, v in s.items()}),
    "state_dict_module_gl": lambda s: (
        CHECKPOINT | {"state_dict": with_module(released("TransKD_GL", s))}
    ),
}
NESTED = (
    "state_dict",
    "model",
    "numbers_of_numpy",
    "averaged",
    "state_dict_module_gl",
)  # safetensors have no nesting
FILES = [
    (layout, end)
    for layout in LAYOUTS
    for end in ("pth", "pth.tar", "safetensors")
    if not (layout in NESTED and end == "safetensors")
]


def write(content: dict[str, Any], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(("layout", "end"), FILES)
def test_every_layout_gives_the_same_network(
    layout: str, end: str, plain: State, logits: Tensor, tmp_path: Path
) -> None:
    model = load_model(write(LAYOUTS[layout](plain), tmp_path / f"weights.{end}"))
    assert (model.name, model.num_classes, model.training) == ("segformer_b0", 20, False)
    assert sum(p.numel() for p in model.parameters()) == 3_719_284
    with torch.no_grad():
        assert torch.equal(model(IMAGES).logits, logits)


def test_half_precision_and_the_old_file_format_are_read(plain: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({k: v.half() for k, v in plain.items()}, path, _use_new_zipfile_serialization=False)
    state = load_model(path).state_dict()
    assert all(torch.equal(state[k], v.half().to(v.dtype)) for k, v in plain.items())


def refusal(call: Callable[..., object], *arguments: object) -> str:
    """The message of the UserError that a call raises: one line."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


def changed(state: State, changes: dict[str, Tensor | None]) -> State:
    """`state` with some keys replaced, added or, by None, removed."""
    return {key: value for key, value in (state | changes).items() if value is not None}


@pytest.mark.parametrize("end", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"norm2.bias": None}, "1 missing: norm2.bias"),
        ({"norm5.bias": torch.zeros(3)}, "1 unknown: norm5.bias"),
        (
            {"norm2.bias": None, "head.bias": torch.zeros(3)},
            "1 missing: norm2.bias; 1 unknown: head.bias",
        ),
        ({"norm4.bias": torch.zeros(7)}, "1 of another shape: norm4.bias (7,) instead of (256,)"),
    ],
)
def test_keys_that_do_not_fit_are_named(
    end: str, changes: dict[str, Tensor | None], says: str, plain: State, tmp_path: Path
) -> None:
    path = write(changed(plain, changes), tmp_path / f"weights.{end}")
    message = refusal(load_model, path)
    assert says in message and str(path) in message
    assert says in refusal(load_weights, create_model("segformer_b0"), path)


def test_an_unknown_module_beside_the_student_is_named(plain: State, tmp_path: Path) -> None:
    state = released("TransKDBase", plain) | {"adapter.weight": torch.zeros(2)}
    assert "1 unknown: adapter.weight" in refusal(load_model, write(state, tmp_path / "w.pth"))


def test_a_refused_file_changes_nothing(plain: State, tmp_path: Path) -> None:
    model = create_model("segformer_b0")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = write(changed(plain, {"linear_pred.bias": None}), tmp_path / "w.pth")
    for load in (load_weights, load_backbone):
        refusal(load, model, path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_other_classes_and_other_sizes_say_what_they_are(tmp_path: Path) -> None:
    nineteen = write(create_model("segformer_b0", 19).state_dict(), tmp_path / "19.pth")
    assert load_model(nineteen).num_classes == 19
    message = refusal(load_weights, create_model("segformer_b0"), nineteen)
    assert "does not fit segformer_b0 with 20 classes" in message
    assert (
        "2 of another shape: linear_pred.weight (19, 256, 1, 1) instead of (20, 256, 1, 1)"
        in message
    )
    b2 = write(create_model("segformer_b2").state_dict(), tmp_path / "b2.pth")
    for load in (load_weights, load_backbone):
        message = refusal(load, create_model("segformer_b0"), b2)
        assert "does not fit segformer_b0" in message and "looks like segformer_b2" in message


OWN = ("Traffic_Light", "pond", "road", "ignore")


@pytest.mark.parametrize(
    ("names", "outputs", "own", "taken", "says"),
    [
        (
            CITYSCAPES.output_names,
            20,
            OWN,
            {0: 6, 2: 0, 3: 19},
            "lacks the classes pond; they start anew",
        ),
        (
            CITYSCAPES.names,
            19,
            OWN,
            {0: 6, 2: 0},
            "lacks the classes pond, ignore; they start anew",
        ),
        (CITYSCAPES.names, 19, CITYSCAPES.output_names, {i: i for i in range(19)}, ""),
        (None, 19, CITYSCAPES.output_names, {i: i for i in range(19)}, ""),
        (None, 19, OWN, {}, "lacks the classes Traffic_Light, pond, road, ignore; they start anew"),
    ],
    ids=["ours", "without ignore", "same", "nameless", "nameless and others"],
)
@pytest.mark.parametrize("architecture", ["segformer_b0", "pvt_v2_b0"])
def test_a_network_goes_on_with_other_classes(
    architecture: str,
    names: tuple[str, ...] | None,
    outputs: int,
    own: tuple[str, ...],
    taken: dict[int, int],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Everything is taken over but the classifier's rows of classes that it didn't know."""
    before, model = create_model(architecture, outputs), create_model(architecture, len(own))
    before.class_names, model.class_names = names, own
    save_model(before, tmp_path / "w.safetensors")
    ours, theirs = ({k: v.clone() for k, v in m.state_dict().items()} for m in (model, before))
    assert load_backbone(model, tmp_path / "w.safetensors") is True
    assert says in capsys.readouterr().err if says else not capsys.readouterr().err
    for key, value in model.state_dict().items():
        if key.startswith(("linear_pred", "head.conv_seg")):
            for row, found in enumerate(value):
                assert torch.equal(
                    found, theirs[key][taken[row]] if row in taken else ours[key][row]
                )
        else:
            assert torch.equal(value, theirs[key])


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"linear_pred.weight": torch.tensor(1.0)}, "no class in linear_pred.weight"),
        ({"linear_pred.weight": torch.zeros(0, 256, 1, 1)}, "no class in linear_pred.weight"),
        ({"patch_embed1.proj.weight": torch.zeros(0, 3, 7, 7)}, "no model that is known"),
        ({"norm1.weight": torch.full((32,), torch.nan)}, "NaN or infinity (norm1.weight)"),
        (
            {"norm1.weight": torch.full((32,), 1e300, dtype=torch.float64)},
            "NaN or infinity (norm1.weight)",
        ),
        ({"norm1.weight": torch.zeros(32, device="meta")}, "not a state dict: norm1.weight"),
        ({"norm1.weight": torch.zeros(32).to_sparse()}, "not a state dict: norm1.weight"),
        (
            {"norm1.weight": torch.zeros(32, dtype=torch.complex64)},
            "not a state dict: norm1.weight",
        ),
    ],
    ids=["a number", "no rows", "no channels", "NaN", "infinity", "meta", "sparse", "complex"],
)
def test_tensors_that_are_no_weights(odd: State, says: str, plain: State, tmp_path: Path) -> None:
    torch.save(plain | odd, tmp_path / "weights.pth")
    assert says in refusal(load_model, tmp_path / "weights.pth")


def test_other_files_say_what_they_are(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    (tmp_path / "page.pth").write_text("<html>Sign in")
    (tmp_path / "text.pth").write_text("hello")
    recwarn.clear()
    assert "(it is a TorchScript program)" in refusal(load_model, tmp_path / "script.pt")
    for name in ("page.pth", "text.pth"):
        assert "(it is no PyTorch checkpoint)" in refusal(load_model, tmp_path / name)
    assert not recwarn.list


@pytest.mark.parametrize("end", ["pth", "pth.tar", "safetensors"])
@pytest.mark.parametrize("kept", [0, 7, 1000, -1000, -1])
def test_truncated_files_are_refused(kept: int, end: str, plain: State, tmp_path: Path) -> None:
    path = write(plain, tmp_path / f"weights.{end}")
    path.write_bytes(path.read_bytes()[:kept])
    assert str(path) in refusal(load_model, path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
        ({}, "is empty"),
        ({"epoch": 3, "norm1.weight": torch.zeros(3)}, "not a state dict: epoch"),
        ({1: torch.zeros(3)}, "not a state dict: 1"),
        ({"state_dict": 3}, "not a state dict: state_dict"),
        ({"fc.weight": torch.zeros(3)}, "no model that is known here (fc.weight)"),
    ],
)
def test_what_is_no_network_is_refused(content: object, says: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    assert says in refusal(load_model, path)


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<html>")
    assert "page.pth can't be read as weights (it is no PyTorch checkpoint);" in refusal(
        load_model, tmp_path / "page.pth"
    )
    (tmp_path / "student.onnx").write_bytes(b"\x08")
    assert "student.onnx is for eval/predict.py alone" in refusal(
        load_model, tmp_path / "student.onnx"
    )


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    assert "no weights at" in refusal(load_model, tmp_path / "nothing.pth")
    save_file({}, tmp_path / "empty.safetensors")
    assert "name a file there (empty.safetensors)" in refusal(
        load_model, tmp_path
    )  # a run's folder
    assert "no model that is known" in refusal(load_model, tmp_path / "empty.safetensors")


class Malice:
    """Unpickled without care, it makes a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(
    zipped: bool, plain: State, tmp_path: Path
) -> None:
    path, victim = tmp_path / "weights.pth", tmp_path / "victim"
    torch.save(plain | {"extra": Malice(victim)}, path, _use_new_zipfile_serialization=zipped)
    for load in (load_model, lambda p: load_weights(create_model("segformer_b0"), p)):
        assert re.search(
            r"not hold tensors alone \(reading it would call \w+\.mkdir\); if you trust it",
            refusal(load, path),
        )
        assert not victim.exists()
    torch.load(path, weights_only=False)
    assert victim.exists()  # it would have worked


@pytest.mark.parametrize(
    "head",
    [{"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}, {}],
    ids=["head", "none"],
)
@pytest.mark.parametrize(
    "wrapper", [lambda s: s, with_module, lambda s: {"model": s}], ids=["plain", "module", "model"]
)
def test_imagenet_files_start_a_backbone_and_are_no_model(
    head: State, wrapper: Callable[[State], dict[str, Any]], plain: State, tmp_path: Path
) -> None:
    encoder = {k: v for k, v in plain.items() if not k.startswith("linear_")}
    path = tmp_path / "mit_b0.pth"
    torch.save(wrapper(encoder | head), path)
    model = create_model("segformer_b0")
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    assert load_backbone(model, path) is False
    for key, value in model.state_dict().items():
        assert torch.equal(value, encoder[key] if key in encoder else fresh[key]), key
    assert "segformer_b0's encoder without a decode head" in refusal(load_model, path)
    torch.save(wrapper(changed(encoder, {"norm1.bias": None})), path)
    assert "1 missing: norm1.bias" in refusal(load_backbone, model, path)


def test_a_whole_network_starts_a_backbone_with_its_head(plain: State, tmp_path: Path) -> None:
    model = create_model("segformer_b0")
    assert load_backbone(model, write(released("TransKDBase", plain), tmp_path / "w.pth")) is True
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())


def test_saved_models_say_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    model = create_model("segformer_b0", num_classes=7)
    save_model(model, path, epoch=4, mean_iou=0.5)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["model"], metadata["num_classes"]) == ("segformer_b0", "7")
    assert json.loads(metadata["facts"]) == {"epoch": 4, "mean_iou": 0.5}
    loaded = load_model(path)
    assert loaded.num_classes == 7
    assert all(
        torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items()
    )
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_checkpoint_tells_what_its_network_expects(
    plain: State, logits: Tensor, tmp_path: Path
) -> None:
    """Training's own checkpoints keep the normalisation as the weights' metadata do."""
    content = {
        "model": {f"student.{key}": value for key, value in plain.items()},
        "optimizer": {},
        "state": {"step": 3},
    }
    normalisation = [[0.5, 0.25, 0.0], [0.5, 1.0, 2.0]]
    torch.save(
        content | {"metadata": {"normalisation": json.dumps(normalisation)}}, tmp_path / "best.pt"
    )
    model = load_model(tmp_path / "best.pt")
    assert [list(values) for values in model.normalisation] == normalisation
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalisation)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES * std + mean).logits, logits)
    torch.save(content | {"metadata": {}}, tmp_path / "best.pt")
    assert load_model(tmp_path / "best.pt").normalisation is None
    for damaged in (
        "[[1, 2, 3]]",
        "{",
        "[[0, 0], [1, 1]]",
        "3",
        '[["a", 0, 0], [1, 1, 1]]',
        "[[0, 0, 0], [0, 1, 1]]",
    ):
        torch.save(content | {"metadata": {"normalisation": damaged}}, tmp_path / "best.pt")
        assert "tells a normalisation that is none" in refusal(load_model, tmp_path / "best.pt")


FILE_SIZE = 2**20  # the kernel lets no file grow beyond: writing a network ends in the middle


def test_a_failure_while_saving_leaves_the_old_file(
    network: SegFormer, logits: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "student.safetensors"
    save_model(network, path)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, unlimited[1]))
    try:
        message = refusal(save_model, create_model("segformer_b0"), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert str(path) in message
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with torch.no_grad():
        assert torch.equal(load_model(path)(IMAGES).logits, logits)


KILLED_WHILE_SAVING = """
import resource, signal, sys
from pathlib import Path
from models import create_model, save_model

model = create_model("segformer_b0")
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
save_model(model, Path(sys.argv[1]))
"""


def test_a_kill_while_saving_leaves_the_old_file(
    network: SegFormer, logits: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "student.safetensors"
    save_model(network, path)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, path, str(FILE_SIZE)], cwd=ROOT, timeout=120
    )
    assert done.returncode == -signal.SIGXFSZ
    with torch.no_grad():
        assert torch.equal(load_model(path)(IMAGES).logits, logits)
