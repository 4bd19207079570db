"""``mar weights push``: what a hub is sent, and what is refused before anything is."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import BIN
from servers import Hub, free_port

import mar
from mar.weights.reading import read_weights

TOKEN = "hf_0123456789secret"


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.stop()


def push(
    folder: Path, address: str, *arguments: str, token: str = TOKEN, code: int = 0
) -> subprocess.CompletedProcess[str]:
    # Another home: a token of whoever runs the tests must not be found.
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_TOKEN": token,
        "HF_HOME": str(folder / "home"),
    }
    done = subprocess.run(
        [BIN / "mar", "weights", "push", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_a_model_is_sent_with_card_settings_and_class_names(hub: Hub, tmp_path: Path) -> None:
    printed = push(tmp_path, hub.address, "mini", "me/it").stdout
    assert f"{hub.address}/me/it/commit/1" in printed
    created = next(body for path, body, _ in hub.requests if path.endswith("/repos/create"))
    assert json.loads(created)["visibility"] == "private"
    folder = tmp_path / "again"
    folder.mkdir()
    for name, content in hub.files().items():
        (folder / name).write_bytes(content)
    assert "# it\n" in (folder / "README.md").read_text()
    sent = read_weights(str(folder))
    own = read_weights("mini")
    assert sent.classes == own.classes
    for name, tensor in own.tensors.items():
        torch.testing.assert_close(sent.tensors[name], tensor, rtol=0, atol=0)
    assert mar.load(folder).classes == mar.load("mini").classes


def test_a_new_repository_is_public_only_if_asked(hub: Hub, tmp_path: Path) -> None:
    push(tmp_path, hub.address, "mini", "me/it", "--public")
    created = next(body for path, body, _ in hub.requests if path.endswith("/repos/create"))
    assert json.loads(created)["visibility"] == "public"


def test_a_dry_run_sends_nothing(hub: Hub, tmp_path: Path) -> None:
    printed = push(tmp_path, hub.address, "mini", "me/it", "--dry-run").stdout
    assert "model.safetensors, 1." in printed
    assert f"not sent   to {hub.address}/me/it" in printed
    assert not hub.requests


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("me/it", "", "no token for the hub: set HF_TOKEN"),
        ("it", TOKEN, "it: expected OWNER/NAME"),
        ("me/it/that", TOKEN, "me/it/that: Repo id must be"),
    ],
)
def test_a_mistake_is_named_before_anything_is_sent(
    hub: Hub, tmp_path: Path, name: str, token: str, message: str
) -> None:
    assert message in push(tmp_path, hub.address, "mini", name, token=token, code=2).stderr
    assert not hub.requests


def test_a_hub_that_is_not_there_is_a_failure_in_one_line(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    done = push(tmp_path, address, "mini", "me/it", code=1)
    assert f"{address} did not take me/it" in done.stderr
    assert "Traceback" not in done.stderr
