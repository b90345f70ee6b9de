"""Pictures as files and back: PNG, JPEG and WebP that carry the request they came from. Needs Pillow."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np

import sfumato
from sfumato.core.messages import Picture
from sfumato.core.spec import InputImage
from sfumato.errors import ConfigError, RequestError

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
# The name of the text in a PNG that holds the request, as one can send it again.
REQUEST_KEY = "sfumato"
# What a file may decode to; a small file can claim to be a large picture.
MAX_INPUT_PIXELS = 1 << 26
# JPEG's block for metadata ends at 64 KiB.
_MAX_EXIF_BYTES = 60_000
_IMAGE_DESCRIPTION = 0x010E
# What OpenAI's output_compression is by default, and what is smaller without being seen.
_BEST_QUALITY = 100


def load_pillow() -> Any:
    """Return Pillow's Image module. Raises ConfigError naming what to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("pictures need Pillow: pip install 'sfumato[image]'") from error
    return Image


def encode_picture(
    picture: Picture,
    *,
    output_format: str = "png",
    quality: int | None = None,
    request: dict[str, Any] | None = None,
    frame: int = 0,
) -> bytes:
    """Return one frame as a file.

    quality: 0 to 100 of JPEG and WebP. request: what would draw the picture again, written into the file.
    """
    shape = (picture.num_frames, picture.height, picture.width, 3)
    pixels = np.frombuffer(picture.pixels, np.uint8).reshape(shape)
    image = load_pillow().fromarray(pixels[frame])
    text = None if request is None else json.dumps(request)
    options: dict[str, Any] = {}
    if output_format == "png":
        options["pnginfo"] = _png_texts(text)
    else:
        options["quality"] = _BEST_QUALITY if quality is None else quality
        if text is not None and len(text) < _MAX_EXIF_BYTES:
            options["exif"] = _exif(text)
    file = io.BytesIO()
    image.save(file, output_format, **options)
    return file.getvalue()


def _png_texts(text: str | None) -> Any:
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_text("Software", f"sfumato {sfumato.__version__}")
    if text is not None:
        texts.add_text(REQUEST_KEY, text)
    return texts


def _exif(text: str) -> Any:
    exif = load_pillow().Exif()
    exif[_IMAGE_DESCRIPTION] = text
    return exif


def read_request(content: bytes) -> dict[str, Any] | None:
    """Return the request that a picture of ours carries; None for any other one."""
    image = load_pillow().open(io.BytesIO(content))
    text = image.info.get(REQUEST_KEY) or image.getexif().get(_IMAGE_DESCRIPTION)
    try:
        found = json.loads(text or "null")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def decode_upload(content: bytes, *, size: tuple[int, int] | None, unit: int) -> InputImage:
    """Return an uploaded picture, upright, without transparency, resized to (width, height) if need be.

    size: None takes the picture's own, rounded down to multiples of unit. Raises RequestError for what is no
    picture.
    """
    from PIL import ImageOps

    try:
        opened = load_pillow().open(io.BytesIO(content))
        if opened.width * opened.height > MAX_INPUT_PIXELS:
            raise RequestError(
                f"the image has {opened.width}x{opened.height} pixels, at most {MAX_INPUT_PIXELS} are read",
                field="image",
                limit=MAX_INPUT_PIXELS,
            )
        image = ImageOps.exif_transpose(opened).convert("RGB")
    except RequestError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them raise
        message = f"the image cannot be read: {type(error).__name__}; send PNG, JPEG or WebP"
        raise RequestError(message, field="image") from error
    wanted = size or (max(unit, image.width // unit * unit), max(unit, image.height // unit * unit))
    if image.size != wanted:
        image = image.resize(wanted, load_pillow().Resampling.LANCZOS)
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
    return InputImage(pixels=np.ascontiguousarray(pixels).tobytes(), height=image.height, width=image.width)
