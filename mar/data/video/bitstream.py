"""Reads those fields of video packets on which ``mar.data.video.seeking`` decides."""

from __future__ import annotations

from collections.abc import Iterator


def leb128(packet: bytes, offset: int) -> tuple[int, int]:
    """Return a number in little-endian base 128 and its length in bytes.

    AV1 specification, section 4.10.5.
    """
    # At most eight bytes; the highest bit of each says whether another one follows.
    value = 0
    for used, byte in enumerate(packet[offset : offset + 8]):
        value |= (byte & 127) << (7 * used)
        if not byte & 128:
            return value, used + 1
    raise NotSeekable("its AV1 stream is damaged")


def nal_units(packet: bytes, length_size: int) -> Iterator[bytes]:
    """Yield the network abstraction layer units of a packet, each stored after its length."""
    offset = 0
    while offset + length_size < len(packet):
        size = int.from_bytes(packet[offset : offset + length_size], "big")
        offset += length_size
        # Callers read a unit's first byte, and a damaged packet may have an empty unit.
        if size:
            yield packet[offset : offset + size]
        offset += size


def has_fields(parameter_set: bytes) -> bool:
    """Return whether pictures may be fields: frame_mbs_only_flag is 0 (H.264, 7.3.2.1.1).

    The fields before that flag have variable lengths, so each must be read.
    """
    # Byte 0 is the unit's header. The byte 3 after two zero bytes is no content: encoders insert it
    # so that no start code occurs inside a unit.
    bits = BitReader(parameter_set[1:].replace(b"\0\0\3", b"\0\0"))
    profile = bits.take(8)
    bits.take(16)  # constraints and level
    bits.unsigned()  # seq_parameter_set_id
    if profile in _SPS_WITH_CHROMA:
        chroma = bits.unsigned()
        if chroma == 3:
            bits.take(1)
        bits.unsigned()  # bit depths
        bits.unsigned()
        bits.take(1)
        # seq_scaling_matrix_present_flag; six lists of 4 × 4, the others of 8 × 8.
        if bits.take(1):
            lists = 12 if chroma == 3 else 8
            for number in range(lists):
                if bits.take(1):
                    _skip_scaling_list(bits, 16 if number < 6 else 64)
    bits.unsigned()  # log2_max_frame_num_minus4
    # pic_order_cnt_type decides which fields follow.
    order_type = bits.unsigned()
    if order_type == 0:
        bits.unsigned()
    elif order_type == 1:
        bits.take(1)
        bits.signed()
        bits.signed()
        # A damaged header could state billions; the specification allows 255.
        for _ in range(min(bits.unsigned(), 255)):
            bits.signed()
    bits.unsigned()  # max_num_ref_frames
    bits.take(1)
    bits.unsigned()  # width and height
    bits.unsigned()
    return not bits.take(1)


def _skip_scaling_list(bits: BitReader, size: int) -> None:
    # The values are read only to skip them; none follows once nextScale is 0 (7.3.2.1.1.1).
    last = 8
    following = 8
    for _ in range(size):
        if following:
            following = (last + bits.signed()) % 256
        last = following or last


class BitReader:
    """Reads numbers bit by bit, the most significant first; zeros follow after the end."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def take(self, count: int) -> int:
        """Return the next bits as a number."""
        value = 0
        for _ in range(count):
            byte, bit = divmod(self.position, 8)
            value <<= 1
            if byte < len(self.content):
                value |= (self.content[byte] >> (7 - bit)) & 1
            self.position += 1
        return value

    def unsigned(self) -> int:
        """Return the next number in Exp-Golomb code, ue(v)."""
        zeros = 0
        while not self.take(1):
            zeros += 1
            # After the end come zeros only, so without a limit this loop would not end.
            if zeros > 32:
                raise NotSeekable("its header is damaged")
        return (1 << zeros) - 1 + self.take(zeros)

    def signed(self) -> int:
        """Return the next number in signed Exp-Golomb code, se(v)."""
        code = self.unsigned()
        return (code + 1) // 2 if code % 2 else -(code // 2)


_SPS_WITH_CHROMA = {44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244}
"""Values of profile_idc for which chroma_format_idc follows, H.264 section 7.3.2.1.1."""


class NotSeekable(Exception):
    """A decoder that seeks may return wrong frames of this file; the message has the reason."""
