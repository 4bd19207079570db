"""Opens a video file with FFmpeg's demuxers: only this file, and only as a video container.

By itself FFmpeg opens more: a name may be a network address, and a file named ``.mp4`` may be a
playlist or a drawing that refers to other files and addresses. So the path is made absolute, and
only the protocol ``file`` and formats that contain the video themselves are allowed. Imports PyAV
only when it is called.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_PIXELS = 2**26
"""Limit for one frame: twice an 8K video's. A clip of larger frames would not fit into memory, and
a file of 2 KB can state such a size."""
_FORMATS = (
    "mov,mp4,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,asf,asf_o,ogg,m4v,h264,hevc,"
    "h261,h263,vc1,mjpeg,ivf,obu,av1,nut,"
    "mxf,mxg,dv,gif,apng,rm,ivr,wtv,nuv,dirac,yuv4mpegpipe,amv,pva,gxf,avs2,avs3,"
    "cavsvideo,live_flv,hxvs,iv8,webp,swf"
)
"""FFmpeg's names of the allowed formats. Excluded are playlists (hls, dash, concat), single
pictures, drawings (svg_pipe) and devices."""


@contextmanager
def open_container(path: Path) -> Generator[Any]:
    """Open a file, as PyAV's ``InputContainer``.

    Raises:
        FileNotFoundError: no such file exists.
        OSError, ValueError: it is no video container; PyAV's own errors are subclasses of these.
    """
    import av

    # An absolute path begins with "/", so FFmpeg cannot take it for an address ("http:...").
    file = os.path.abspath(path)  # noqa: PTH100  (a link is followed when it is opened)
    if not os.path.isfile(file):  # noqa: PTH113
        raise FileNotFoundError(2, "no such file", file)
    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
    # Some real files have metadata that are not UTF-8; av.open would raise UnicodeDecodeError.
    with av.open(file, options=options, metadata_errors="ignore") as container:
        yield container
