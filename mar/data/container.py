"""Opens a video file with FFmpeg's readers: this file alone, and only as a container of video.

FFmpeg opens whatever it is given: a name may be an address, and a file named ``.mp4`` may be a
playlist or a drawing that names other files and addresses. So a path is made absolute, no protocol
but ``file`` is allowed, and of the formats only those that hold video themselves. Imports PyAV only
when it is called.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_PIXELS = 2**26
"""Of a frame: twice an 8K video's. A clip of more would not fit the memory, and 2 KB of a file can
promise it."""
_FORMATS = (
    "mov,mp4,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,asf,asf_o,ogg,m4v,h264,hevc,"
    "h261,h263,vc1,mjpeg,ivf,obu,av1,nut,"
    "mxf,mxg,dv,gif,apng,rm,ivr,wtv,nuv,dirac,yuv4mpegpipe,amv,pva,gxf,avs2,avs3,"
    "cavsvideo,live_flv,hxvs,iv8,webp,swf"
)
"""FFmpeg's names; not among them: playlists (hls, dash, concat), single pictures, drawings
(svg_pipe), devices."""


@contextmanager
def open_container(path: Path) -> Generator[Any]:
    """Open a file, as PyAV's ``InputContainer``.

    Raises:
        FileNotFoundError: there is no such file here, whatever else its name may mean to FFmpeg.
        OSError, ValueError: it is no container of video; PyAV's own errors are among these.
    """
    import av

    file = os.path.abspath(path)  # noqa: PTH100  (a link is followed when it is opened)
    if not os.path.isfile(file):  # noqa: PTH113
        raise FileNotFoundError(2, "no such file", file)
    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
    with av.open(file, options=options, metadata_errors="ignore") as container:
        yield container
