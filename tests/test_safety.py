"""Attacks: each ends with a message, in seconds, in bounded memory; nothing is overwritten."""

import http.server
import json
import os
import resource
import socketserver
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from commands import run_mar
from conftest import BUCKET, tiny_tree

from mar.atomic_dir import read_atomic_dir, write_atomic_dir, write_text
from mar.config.input_settings import DataConfig
from mar.config.schema import TrainingConfig
from mar.data.annotations import read_split
from mar.data.cache_index import Index, Packing
from mar.data.decoders import write_video
from mar.data.frame_cache import CachedVideo, pack
from mar.data.sampling import Reader
from mar.data.video.sequential_reader import BrokenVideo
from mar.errors import Failure, UserError, notice
from mar.safe_input import below, read_json
from mar.safe_text import cell, markdown, printable
from mar.weights.hub import weight_files
from mar.weights.reading import read_weights
from mar.weights.safe_loading import read_tensors
from orchestration import secrets
from orchestration.backends import ray_jobs
from orchestration.backends.ray_jobs import Jobs, printable_arguments
from orchestration.config import LaunchConfig
from orchestration.storage.object_store import ObjectStore

BIN = Path(sys.executable).parent
Settings = Callable[..., TrainingConfig]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", ".", "..", "a\0b"])
def test_a_name_that_somebody_else_wrote_stays_below_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leaves this folder"):
        below(tmp_path, name)
    assert below(tmp_path, "trials/a b/ρ.json") == tmp_path / "trials" / "a b" / "ρ.json"


def test_keys_of_a_bucket_write_nothing_outside_the_folder(s3: None, tmp_path: Path) -> None:
    import boto3

    victim, cache = tmp_path / "victim.txt", tmp_path / "cache"
    victim.write_text("mine")
    client: Any = boto3.client("s3")
    for workdir in ("evil/cache", "evil/trials/t/step_00000001"):
        client.put_object(Bucket="bucket", Key=f"{workdir}/manifest.json", Body=b'{"files": {}}')
        client.put_object(
            Bucket="bucket", Key=f"{workdir}/../victim.txt", Body=b"theirs, and longer"
        )
    with pytest.raises(UserError, match=r"victim\.txt' leaves this folder"):
        ObjectStore(f"{BUCKET}/evil/cache").download_missing("", cache)
    assert not [*cache.glob("*")], "nothing is written before all names are looked at"
    with pytest.raises(UserError, match="leaves this folder"):
        ObjectStore(f"{BUCKET}/evil").download_dir("trials/t/step_00000001", tmp_path / "step")
    assert victim.read_text() == "mine"
    assert {each.name for each in tmp_path.iterdir()} <= {".downloading", "victim.txt", "cache"}


def test_a_manifest_and_an_index_name_no_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("content")
    write_atomic_dir(tmp_path / "folder", {"file": lambda file: write_text(file, "content")}, {})
    manifest = tmp_path / "folder" / "manifest.json"
    output = json.loads(manifest.read_text())
    output["files"] = {"../outside": output["files"]["file"]}
    manifest.write_text(json.dumps(output))
    with pytest.raises(Failure, match="leaves this folder"):
        read_atomic_dir(tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../outside"}}'
    )
    with pytest.raises(UserError, match="leaves this folder"):
        weight_files(tmp_path / "folder")
    with pytest.raises(UserError, match="leaves this folder"):
        LaunchConfig(store=tmp_path).trial_folder("../../home")


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"files": []}', '{"files": {"a": 1}}', "[]", "9" * 5000, "\xff"]
)
def test_a_damaged_manifest_is_said(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(Failure, match="it is not complete"):
        read_atomic_dir(tmp_path)


_TEN = "[" + ", ".join(["*{}"] * 10) + "]"
_MULTIPLIED = "a: &a [1, 1]\n" + "".join(
    f"{name}: &{name} {_TEN.replace('{}', before)}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_MULTIPLIED, "its aliases stand for more than"),
        ("axes: &a {b: *a}\n", "an alias refers to itself"),
        ("axes: " + "[" * 20_000 + "\n", "nested too deeply"),
        ("axes: " + "{a: " * 20_000 + "\n", "nested too deeply"),
        ("seeds: [" + "9" * 5000 + "]\n", "a number of 5000 characters"),
        ("title: " + "x" * 2**20 + "\n", "larger than 1 MiB"),
        ("title: 2026-02-30\n", "day is out of range"),
    ],
)
def test_a_study_that_is_to_exhaust_the_machine_is_refused_in_words(
    content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "study.yaml").write_text(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, errors = run_mar(tmp_path, "plan", "study.yaml", code=2)
    assert "study.yaml" in errors and message in errors
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, (
        "less than a GiB, in KiB"
    )


@pytest.mark.parametrize("value", ["[" * 20_000, "9" * 5000, "&a [*a]"])
def test_a_setting_on_the_command_line_is_read_as_carefully(value: str, tmp_path: Path) -> None:
    _, errors = run_mar(tmp_path, "plan", "quickstart", f"mask.ratio={value}", code=2)
    assert "mask.ratio" in errors


def test_settings_that_would_exhaust_the_memory_are_refused(tiny: Settings) -> None:
    for path, value in {
        "encoder.width": 10**9,
        "classifier.depth": 10**9,
        "clip.size": 2**20,
        "clip.frames": 10**9,
        "data.num_classes": 10**12,
    }.items():
        with pytest.raises(ValueError, match=path.split(".")[0]):
            tiny({path: value})
    with pytest.raises(ValueError, match="tokens; at most"):
        tiny({"clip.size": 4096, "encoder.tubelet": [2, 4, 4]})


def test_a_tensor_asks_for_no_more_memory_than_the_file_has_values_for(tmp_path: Path) -> None:
    torch.save({"encoder.embed.weight": torch.zeros(1).expand(20 * 2**30)}, tmp_path / "large.pth")
    assert (tmp_path / "large.pth").stat().st_size < 4096
    with pytest.raises(UserError, match=r"encoder\.embed\.weight asks for more memory"):
        read_tensors(tmp_path / "large.pth")
    torch.save({"weight": torch.zeros(2**20)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "small.pth", "w") as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="refused, because it is compressed"):
        read_tensors(tmp_path / "small.pth")


_CONFIG = {
    "model_type": "videomae",
    "hidden_act": "gelu",
    "num_attention_heads": 2,
    "image_size": 16,
    "num_frames": 8,
}
_WRONG: list[Any] = [[], {}, "x", -1, 10**30, 1.5, True, [[[]]], {"a": {"b": []}}]


def test_a_damaged_config_beside_weights_is_refused_in_words(
    tiny: Settings, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from mar.model.mar import MAR
    from mar.weights.pretrained import model_settings

    save_file(MAR(tiny()).state_dict(), tmp_path / "model.safetensors")
    file = tmp_path / "config.json"
    output = {
        "model_type": "mar",
        "settings": tiny().model_dump(mode="json"),
        "id2label": {"0": "a", "1": "b"},
    }
    damaged = [
        "[" * 100_000,
        "{",
        "[]",
        "9" * 5000,
        '{"settings": []}',
        '{"model_type": [], "settings": {"a": {}}}',
    ]
    damaged += [json.dumps({**output, name: value}) for name in output for value in _WRONG]
    damaged += [json.dumps({**output, "settings": {"encoder": value}}) for value in _WRONG]
    damaged += [
        json.dumps({**output, "settings": {"encoder": {"width": value}}}) for value in _WRONG
    ]
    for content in damaged:
        file.write_text(content)
        try:
            model_settings(read_weights(str(tmp_path)))
        except ValueError as error:  # a user's error, or a setting's
            assert len(str(error)) < 2000


def test_a_damaged_index_of_a_frame_cache_is_said(tiny: Settings, tmp_path: Path) -> None:
    data, folder = tiny().data, tmp_path / "cache"
    pack(data, folder, Packing("raw", 16), 1, lambda done, total: None)
    shard = folder / "00000.json"
    whole, settings = json.loads(shard.read_text()), (folder / "cache.json").read_text()
    wrong = [*_WRONG, None]
    contents = ["[" * 100_000, "{", "[]", "9" * 5000, "null"]
    contents += [
        json.dumps({**whole, name: value}) for name in ("bytes", "entries") for value in wrong
    ]
    for name in whole["entries"][0]:
        contents += [
            json.dumps({**whole, "entries": [{**whole["entries"][0], name: value}]})
            for value in wrong
        ]
    video = read_split(data, "train")[0]
    entry = next(each for each in whole["entries"] if each["name"] == video.name)
    for content in contents:
        shard.write_text(content)
        try:
            Index(folder)
        except UserError as error:
            assert "damaged" in str(error)
    for name, value in {
        "start": 10**6,
        "ends_at": 0,
        "height": 10**6,
        "num_frames": 10**5,
        "width": 3,
    }.items():
        shard.write_text(json.dumps({**whole, "entries": [{**entry, name: value}]}))
        with pytest.raises((UserError, BrokenVideo), match="damaged"):
            CachedVideo(Index(folder), video).frames([0, 1, 5])
    shard.write_text(json.dumps(whole))
    for content in [
        "[" * 100_000,
        "{}x",
        '{"format": "raw", "short_side": -1}',
        '{"short_side": "a"}',
    ]:
        (folder / "cache.json").write_text(content)
        with pytest.raises(UserError, match="not a frame cache's settings"):
            Index(folder)
    (folder / "cache.json").write_text(settings)
    Index(folder)


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{address}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile good.mp4\nfile nested.mp4\n",
    "svg": (
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image '
        'href="{address}"/></svg>'
    ),
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video 5004 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
    "<BaseURL>{address}</BaseURL></Period></MPD>",
    "ffmetadata": ";FFMETADATA1\ntitle=x\n",
}


@pytest.fixture
def callback() -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []

    class Noting(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with socketserver.TCPServer(("127.0.0.1", 0), Noting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("decoder", ["auto", "pyav", "decord"])
def test_a_file_that_names_others_is_no_video(
    kind: str, decoder: str, tmp_path: Path, callback: tuple[str, list[str]]
) -> None:
    address, asked = callback
    write_video(tmp_path / "good.mp4", np.zeros((8, 32, 32, 3), np.uint8))
    (tmp_path / "nested.mp4").write_text("ffconcat version 1.0\n" + "file nested.mp4\n" * 50)
    for target in (f"{address}/x.mp4", (tmp_path / "good.mp4").as_uri(), "good.mp4"):
        (tmp_path / "video.mp4").write_text(PLAYLISTS[kind].replace("{address}", target))
        with pytest.raises(BrokenVideo, match="not a video that can be decoded"):
            Reader(tmp_path / "video.mp4", decoder)
    assert asked == []


def test_a_name_in_a_list_is_a_file_below_the_root_and_never_an_address(
    tmp_path: Path, callback: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, asked = callback
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "good.mp4", np.zeros((8, 32, 32, 3), np.uint8))
    names = [
        f"{address}/x.mp4",
        f"file:{tmp_path}/good.mp4",
        f"subfile,,start,0,end,0,,:{tmp_path}/good.mp4",
    ]
    names += ["concat:good.mp4|good.mp4", "pipe:0", "data:video/mp4;base64,AAAA"]
    for name in names:
        for decoder in ("auto", "pyav", "decord"):
            with pytest.raises(BrokenVideo, match="no such file"):
                Reader(Path(name), decoder)
    tree = tiny_tree(tmp_path)
    tree["data"] |= {
        "format": "list",
        "root": ".",
        "videos": ".",
        "train": "train.txt",
        "val": "val.txt",
    }
    (tmp_path / "train.txt").write_text("".join(f"{name} 0\n" for name in names))
    (tmp_path / "val.txt").write_text("good.mp4 0\n")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    output, _ = run_mar(tmp_path, "data", "check", "recipe.yaml", "--processes", "1", code=1)
    assert output.count("no such file") + output.count("leaves the video folder") == len(names)
    assert asked == []


_OPENED = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
from mar.data.video.sequential_reader import BrokenVideo
from mar.data.sampling import Reader
for name in sys.argv[2:]:
    try:
        with Reader(Path(name), sys.argv[1]) as reader:
            print(name, len(reader), reader.frames([0, 5]).shape)
    except BrokenVideo as broken:
        print(name, "broken", broken.reason)
"""


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_a_small_file_with_an_absurd_header_ends_no_process(decoder: str, tmp_path: Path) -> None:
    """2 KB that state two thousand million frames, or a duration of years, ended the process."""
    write_video(
        tmp_path / "good.mp4",
        np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8),
    )
    good = (tmp_path / "good.mp4").read_bytes()
    fields = {
        b"stts": (8, 12, 16),
        b"stsz": (12, 16),
        b"mdhd": (16, 20),
        b"mvhd": (16, 20),
        b"tkhd": (24,),
    }
    fields |= {
        b"elst": (12, 16),
        b"stsc": (8, 12, 16),
        b"stco": (8, 12),
        b"avc1": (24, 28),
        b"stsd": (12, 16),
    }
    names: list[str] = []
    for box, targets in fields.items():
        for workdir in targets:
            for value in (0x7FFFFFFF, 0xFFFFFFFF, 0x10000000):
                at = good.index(box) + workdir
                name = f"{box.decode()}_{workdir}_{value:x}.mp4"
                (tmp_path / name).write_bytes(good[:at] + struct.pack(">I", value) + good[at + 4 :])
                names.append(name)
    done = subprocess.run(
        [sys.executable, "-c", _OPENED, decoder, *names],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == len(names)


def test_words_of_others_are_shown_and_not_obeyed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        printable("a\x1b]0;title\x07\u202e\x9b31m ρ\n\té")
        == r"a\x1b]0;title\x07\u202e\x9b31m ρ" + "\n\té"
    )
    assert str(UserError("\x1b[2J")) == str(Failure("\x1b[2J")) == r"\x1b[2J"
    assert str(BrokenVideo(tmp_path / "\x1b[2J.mp4", "x")).endswith(r"\x1b[2J.mp4: x")
    notice("\x1b[2J")
    assert r"\x1b[2J" in capsys.readouterr().err
    assert [
        cell(value) for value in ("=1+1", "+a", "-a", "@a", "\ta", "-0.5", "+1e3", "a=1", -1, None)
    ] == [
        "'=1+1",
        "'+a",
        "'-a",
        "'@a",
        "'\ta",
        "-0.5",
        "+1e3",
        "a=1",
        -1,
        None,
    ]
    assert markdown("<script>x</script> <img src=y> [a](javascript:b) | < 5 % <") == (
        r"\<script>x\</script> \<img src=y> [a]\(javascript:b) \| < 5 % <"
    )


def test_labels_of_a_study_are_neutral_in_every_file_of_its_report(
    tmp_path: Path, videos: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(videos)))
    evil = {"=cmd|' /C calc'!A0": {}, "<script>alert(1)</script>": {"mask.ratio": 0.75}}
    study = {
        "title": "<img src=x onerror=alert(1)>",
        "recipe": "recipe.yaml",
        "axes": {"@axis": evil},
    }
    (tmp_path / "evil.yaml").write_text(yaml.safe_dump(study))
    run_mar(
        tmp_path,
        "run",
        "evil.yaml",
        "--backend",
        "local",
        "recipe.epochs=1",
        "recipe.warmup_epochs=0",
    )
    folder = tmp_path / "mar_store" / "reports" / "evil"
    page = (folder / "report.md").read_text() + (folder / "table.md").read_text()
    assert r"\<script>" in page and "<script>" not in page.replace(r"\<script>", "")
    assert "<img" not in page.replace(r"\<img", "")
    for file in folder.glob("*.csv"):
        for line in file.read_text().splitlines():
            assert not line.startswith(("=", "@")) and ",=" not in line and ",@" not in line


def test_names_in_the_csv_of_a_data_check_are_neutral(tmp_path: Path, videos: Path) -> None:
    from mar.data.validation import DataReport, Finding, report_text, write_findings

    found = Finding("train", "=HYPERLINK(1).mp4", "missing", "\x1b[2Jno such file")
    counts = {
        "ok": 0,
        "missing": 1,
        "unreadable": 0,
        "short": 0,
        "refused": 0,
        "duplicate": 0,
        "wrong": 0,
        "stale": 0,
    }
    report = DataReport({"train": counts}, [found], {"train": {"a": 0}}, None, ())
    write_findings(report, tmp_path / "found.csv")
    assert "'=HYPERLINK" in (tmp_path / "found.csv").read_text()
    assert "\x1b" not in report_text(report)


def test_a_jobs_command_has_neither_a_webhook_nor_a_password(tmp_path: Path) -> None:
    arguments = [
        "recipe.epochs=2",
        "--webhook",
        "https://hooks.example/T0/SECRET",
        "--backend",
        "local",
    ]
    assert printable_arguments(arguments, tmp_path) == [
        "recipe.epochs=2",
        "--webhook",
        "@webhook.txt",
        "--backend",
        "local",
    ]
    assert (tmp_path / "webhook.txt").read_text() == "https://hooks.example/T0/SECRET"
    assert (tmp_path / "webhook.txt").stat().st_mode & 0o777 == 0o600
    assert printable_arguments(["--webhook=https://hooks.example/x"], tmp_path) == [
        "--webhook=@webhook.txt"
    ]
    (tmp_path / "own.txt").write_text("https://hooks.example/own\n")
    assert printable_arguments(["--webhook", f"@{tmp_path / 'own.txt'}"], tmp_path) == [
        "--webhook",
        "@webhook.txt",
    ]
    assert (tmp_path / "webhook.txt").read_text() == "https://hooks.example/own"
    with pytest.raises(UserError, match="or @FILE with one in it") as caught:
        printable_arguments(["--webhook", "hooks.example/T0/SECRET"], tmp_path)
    assert "SECRET" not in str(caught.value)
    with pytest.raises(UserError, match="leave user and password out") as caught:
        printable_arguments(["--tracking-uri", "https://ada:hunter2@mlflow.example"], tmp_path)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(UserError, match="leave the keys out of the address") as caught:
        ObjectStore("s3://KEY:hunter2@bucket/x")
    assert "hunter2" not in str(caught.value)


def test_rays_token_is_readable_by_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "auth_token"
    token.write_text("token")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    secrets.close_token_file()
    assert token.stat().st_mode & 0o777 == 0o600
    token.unlink()
    secrets.close_token_file()


def test_the_stores_pages_answer_to_this_machines_names_alone(tmp_path: Path) -> None:
    import urllib.error
    import urllib.request

    from commands import wait_for
    from servers import free_port

    from orchestration.tracking.embedded import serve

    port = free_port()
    command, environment = serve(LaunchConfig(store=tmp_path / "mar_store"), port)
    (tmp_path / "mar_store").mkdir()
    server = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answer(host: str, origin: str | None = None) -> int:
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search",
            b'{"max_results": 1}',
            {
                "Host": host,
                "Content-Type": "application/json",
                **({"Origin": origin} if origin else {}),
            },
        )
        try:
            with urllib.request.urlopen(asked, timeout=20) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    try:
        wait_for(lambda: answer(f"127.0.0.1:{port}") == 200, timeout_s=120)
        assert answer("localhost:6000") == 200, "through ssh -L"
        for host in (
            "10.evil.example",
            "192.168.evil.example:5000",
            "evil.example",
            "172.16.evil.example",
        ):
            assert answer(host) == 403
        assert answer(f"127.0.0.1:{port}", "http://evil.example") == 403
        assert answer(f"127.0.0.1:{port}", f"http://127.0.0.1:{port}") == 200
    finally:
        server.terminate()
        server.wait()


def test_json_is_read_in_bounded_time(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 10**6)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "deep.json")
    os.truncate(tmp_path / "deep.json", 2**40)
    with pytest.raises(ValueError, match="larger than"):
        read_json(tmp_path / "deep.json")


_LISTS: dict[str, tuple[str, list[str]]] = {
    "list": (
        "train.txt",
        ["a.mp4 " + "9" * 5000, "x" * 300_000 + " 0", "x" + " " * 200_000 + "y", "a\0b.mp4 0", "["],
    ),
    "kinetics": (
        "train.csv",
        [
            "label,youtube_id,time_start,time_end\nx," + "y" * 200_000 + ",0,1",
            "label,youtube_id,time_start,time_end\nx,y," + "9" * 5000 + ",1",
            "label,youtube_id,time_start,time_end\nx,../../y,1,2",
            "label,youtube_id,time_start,time_end\nx",
            '"' * 7,
        ],
    ),
    "ssv2": (
        "train.json",
        ["[" * 100_000, '[{"id": {}, "template": []}]', "[1]", "9" * 5000, '[{"label_idx": -1}]'],
    ),
    "ucf101": ("classInd.txt", ["9" * 5000 + " a", "x" * 300_000, "\x1b[2J 1"]),
}


@pytest.mark.parametrize("kind", _LISTS)
def test_a_list_of_videos_that_is_to_exhaust_the_machine_is_refused_in_words(
    kind: str, tmp_path: Path
) -> None:
    name, contents = _LISTS[kind]
    for content in contents:
        for other in (
            "trainlist01.txt",
            "testlist01.txt",
            "validation.json",
            "val.csv",
            "val.txt",
            "labels.json",
        ):
            (tmp_path / other).write_text("[]")
        (tmp_path / name).write_text(content)
        data = DataConfig(format=kind, root=str(tmp_path), num_classes=2)  # pyright: ignore[reportArgumentType]
        with pytest.raises(UserError) as caught:
            read_split(data, "train")
        assert len(str(caught.value)) < 4200 and str(caught.value).isprintable()


@pytest.mark.parametrize("backslashes", ["", "\\", "\\\\", "\\\\\\"])
@pytest.mark.parametrize("attack", ["<img src=x onerror=alert(1)>", "[a](javascript:b)", "a|b"])
def test_no_backslash_of_a_text_frees_html_or_links_in_markdown(
    backslashes: str, attack: str
) -> None:
    from markdown_it import MarkdownIt

    text = f"before {backslashes}{attack} after"
    row = f"| {markdown(text)} | last |\n"
    page = MarkdownIt("commonmark").enable("table").render(f"| a | b |\n|---|---|\n{row}")
    assert "<img" not in page and "<a " not in page
    assert page.count("<td>") == 2
    assert "<td>last</td>" in page


class _Away:
    """A dashboard that is gone, as Ray's client shows it."""

    def __init__(self, reason: Exception) -> None:
        self.reason = reason

    def list_jobs(self) -> list[Any]:
        raise self.reason

    get_job_info = tail_job_logs = stop_job = list_jobs


@pytest.mark.parametrize("reason", [RuntimeError("Request failed"), ConnectionError("refused")])
def test_a_dashboard_that_fails_while_a_job_is_followed_is_a_failure_in_words(
    reason: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs.__new__(Jobs)
    jobs.address = "http://127.0.0.1:8265"
    jobs.client = cast(Any, _Away(reason))
    monkeypatch.setattr(Jobs, "_known", lambda self, job_id: None)
    monkeypatch.setattr(ray_jobs, "_PATIENCE_S", 0.0)
    for call in (lambda: jobs.follow("mar-x"), lambda: jobs.stop("mar-x"), jobs.list):
        with pytest.raises(Failure, match=r"127.0.0.1:8265 does not answer"):
            call()


@pytest.mark.parametrize(
    "arguments",
    [
        ("cost", "a" * 300),
        ("run", "quickstart", "recipe=" + "a" * 300),
        ("predict", "mini", "a" * 300),
    ],
)
def test_a_name_that_no_file_can_have_is_a_mistake(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    _, error = run_mar(tmp_path, *arguments, code=2)
    assert "Traceback" not in error
