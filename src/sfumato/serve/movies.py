"""Videos as files: H.264 in MP4. Needs PyAV."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np

from sfumato.core.messages import Picture
from sfumato.errors import ConfigError

MEDIA_TYPE = "video/mp4"
# H.264's measure of loss: 0 is none, 18 is about what eyes cannot tell from it.
_LOSS = "18"


def load_av() -> Any:
    """Return PyAV. Raises ConfigError naming what to install."""
    try:
        import av
    except ImportError as error:
        raise ConfigError("videos need PyAV: pip install 'sfumato[video]'") from error
    return av


def encode_video(picture: Picture, *, frames_per_second: int, request: dict[str, Any] | None = None) -> bytes:
    """Return all frames as a file; request: what would make the video again, written into the file."""
    av = load_av()
    shape = (picture.num_frames, picture.height, picture.width, 3)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        if request is not None:
            container.metadata["comment"] = json.dumps(request)
        stream = container.add_stream("libx264", rate=frames_per_second, options={"crf": _LOSS})
        stream.width, stream.height = picture.width, picture.height
        # Players want colours at half the resolution, which odd sides do not have.
        stream.pix_fmt = "yuv444p" if picture.width % 2 or picture.height % 2 else "yuv420p"
        for pixels in np.frombuffer(picture.pixels, np.uint8).reshape(shape):
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()
