"""Large pictures are decoded in tiles, by a copy of the decoder: the shared one never learns of it."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.engine.build_image import LoadedPipeline
from sfumato.image import runner
from tests.image.drawing import pixels, run, spec_for, start


def test_a_large_picture(sd15: LoadedPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = sd15.family.pipeline.vae
    spec = spec_for(sd15, height=96, width=96)
    whole = pixels(run(start(sd15), [spec])[0])[0]
    calls = []
    tiled = type(vae).tiled_decode

    def counted(self, *arguments, **options):  # type: ignore[no-untyped-def]
        calls.append(self)
        return tiled(self, *arguments, **options)

    monkeypatch.setattr(type(vae), "tiled_decode", counted, raising=True)
    monkeypatch.setattr(runner, "_TILED_PIXELS", 64 * 64)
    in_tiles = pixels(run(start(sd15), [spec])[0])[0]
    assert calls
    assert calls[0] is not vae
    assert not vae.use_tiling
    # Tiles know nothing of one another beyond where they are blended: the picture is much the same.
    one, other = (np.frombuffer(picture, np.uint8).astype(int) for picture in (whole, in_tiles))
    assert one.shape == other.shape
    assert np.abs(one - other).mean() < 64
