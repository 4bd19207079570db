"""What every decoder promises: a new one is tested as soon as the settings name it.

``test_frames_shown.py`` runs them over many containers and codecs.
"""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from numbered_videos import numbers_of, write_numbered

from mar.config.input_settings import DataConfig
from mar.data import decoders
from mar.data.decoders import BrokenVideo, decode_with
from mar.data.sampling import Reader

NAMES = get_args(DataConfig.model_fields["decoder"].annotation)


def working(name: str) -> object:
    """The decoder's name; a skipped test where its library does not work on this machine."""
    reason = "" if name in ("auto", "pyav") else decoders.probe_decoder(name)
    return pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=reason or "it works"))


every_decoder = pytest.mark.parametrize("decoder", [working(name) for name in NAMES])


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 numbered frames with a key frame every 24 and frames that look ahead."""
    file = tmp_path_factory.mktemp("film") / "a film, with spaces.mp4"
    write_numbered(file, "libx264", {"g": "24", "bf": "2"}, numbers=range(120))
    return file


@every_decoder
@pytest.mark.parametrize(
    "asked", [[0], [119], [5, 6, 7], [100, 3, 50], [7, 7, 7], list(range(119, -1, -9))]
)
def test_frames_come_in_the_order_asked_for(film: Path, decoder: str, asked: list[int]) -> None:
    with Reader(film, decoder) as reader:
        frames = reader.frames(asked)
    assert frames.dtype == np.uint8
    assert frames.shape == (len(asked), 64, 64, 3)
    assert numbers_of(frames) == asked


@every_decoder
def test_length_and_rate_are_the_files(film: Path, decoder: str) -> None:
    with Reader(film, decoder) as reader:
        assert len(reader) == 120
        assert reader.fps == pytest.approx(25.0)


@every_decoder
def test_one_reader_may_be_asked_again_and_two_may_be_open(film: Path, decoder: str) -> None:
    with Reader(film, decoder) as one, Reader(film, decoder) as other:
        late = one.frames([90, 91])
        assert numbers_of(other.frames([2])) == [2]
        assert np.array_equal(one.frames([90, 91]), late)


@every_decoder
def test_pixels_are_those_of_pyav_to_the_last_bit(film: Path, decoder: str) -> None:
    with Reader(film, decoder) as reader:
        assert np.array_equal(reader.frames(range(120)), decode_with("pyav", film))


@every_decoder
def test_odd_sides_and_a_single_frame_are_read(tmp_path: Path, decoder: str) -> None:
    write_numbered(
        tmp_path / "one.mp4", "libx264", {"crf": "0"}, numbers=[5], pixel_format="yuv444p", side=65
    )
    with Reader(tmp_path / "one.mp4", decoder) as reader:
        assert len(reader) == 1
        assert reader.frames([0, 0]).shape == (2, 65, 65, 3)


@every_decoder
def test_a_file_that_is_cut_gives_its_frames_or_is_broken(
    film: Path, tmp_path: Path, decoder: str
) -> None:
    content = film.read_bytes()
    for share in (0.1, 0.5, 0.9):
        cut = tmp_path / f"{share}.mp4"
        cut.write_bytes(content[: int(len(content) * share)])
        try:
            with Reader(cut, decoder) as reader:
                number = len(reader) - 1
                assert numbers_of(reader.frames([number]))[0] <= 119
        except BrokenVideo as error:
            assert str(cut) in str(error)


@every_decoder
@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"no video at all\n"])
def test_what_is_no_video_is_a_broken_video_that_names_the_file(
    tmp_path: Path, decoder: str, content: bytes
) -> None:
    file = tmp_path / "broken.mp4"
    file.write_bytes(content)
    with pytest.raises(BrokenVideo, match=r"broken\.mp4"):
        Reader(file, decoder)
