"""Decides from a file's packets whether a decoder that seeks returns the right frames.

A decoder that seeks starts at a packet flagged as key and assumes that the n-th packet is the n-th
frame. Whether that is true depends on the stream; container, codec and flags are not enough to know
it. The cases that this module rejects all occur in real files: open groups of pictures, recovery
points and intra refresh (flagged as key, but they need earlier packets), edit lists (packets that
are decoded and not shown, or shown twice), hidden reference frames of VP8 and VP9, fields stored
one by one, parameters that change in the middle. Imports PyAV only when it is called, and no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mar.data.video.bitstream import BitReader, NotSeekable, has_fields, leb128, nal_units
from mar.data.video.container import MOST_PIXELS, open_container

_INDEXED = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv"}
"""Containers, by FFmpeg's names, with an index: a frame is found without reading those before."""
_SLACK_FRAMES = 10_000
_SLACK_S = 60.0
"""A header may count frames that an edit list cuts off, or a longer audio track. One that states
more than twice the video's length plus this slack is damaged."""
_TICKS_PER_S = 1_000_000
"""PyAV gives a container's duration in microseconds."""
_H264_SLICE = 1
_H264_IDR = 5
_H264_SPS = 7
"""Types of network abstraction layer units, ITU-T H.264 table 7-1."""
_H264_PARTITION_A = 2
"""The first part of a slice that is split into partitions; such a slice is no IDR picture."""
_HEVC_IDR = {19, 20}
"""IDR_W_RADL and IDR_N_LP, ITU-T H.265 table 7-1; clean random access pictures are not among
them."""
_HEVC_SLICES = range(32)
_HEVC_SPS = 33


@dataclass(frozen=True)
class StreamIndex:
    """A video stream in which seeking is exact."""

    codec: str
    """``h264``, ``hevc``, ``vp8``, ``vp9`` or ``av1``."""
    seconds: npt.NDArray[np.float64]
    """The time at which each frame is shown, one for each packet, in rising order."""


def index_of(path: Path) -> StreamIndex:
    """Read a file's packets without decoding any, and return the times of its frames.

    Raises:
        NotSeekable: a packet flagged as key may need earlier ones, or packets are not frames.
        OSError, ValueError: the file cannot be read; PyAV's own errors are subclasses of these.
    """
    with open_container(path) as container:
        if container.format.name not in _INDEXED:
            raise NotSeekable(f"{container.format.name} has no index of its frames")
        # With several streams, decord and torchcodec may choose another than a player does.
        if len(container.streams.video) != 1:
            raise NotSeekable("it has several video streams, or none")
        stream: Any = container.streams.video[0]
        if stream.codec_context is None:
            raise NotSeekable("its codec is not known")
        name = stream.codec_context.name
        codec = _ALIASES.get(name, name)
        if codec not in _CHECKS:
            raise NotSeekable(f"the rules for key frames of {codec} are not known")
        if stream.codec_context.width * stream.codec_context.height > MOST_PIXELS:
            raise NotSeekable("its frames are too large")
        # With more bits, decord's and torchcodec's pixels differ from PyAV's by about 3 of 255.
        pixels = stream.codec_context.format
        if pixels is None or any(component.bits != 8 for component in pixels.components):
            raise NotSeekable(
                "its pixels are not of 8 bits, and decoders then give different values"
            )
        check = _CHECKS[codec](bytes(stream.codec_context.extradata or b""))
        # All packets are read: a single hidden or repeated one shifts all later frame numbers.
        shown = list(_checked(container.demux(stream), check))
        if not shown:
            raise NotSeekable("it has no packet")
        seconds = np.sort(np.array(shown)) * float(stream.time_base)
        too_many = stream.frames > 2 * len(shown) + _SLACK_FRAMES
        if too_many or _stated_seconds(container, stream) > 2 * float(np.ptp(seconds)) + _SLACK_S:
            # decord reserves memory for the stated number of frames, and ends the process if
            # there is not enough.
            raise NotSeekable("its header states more frames or a longer duration than it has")
        return StreamIndex(codec, seconds)


def _stated_seconds(container: Any, stream: Any) -> float:
    """Return the longest duration, in seconds, that the headers of a file state."""
    if stream.duration:
        own = float(stream.duration * stream.time_base)
    else:
        own = 0.0
    return max(own, (container.duration or 0) / _TICKS_PER_S)


def key_frames(path: Path) -> list[int]:
    """Return the numbers, in display order, of the frames whose packets are flagged as key.

    Raises:
        OSError, ValueError: the file cannot be read; PyAV's own errors are subclasses of these.
    """
    with open_container(path) as container:
        packets: list[Any] = [packet for packet in container.demux(video=0) if packet.size]
    timed = [packet for packet in packets if packet.pts is not None]
    timed.sort(key=lambda packet: packet.pts)
    return [number for number, packet in enumerate(timed) if packet.is_keyframe]


def _checked(packets: Iterator[Any], check: _Check) -> Iterator[int]:
    """Yield the presentation timestamp of each packet.

    Raises:
        NotSeekable: at the first packet on which a decoder that seeks would go wrong.
    """
    last_position = None
    last_key = None
    latest = None
    seen: set[int] = set()
    for packet in packets:
        # PyAV ends a stream with an empty packet.
        if not packet.size:
            continue
        shown = packet.pts
        if shown is None or shown in seen:
            raise NotSeekable("two packets are shown at the same time, or one has no time")
        if packet.is_discard or packet.is_corrupt:
            raise NotSeekable("it has packets that are not shown (an edit list)")
        # FFmpeg reads a repeated part of an edit list again, at an earlier position of the file.
        if packet.pos is not None and packet.pos >= 0:
            if last_position is not None and packet.pos <= last_position:
                raise NotSeekable("it has packets that are shown twice (an edit list)")
            last_position = packet.pos
        if packet.has_sidedata("new_extradata"):
            raise NotSeekable("its parameters change in the middle")
        check(packet, packet.is_keyframe)
        if packet.is_keyframe:
            # Earlier packets must be shown before this one and later packets after it. Otherwise
            # seeking to it would miss frames that are shown before it and decoded after it.
            if latest is not None and shown < latest:
                raise NotSeekable("a frame before a key frame is shown after it")
            last_key = shown
        elif last_key is None:
            raise NotSeekable("it does not begin with a key frame")
        elif shown < last_key:
            raise NotSeekable("a frame after a key frame is shown before it (an open group)")
        seen.add(shown)
        latest = shown if latest is None else max(latest, shown)
        yield shown


_Check = Callable[[Any, bool], None]
"""Called with a packet and whether it is flagged as key; raises NotSeekable."""


def _h264(extradata: bytes) -> _Check:
    """Check H.264: key packets are IDR pictures, no fields, one set of parameters.

    Raises NotSeekable if the header already rules seeking out.
    """
    # Without this header (Annex B), units are separated by start codes and have no lengths.
    if len(extradata) < 7 or extradata[0] != 1:
        raise NotSeekable("its H.264 stream has no avcC header")
    length_size = (extradata[4] & 3) + 1
    # Two fields that are stored one by one are two packets but one frame.
    sets = _h264_parameter_sets(extradata)
    if any(has_fields(each) for each in sets):
        raise NotSeekable("it may be interlaced")
    if len(sets) > 1:
        raise NotSeekable("its parameters change in the middle")

    def check(packet: Any, is_key: bool) -> None:
        if not is_key:
            return
        for unit in nal_units(bytes(packet), length_size):
            # nal_unit_type, the low five bits (section 7.3.1).
            kind = unit[0] & 31
            if kind == _H264_SPS and unit not in sets:
                raise NotSeekable("its parameters change in the middle")
            if kind in (_H264_SLICE, _H264_PARTITION_A):
                raise NotSeekable("a packet flagged as key needs earlier ones (no IDR picture)")
            if kind == _H264_IDR:
                return
        raise NotSeekable("a packet flagged as key has no picture")

    return check


def _h264_parameter_sets(extradata: bytes) -> list[bytes]:
    """Return the sequence parameter sets of an avcC header, ISO/IEC 14496-15 section 5.3.3."""
    sets: list[bytes] = []
    offset = 6
    for _ in range(extradata[5] & 31):
        size = int.from_bytes(extradata[offset : offset + 2], "big")
        sets.append(extradata[offset + 2 : offset + 2 + size])
        offset += 2 + size
    if not sets or not all(sets):
        raise NotSeekable("its H.264 header has no parameters")
    return sets


def _hevc(extradata: bytes) -> _Check:
    """Check HEVC: key packets are IDR pictures, parameters do not change."""
    if len(extradata) < 23 or extradata[0] != 1:
        raise NotSeekable("its HEVC stream has no hvcC header")
    length_size = (extradata[21] & 3) + 1

    def check(packet: Any, is_key: bool) -> None:
        if not is_key:
            return
        for unit in nal_units(bytes(packet), length_size):
            # nal_unit_type, after forbidden_zero_bit (ITU-T H.265, section 7.3.1.2).
            kind = (unit[0] >> 1) & 63
            if kind == _HEVC_SPS and unit not in extradata:
                raise NotSeekable("its parameters change in the middle")
            if kind in _HEVC_IDR:
                return
            if kind in _HEVC_SLICES:
                raise NotSeekable("a packet flagged as key needs earlier ones (no IDR picture)")
        raise NotSeekable("a packet flagged as key has no picture")

    return check


def _vp8(_: bytes) -> _Check:
    """Check VP8: key packets are key frames of one size, and every packet is shown.

    RFC 6386, section 9.1.
    """
    sizes: set[bytes] = set()

    def check(packet: Any, is_key: bool) -> None:
        start = bytes(memoryview(packet)[:10])
        # Bit 4 of the frame tag is show_frame, bit 0 is clear for a key frame.
        if not start[0] & 16:
            raise NotSeekable("it has frames that are decoded and not shown (alternate references)")
        if not is_key:
            return
        if start[0] & 1:
            raise NotSeekable("a packet flagged as key is no key frame")
        # Width and height, behind the frame tag of 3 bytes and the start code of 3.
        sizes.add(start[6:10])
        if len(sizes) > 1:
            raise NotSeekable("its size changes in the middle")

    return check


def _vp9(_: bytes) -> _Check:
    """Check VP9: key packets begin with a key frame, every packet shows one frame."""

    def check(packet: Any, is_key: bool) -> None:
        headers = [_vp9_header(frame) for frame in _vp9_frames(memoryview(packet))]
        if sum(is_shown for _, is_shown in headers) != 1:
            raise NotSeekable("it has packets that show no frame, or several")
        if is_key and not headers[0][0]:
            raise NotSeekable("a packet flagged as key is no key frame")

    return check


def _vp9_frames(packet: memoryview) -> list[bytes]:
    """Return the first bytes of each frame in a packet: one frame, or a superframe's (annex B)."""
    # A superframe ends with an index of its frames' sizes, which has the marker at both ends.
    marker = packet[-1]
    if marker & 0xE0 != 0xC0:
        return [bytes(packet[:2])]
    count = (marker & 7) + 1
    size_bytes = ((marker >> 3) & 3) + 1
    index_size = 2 + count * size_bytes
    if len(packet) < index_size or packet[-index_size] != marker:
        return [bytes(packet[:2])]
    frames: list[bytes] = []
    offset = 0
    for number in range(count):
        at = len(packet) - index_size + 1 + number * size_bytes
        size = int.from_bytes(packet[at : at + size_bytes], "little")
        if size:
            frames.append(bytes(packet[offset : offset + 2]))
        offset += size
    return frames or [bytes(packet[:2])]


def _vp9_header(frame: bytes) -> tuple[bool, bool]:
    """Return whether a frame is a key frame, and whether it is shown (uncompressed header, 6.2)."""
    bits = BitReader(frame)
    bits.take(2)  # frame_marker
    profile = bits.take(1) + 2 * bits.take(1)
    # Profile 3 has a reserved bit.
    if profile == 3:
        bits.take(1)
    # show_existing_frame: the packet only shows a frame that was decoded before.
    if bits.take(1):
        return False, True
    is_key = not bits.take(1)
    return is_key, bool(bits.take(1))


def _av1(_: bytes) -> _Check:
    """Check AV1: a key packet begins with a key frame that is shown.

    An AV1 packet always shows one frame, so the other packets need no check.
    """

    def check(packet: Any, is_key: bool) -> None:
        if not is_key:
            return
        for kind, payload in _av1_units(bytes(packet)):
            # OBU_FRAME_HEADER and OBU_FRAME; both begin with the same bits (section 5.9.2).
            if kind in (3, 6):
                bits = BitReader(payload[:1])
                is_existing = bits.take(1)
                frame_type = bits.take(2)
                is_shown = bits.take(1)
                if is_existing or frame_type or not is_shown:
                    raise NotSeekable("a packet flagged as key is no key frame that is shown")
                return
        raise NotSeekable("a packet flagged as key has no picture")

    return check


def _av1_units(packet: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the type and content of each open bitstream unit (AV1 specification, 5.3)."""
    offset = 0
    while offset < len(packet):
        header = packet[offset]
        # The header has a second byte if its extension flag is set.
        offset += 2 if header & 4 else 1
        size = len(packet) - offset
        # obu_has_size_field; without it, the unit takes the rest of the packet.
        if header & 2:
            size, used = leb128(packet, offset)
            offset += used
        yield (header >> 3) & 15, packet[offset : offset + size]
        offset += size


_CHECKS: dict[str, Callable[[bytes], _Check]] = {
    "h264": _h264,
    "hevc": _hevc,
    "vp8": _vp8,
    "vp9": _vp9,
    "av1": _av1,
}
"""Codec -> a function that makes the check for one stream's packets from its extradata."""
_ALIASES = {"libvpx": "vp8", "libvpx-vp9": "vp9", "libdav1d": "av1", "libaom-av1": "av1"}
"""FFmpeg's names of decoders -> the codec; FFmpeg may use one of several decoders of a codec."""
