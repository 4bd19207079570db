"""Frame n is the n-th frame that a player shows, for every decoder and the frame cache."""

import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numbered_videos import edit, numbers_of, picture, write_numbered

from mar.config.input_settings import ClipConfig, DataConfig
from mar.data import decoders, process_pool
from mar.data.annotations import read_split
from mar.data.cache_index import Packing
from mar.data.frame_cache import open_video, pack
from mar.data.sampling import Reader
from mar.data.validation import check_data
from mar.data.video.bitstream import NotSeekable
from mar.data.video.seeking import index_of

ALL = list(range(192))
CLOSED = {"g": "48", "bf": "3"}
OPEN = {"x264-params": "open-gop=1:keyint=24"}
REFRESHED = {"x264-params": "intra-refresh=1:keyint=24"}
WITH_TORCHCODEC = pytest.mark.skipif(
    bool(decoders.probe_decoder("torchcodec")), reason="torchcodec does not work here"
)
DECODERS = ["auto", "pyav", pytest.param("torchcodec", marks=WITH_TORCHCODEC)]
Writer = Callable[[Path], Sequence[int]]
"""Writes a file and returns the numbers of the frames that a player shows."""


def written(codec: str, options: dict[str, str] | None = None, **more: Any) -> Writer:
    def write(file: Path) -> Sequence[int]:
        write_numbered(file, codec, options, **more)
        return list(more.get("numbers", ALL))

    return write


def edited(parts: Sequence[tuple[float, float | None]], frames_between: str) -> Writer:
    """An mp4 trimmed without encoding again: parts are (seconds long, where it begins)."""

    def write(file: Path) -> Sequence[int]:
        write_numbered(file, "libx264", {"g": "48", "bf": frames_between})
        edit(file, parts)
        shown = [part for part in parts if part[1] is not None]
        return [
            n
            for long, at in shown
            for n in range(round(25 * at), min(round(25 * (at + long)), 192))
        ]

    return write


def with_hidden_frames(file: Path) -> Sequence[int]:
    """VP8 as two-pass encoders write it: some packets are decoded and not shown."""
    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream(
            "libvpx", rate=Fraction(25), options={"g": "48", "auto-alt-ref": "0"}
        )
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        frames = [av.VideoFrame.from_ndarray(picture(number), format="rgb24") for number in ALL]
        packets = [packet for frame in [*frames, None] for packet in stream.encode(frame)]
        for packet in packets:
            content = bytes(packet)
            if not content[0] & 1:  # before each key frame the same one, its bit "show me" cleared
                hidden = av.Packet(bytes([content[0] & ~16, *content[1:]]))
                hidden.pts = hidden.dts = packet.pts * 40 - 10
                hidden.time_base = Fraction(1, 1000)
                hidden.stream = stream
                hidden.is_keyframe = True
                if packet.pts:
                    container.mux(hidden)
            container.mux(packet)
    return ALL


def two_streams(file: Path) -> Sequence[int]:
    """A small preview beside the film, both in one file; the preview comes first."""
    with av.open(str(file), "w") as container:
        streams: list[Any] = []
        for side in (32, 64):
            stream: Any = container.add_stream("libx264", rate=Fraction(25), options={"g": "48"})
            stream.width = stream.height = side
            stream.pix_fmt = "yuv420p"
            streams.append(stream)
        streams[0].disposition = av.stream.Disposition(0)
        streams[1].disposition = av.stream.Disposition.default
        for number in ALL:
            for stream, shown in zip(streams, (255 - number, number), strict=True):
                image = picture(shown, stream.width)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    return ALL


def with_cover_picture(file: Path) -> Sequence[int]:
    """A film behind a cover picture: the first stream, and the larger one."""
    with av.open(str(file), "w") as container:
        cover: Any = container.add_stream("mjpeg", rate=Fraction(25))
        cover.width = cover.height = 256
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        stream: Any = container.add_stream("libx264", rate=Fraction(25), options=CLOSED)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        image = av.VideoFrame.from_ndarray(picture(170, 256), format="rgb24")
        container.mux([*cover.encode(image), *cover.encode()])
        for number in ALL:
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return ALL


UNEVEN_MS = [40 * workdir + workdir % 3 * 11 for workdir in range(192)]
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
FILES: dict[str, Writer] = {
    "closed groups.mp4": written("libx264", CLOSED),
    "closed groups.mkv": written("libx264", CLOSED),
    "closed groups.mov": written("libx264", CLOSED),
    "closed groups.flv": written("libx264", CLOSED),
    "closed groups.ts": written("libx264", CLOSED),
    "closed groups.avi": written("libx264", CLOSED),
    "index first.mp4": written("libx264", CLOSED, muxer={"movflags": "faststart"}),
    "fragments.mp4": written("libx264", CLOSED, muxer=FRAGMENTS),
    "a fragment a frame.mp4": written(
        "libx264", CLOSED, muxer={"movflags": "frag_every_frame+empty_moov"}
    ),
    "open groups.mp4": written("libx264", OPEN),
    "open groups.mkv": written("libx264", OPEN),
    "open groups.ts": written("libx264", OPEN),
    "intra refresh.mp4": written("libx264", REFRESHED),
    "intra refresh.mkv": written("libx264", REFRESHED),
    "pyramid of B-frames.mp4": written(
        "libx264", {"x264-params": "bframes=7:b-pyramid=normal:keyint=48"}
    ),
    "interlaced.mp4": written("libx264", {"x264-params": "tff=1:keyint=48"}),
    "4:4:4.mp4": written("libx264", CLOSED, pixel_format="yuv444p"),
    "10 bits.mp4": written("libx264", CLOSED, pixel_format="yuv420p10le"),
    "variable rate.mp4": written("libx264", CLOSED, times=UNEVEN_MS),
    "variable rate.mkv": written("libx264", CLOSED, times=UNEVEN_MS),
    "vp8.webm": written("libvpx", {"g": "48"}),
    "vp8, hidden frames.webm": with_hidden_frames,
    "vp9.webm": written("libvpx-vp9", {"g": "48", "lag-in-frames": "25", "auto-alt-ref": "1"}),
    "av1.mkv": written("libsvtav1", {"g": "48", "preset": "12"}),
    "hevc, open groups.mp4": written(
        "libx265", {"x265-params": "log-level=none:keyint=24:open-gop=1"}
    ),
    "hevc, closed groups.mp4": written(
        "libx265", {"x265-params": "log-level=none:keyint=24:open-gop=0"}
    ),
    "mpeg-4.mp4": written("mpeg4", {"g": "24", "bf": "2"}),
    "mpeg-4.avi": written("mpeg4", {"g": "24", "bf": "2"}),
    "mpeg-2.mpg": written("mpeg2video", {"g": "24", "bf": "2"}),
    "mpeg-2.ts": written("mpeg2video", {"g": "24", "bf": "2"}),
    "wmv.wmv": written("wmv2", {"g": "24"}),
    "two streams.mp4": two_streams,
    "two streams.mkv": two_streams,
    "a cover picture.mp4": with_cover_picture,
}
EDITS: dict[str, Sequence[tuple[float, float | None]]] = {
    "the end cut off": [(5.0, 0)],
    "the beginning cut off": [(6.68, 1.0)],
    "the beginning cut off at a key frame": [(5.76, 1.92)],
    "the middle cut out": [(1.0, 0), (3.0, 4.0)],
    "the middle cut out at key frames": [(1.92, 0), (1.92, 3.84)],
    "a part twice": [(2.0, 1.0), (2.0, 1.0)],
    "a part twice, from a key frame": [(1.92, 0), (1.92, 0)],
    "the end before the beginning": [(1.0, 4.0), (1.0, 0.0)],
    "begins late": [(0.5, None), (7.68, 0)],
    "begins late, cut": [(0.5, None), (4.0, 2.0)],
}
FILES |= {
    f"{name}, {between} B-frames.mp4": edited(parts, between)
    for name, parts in EDITS.items()
    for between in "03"
}


@pytest.fixture(scope="module", params=FILES)
def film(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Sequence[int]]:
    """A file, and the numbers of the frames that a player shows."""
    file = tmp_path_factory.mktemp("films") / request.param.replace(":", "")
    return file, FILES[request.param](file)


@pytest.mark.parametrize("decoder", DECODERS)
def test_frame_n_is_the_nth_that_a_player_shows(
    film: tuple[Path, Sequence[int]], decoder: str
) -> None:
    file, shown = film
    draws = np.random.default_rng(0)
    for _ in range(2):
        asked = sorted(draws.integers(0, len(shown), 12).tolist())
        with Reader(file, decoder) as reader:
            assert len(reader) == len(shown)
            assert numbers_of(reader.frames(asked)) == [shown[number] for number in asked]
    with Reader(file, decoder) as reader:
        assert numbers_of(np.stack(list(reader))) == list(shown), "gone through from the front"


def test_the_frame_cache_has_the_same_frames(
    film: tuple[Path, Sequence[int]], tmp_path: Path
) -> None:
    file, shown = film
    listed = str(tmp_path / "list.txt")
    Path(listed).write_text(f"{file.name} 0\n", encoding="utf-8")
    data = DataConfig(root=str(file.parent), train=listed, val=listed, num_classes=1)
    pack(data, tmp_path / "cache", Packing("raw"), 1, lambda done, total: None)
    cached = data.model_copy(update={"cache": str(tmp_path / "cache")})
    (video,) = read_split(cached, "train")
    with open_video(cached, video) as reader:
        assert numbers_of(reader.frames(range(len(reader)))) == list(shown)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("open groups.mp4", "no IDR picture"),
        ("intra refresh.mkv", "no IDR picture"),
        ("hevc, open groups.mp4", "no IDR picture"),
        ("interlaced.mp4", "interlaced"),
        ("10 bits.mp4", "8 bits"),
        ("vp8, hidden frames.webm", "not shown"),
        ("a part twice, 3 B-frames.mp4", "edit list"),
        ("the end cut off, 0 B-frames.mp4", "edit list"),
        ("closed groups.ts", "no index"),
        ("two streams.mkv", "several video streams"),
    ],
)
def test_a_decoder_does_not_jump_where_a_packet_may_not_be_a_frame(
    tmp_path: Path, name: str, reason: str
) -> None:
    file = tmp_path / name
    FILES[name](file)
    with pytest.raises(NotSeekable, match=reason):
        index_of(file)


@pytest.mark.parametrize(
    "name",
    [
        "closed groups.mp4",
        "closed groups.flv",
        "fragments.mp4",
        "pyramid of B-frames.mp4",
        "variable rate.mkv",
        "vp8.webm",
        "vp9.webm",
        "the beginning cut off at a key frame, 3 B-frames.mp4",
        "begins late, 3 B-frames.mp4",
    ],
)
def test_decord_jumps_in_ordinary_files_and_in_harmless_edit_lists(
    tmp_path: Path, name: str
) -> None:
    FILES[name](tmp_path / name)
    with Reader(tmp_path / name, "decord") as reader:
        assert reader.decoder == "decord"


def test_a_file_is_looked_at_once_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.mp4"
    write_numbered(file, "libx264", CLOSED)
    looked: list[Path] = []

    def counted(path: Path) -> Any:
        looked.append(path)
        return index_of(path)

    monkeypatch.setattr(decoders, "index_of", counted)
    for _ in range(3):
        assert Reader(file, "decord").decoder == "decord"
    assert len(looked) == 1
    write_numbered(file, "libx264", OPEN)
    os.utime(file, ns=(1, 1))
    for _ in range(3):
        assert Reader(file, "decord").decoder == "pyav"
    assert len(looked) == 2


def test_data_check_names_a_decoder_that_gives_other_frames_than_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_numbered(tmp_path / "right.mp4", "libx264", CLOSED)
    write_numbered(tmp_path / "wrong.mp4", "libx264", OPEN)
    (tmp_path / "list.txt").write_text("right.mp4 0\nwrong.mp4 0\n")
    data = DataConfig(
        root=str(tmp_path), train="list.txt", val="list.txt", num_classes=1, decoder="decord"
    )

    def trusting(decoder: str, path: Path) -> Any:
        return decoders.Decord(path)

    sound = check_data(data, ClipConfig(), 1, lambda done, total: None)
    assert "wrong" not in {finding.kind for finding in sound.findings}
    monkeypatch.setattr(
        process_pool, "each", lambda look, videos, count, crashed: map(look, videos)
    )
    monkeypatch.setattr(
        decoders, "_open_exactly", trusting
    )  # as a check of the packets that misses it would
    report = check_data(data, ClipConfig(), 1, lambda done, total: None)
    found = {
        (finding.video, finding.kind) for finding in report.findings if finding.kind == "wrong"
    }
    assert found == {("wrong.mp4", "wrong")}
    assert "decord gives frame" in next(
        each.message for each in report.findings if each.kind == "wrong"
    )
    assert not report.is_sound
