"""Names of the Hugging Face hub in the place of paths, against a hub on this machine."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as settings
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save
from torch import Tensor

from errors import UserError
from models import create_model, load_model, read_checkpoint
from models.hub import is_hub_name, upload
from models.layouts import IMAGENET
from models.layouts.huggingface import architecture, to_huggingface
from tests.golden_data import seed
from tests.server import Server, serving

NAME = "someone/segformer-b0"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}
NETWORK = seed(create_model("segformer_b0")).eval()
IMAGES = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: torch.nn.Module, images: Tensor = IMAGES) -> Tensor:
    return model(images).logits


def publish(server: Server, revision: str, files: dict[str, bytes]) -> None:
    """What snapshot_download asks for: the commit, the list of its files, each file."""
    commit = COMMITS[revision]
    api = f"api/models/{NAME}"
    server.files[f"{api}/revision/{revision}"] = json.dumps({"id": NAME, "sha": commit}).encode()
    tree = [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()]
    server.files[f"{api}/tree/{commit}"] = json.dumps(tree).encode()
    for path, content in files.items():
        server.files[f"{NAME}/resolve/{commit}/{path}"] = content


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub with one network in Hugging Face's layout; the cache is empty."""
    with serving() as server:
        # As HF_ENDPOINT and HF_HOME, which are read once, set them.
        monkeypatch.setattr(settings, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(settings, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(settings, "HF_HUB_CACHE", str(tmp_path / "cache"))
        weights = save(to_huggingface(NETWORK.state_dict()))
        config = json.dumps(architecture("segformer_b0")).encode()
        files = {"model.safetensors": weights, "config.json": config}
        others = {"README.md": b"a card", "pytorch_model.bin": b"the same"}
        processor = "preprocessor_config.json"
        publish(server, "main", others | files | {processor: b'{"size": {"shortest_edge": 96}}'})
        publish(server, "v2", files | {processor: b'{"do_normalize": false}'})
        yield server


def test_a_name_is_downloaded_once(hub: Server) -> None:
    """The weights and the configurations alone; a revision is another network."""
    for _ in range(2):
        assert torch.equal(logits(load_model(NAME)), logits(NETWORK, IMAGENET(IMAGES)))
        assert read_checkpoint(NAME).facts == {"height": 96}
        files = [path.rsplit("/", 1)[1] for path, _ in hub.asked if "/resolve/" in path]
        assert sorted(files) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert torch.equal(logits(load_model(f"{NAME}@v2")), logits(NETWORK))


def test_pickled_weights_are_taken_where_there_are_no_others(hub: Server, tmp_path: Path) -> None:
    torch.save(to_huggingface(NETWORK.state_dict()), tmp_path / "w")
    publish(hub, "main", {"pytorch_model.bin": (tmp_path / "w").read_bytes(), "config.json": b"{}"})
    assert torch.equal(logits(load_model(NAME)), logits(NETWORK, IMAGENET(IMAGES)))


def test_offline_the_cache_serves(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(load_model(NAME))
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits(load_model(NAME)), expected)
    with pytest.raises(UserError, match=r"someone/else is no file here, .*the connection"):
        load_model("someone/else")


@pytest.mark.parametrize("refusal", [(401, ""), (403, "GatedRepo")], ids=["private", "gated"])
def test_what_may_not_be_read_is_refused(refusal: tuple[int, str], hub: Server) -> None:
    hub.refusal = refusal
    says = rf"{NAME} is no file here, .* gives none \(.*{refusal[0]}.*`hf auth login`"
    with pytest.raises(UserError, match=says) as error:
        load_model(NAME)
    assert "\n" not in str(error.value)


def test_a_connection_that_breaks(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.breaks[f"{NAME}/resolve/{COMMITS['main']}/model.safetensors"] = 0
    with pytest.raises(UserError, match="the same command continues"):
        load_model(NAME)
    hub.breaks.clear()
    assert torch.equal(logits(load_model(NAME)), logits(NETWORK, IMAGENET(IMAGES)))


def test_uploads(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This hub takes none; what would be sent is seen where the library takes it."""
    with pytest.raises(UserError, match=rf"doesn't take it as {NAME} \(.*501.*`hf auth login`"):
        upload(tmp_path, NAME)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, exist_ok: None)
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **sent: sent)
    assert upload(tmp_path, NAME) == str({"repo_id": NAME, "folder_path": tmp_path})


def test_paths_are_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "weights").mkdir(parents=True)
    for path in ("here/weights", "here/missing", "other/s.pth", "/other/student", "a/b/c"):
        assert not is_hub_name(path)
    assert is_hub_name(NAME) and is_hub_name(Path(f"{NAME}@refs/pr/1"))
