"""Decoders: the very frames that were asked for, whatever the container and the codec.

Proof that one works.
"""

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numbered_videos import write_numbered

from mar.data import decoders, process_pool
from mar.data.decoders import decode_with, write_video
from mar.data.sampling import Reader
from mar.data.video.sequential_reader import BrokenVideo, Frames
from mar.errors import UserError

WITH_TORCHCODEC = pytest.mark.skipif(
    bool(decoders.probe_decoder("torchcodec")), reason="torchcodec does not work here"
)


@pytest.mark.parametrize("decoder", ["decord", pytest.param("torchcodec", marks=WITH_TORCHCODEC)])
def test_a_common_file_is_read_by_the_decoder_that_was_chosen_and_its_pixels_are_pyavs(
    tmp_path: Path, decoder: str
) -> None:
    write_numbered(tmp_path / "a.mp4", "libx264", {"g": "12", "bf": "2"})
    with Reader(tmp_path / "a.mp4", decoder) as reader:
        assert reader.decoder == decoder
        np.testing.assert_array_equal(
            reader.frames(range(192)), decode_with("pyav", tmp_path / "a.mp4")
        )


def test_a_decoder_is_proved_by_decoding_not_by_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoders.fastest_decoder() == (
        "decord" if decoders.probe_decoder("torchcodec") else "torchcodec"
    ), "the faster one"

    def broken(path: Path) -> Frames:
        raise RuntimeError("libavutil.so.57: cannot open shared object file\nand much more")

    decoders.fastest_decoder.cache_clear()
    decoders.probe_decoder.cache_clear()
    monkeypatch.setattr(decoders, "_JUMPING", {"decord": broken, "torchcodec": broken})
    try:
        assert decoders.fastest_decoder() == "pyav"
        with pytest.raises(
            UserError,
            match=r"data\.decoder: torchcodec does not work here .*cannot open shared .*auto",
        ):
            decoders.check("torchcodec")
        decoders.check("auto")
    finally:
        decoders.fastest_decoder.cache_clear()
        decoders.probe_decoder.cache_clear()


def test_a_decoder_that_fails_in_the_middle_is_followed_by_pyav(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", np.full((30, 32, 32, 3), 90, np.uint8))
    with Reader(tmp_path / "a.mp4", "decord") as reader:
        assert reader.decoder == "decord"
        assert len(reader.frames([0, 1000])) == 2, "decord refuses a frame that is not there"
        assert reader.decoder == "pyav"


def test_a_failing_disk_is_not_taken_for_a_shorter_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_numbered(tmp_path / "a.ts", "libx264", {"g": "12"})
    opened = av.open

    class Failing:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.container = opened(*arguments, **options)

        def __enter__(self) -> "Failing":
            return self

        def __exit__(self, *_: object) -> None:
            self.container.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.container, name)

        def demux(self, stream: Any) -> Any:
            for count, packet in enumerate(self.container.demux(stream)):
                if count == 20:
                    raise OSError(5, "Input/output error")
                yield packet

    monkeypatch.setattr(av, "open", Failing)
    with pytest.raises(BrokenVideo, match="Input/output error"):
        Reader(tmp_path / "a.ts")


def die_over_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    return number * 10


def test_a_decoder_that_kills_its_process_costs_its_file_alone() -> None:
    expected = [number * 10 if number != 3 else -3 for number in range(24)]
    assert list(process_pool.each(die_over_three, range(24), 2, lambda number: -number)) == expected


def test_a_pool_that_has_died_meanwhile_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper may die between two results: then the next item cannot be submitted."""
    submit, calls = ProcessPoolExecutor.submit, [0]

    def dying(pool: ProcessPoolExecutor, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise BrokenProcessPool("a child process terminated abruptly")
        return submit(pool, *arguments)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", dying)
    assert list(process_pool.each(abs, range(10), 2, lambda number: -1)) == list(range(10))
