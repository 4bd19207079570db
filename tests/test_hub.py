"""Weights on a hub: files inside repositories, revisions, downloads that fail."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints_of_others import clips, pretraining, saved
from commands import begin, run_mar
from servers import Repository, free_port
from test_pretrained import vit_names
from torch import Tensor

from mar.errors import UserError
from mar.model.mar import MAR
from mar.weights.hub import ABSENT, HubName, fingerprint, locate
from mar.weights.known_weights import known_weights
from mar.weights.pretrained import check_start, load, model_settings
from mar.weights.reading import read_weights
from orchestration.studies.loader import read_study

FILE = "distill/vit_s.pth"
NAME = f"hub:someone/models/{FILE}@v1.1"


def content_of(tensors: dict[str, Tensor]) -> bytes:
    stream = io.BytesIO()
    torch.save({"module": tensors}, stream)
    return stream.getvalue()


@pytest.fixture
def served() -> Iterator[Repository]:
    repository = Repository(FILE, content_of(vit_names("", "q_bias")))
    yield repository
    repository.stop()


def show(name: str, address: str, home: Path) -> tuple[int, str]:
    """Run ``mar weights show`` against a hub; return the exit code and all that it printed."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home)}
    environment.pop("HF_HUB_OFFLINE", None)
    # A process of its own: the hub's client reads both variables when it is imported.
    process = begin(home.parent, "weights", "show", name, environment=environment)
    printed = process.communicate(timeout=200)[0]
    return process.returncode, printed


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("MCG-NJU/videomae-base", HubName("MCG-NJU/videomae-base")),
        ("MCG-NJU/videomae-base@3fa", HubName("MCG-NJU/videomae-base", None, "3fa")),
        ("vit_base_patch16_224.mae", HubName("timm/vit_base_patch16_224.mae")),
        (NAME, HubName("someone/models", FILE, "v1.1")),
        ("hub:someone/models", HubName("someone/models")),
    ],
)
def test_a_name_is_a_repository_a_file_in_it_and_a_revision(name: str, expected: HubName) -> None:
    assert HubName.parse(name) == expected


@pytest.mark.parametrize("name", ["hub:a/b//c.pth", "hub:a/b/../../c.pth"])
def test_a_name_that_leads_out_of_a_repository_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is neither a file, nor a name as"):
        locate(name)
    assert fingerprint(name) == f"{ABSENT}{name}"


def test_a_revision_may_have_slashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert locate("nobody/nothing@refs/pr/1") is None


def test_a_file_of_a_revision_is_fetched_from_the_mirror_once(
    served: Repository, tmp_path: Path
) -> None:
    code, printed = show(NAME, served.address, tmp_path)
    assert code == 0, printed
    assert "VideoMAE, fine-tuned" in printed
    # Of a file; the hub's client asks for other things of its own.
    asked = {path for _, path, _ in served.requests if "/api/" not in path}
    assert asked == {f"/someone/models/resolve/v1.1/{FILE}"}
    served.requests.clear()
    assert show(NAME, served.address, tmp_path) == (0, printed)
    again = [path for _, path, _ in served.requests if "/api/" not in path]
    assert again == [], "it is on this machine already"


def test_a_download_that_was_cut_is_resumed(tmp_path: Path) -> None:
    # Large enough: the hub's client writes pieces of 10 MiB.
    large = vit_names("", "q_bias") | {"large": torch.rand(6_000_000)}
    repository = Repository(FILE, content_of(large))
    repository.cut = True
    code, printed = show(NAME, repository.address, tmp_path)
    repository.stop()
    assert code == 0, printed
    starts = [span for method, _, span in repository.requests if method == "GET" and span]
    assert starts and not any(span.startswith("bytes=0-") for span in starts)


def test_a_file_that_was_damaged_on_its_way_is_refused_and_removed(tmp_path: Path) -> None:
    content = content_of(vit_names("", "q_bias"))
    damaged = content[:-100] + bytes(100)
    repository = Repository(FILE, content, damaged)
    code, printed = show(NAME, repository.address, tmp_path / "home")
    repository.stop()
    assert code == 2
    assert "was damaged on its way here; run the command again" in printed
    assert not [file for file in (tmp_path / "home").rglob("*") if file.name == "vit_s.pth"]


def test_without_a_way_to_the_hub_it_says_which_file_to_fetch(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    code, printed = show(NAME, address, tmp_path)
    assert code == 2
    assert f"fetch {address}/someone/models/resolve/v1.1/{FILE}, and give the file's" in printed
    code, printed = show("someone/other", address, tmp_path)
    assert code == 2
    assert f"config.json and model.safetensors from {address}/someone/other/tree/main" in printed


def test_a_path_inside_a_repository_without_the_prefix_is_told_about_it(tmp_path: Path) -> None:
    code, printed = show("someone/models/vit_s.pth", "http://127.0.0.1:9", tmp_path)
    assert code == 2
    assert "hub:owner/name/path" in printed


def test_known_weights_are_printed_with_their_licence(tmp_path: Path) -> None:
    listed = json.loads(run_mar(tmp_path, "weights", "list", "--json")[0])
    assert [each["name"] for each in listed] == [each.name for each in known_weights()]
    printed = run_mar(tmp_path, "weights", "list")[0]
    for each in known_weights():
        assert each.name in printed
        assert each.licence in printed
        of_videomae = each.model.startswith("VideoMAE")
        assert not of_videomae or "non-commercial" in each.licence


def test_recipes_of_known_weights_start_from_them() -> None:
    for each in known_weights():
        if each.recipe.startswith("recipes/"):
            weights = read_study(each.recipe).trials[0].settings.encoder.weights
            assert weights == each.name, each.recipe


def pretrained_names(tubelet: int, patch: int, hidden: int, extra: str) -> dict[str, Tensor]:
    """A pre-trained encoder of two blocks under VideoMAE's names, with its own sizes."""
    names = vit_names("encoder.", "q_bias")
    names["encoder.patch_embed.proj.weight"] = torch.rand(48, 3, tubelet, patch, patch)
    for block in range(2):
        stem = f"encoder.blocks.{block}.mlp"
        names[f"{stem}.fc1.weight"] = torch.rand(hidden, 48)
        names[f"{stem}.fc1.bias"] = torch.rand(hidden)
        names[f"{stem}.fc2.weight"] = torch.rand(48, hidden)
    return names | {f"{extra}.weight": torch.rand(8, 48), f"{extra}.bias": torch.rand(8)}


@pytest.mark.parametrize(
    ("tubelet", "patch", "hidden", "extra", "unused"),
    [
        (2, 14, 209, "encoder.head", "not known"),
        (1, 16, 192, "clip_decoder.0.head", "UMT's decoder of its teacher's features"),
    ],
    ids=["VideoMAE V2's giant", "UMT"],
)
def test_weights_of_other_shapes_under_videomaes_names_say_their_settings(
    tubelet: int, patch: int, hidden: int, extra: str, unused: str, tmp_path: Path
) -> None:
    torch.save(
        {"model": pretrained_names(tubelet, patch, hidden, extra)}, tmp_path / "pretrained.pth"
    )
    weights = read_weights(str(tmp_path / "pretrained.pth"))
    assert weights.settings["encoder.tubelet"] == [tubelet, patch, patch]
    assert weights.settings.get("encoder.mlp_ratio", 4.0) == hidden / 48
    assert set(weights.unused.values()) == {unused}
    settings = model_settings(
        weights,
        {
            "encoder": {"heads": 3, "weights": str(tmp_path / "pretrained.pth")},
            "clip": {"frames": 4, "size": 4 * patch},
            "reconstruction": {"init": "random"},
        },
    )
    assert settings.encoder.mlp_width == hidden
    check_start(settings)


@torch.no_grad()
def test_tubelets_of_one_frame_and_other_mlps_compute_what_transformers_does(
    tmp_path: Path,
) -> None:
    theirs = pretraining(tubelet_size=1, intermediate_size=209)
    weights = read_weights(saved(theirs, tmp_path))
    settings = model_settings(weights, {"mask": {"ratio": 0.0}, "reconstruction": {"weight": 0.0}})
    model = MAR(settings).eval()
    load(model, weights, settings, ("encoder.",))
    pixels, normalised = clips()
    every = torch.arange(64).expand(2, -1)
    expected = theirs.videomae(normalised).last_hidden_state
    torch.testing.assert_close(model.encode(pixels, every), expected, rtol=0, atol=1e-5)
