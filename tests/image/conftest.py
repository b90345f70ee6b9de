"""Tiny pipelines: two of the repository, and all others where the goldens lie beside the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.engine.build_image import LoadedPipeline
from tests.goldens.images import load_case_pipeline

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = ROOT / "tests" / "data" / "goldens" / "images" / "pipelines"
SHARED = ROOT.parent / "shared" / "goldens" / "images" / "pipelines"
NAMES = ("dit", "flux", "qwen-image", "sd15", "sd3", "sdxl", "wan", "z-image")


def pipeline_folder(name: str) -> Path:
    """Return where a tiny pipeline lies; skip the test where it is not at hand."""
    for folder in (DATA, SHARED):
        if (folder / f"{name}-tiny").is_dir():
            return folder / f"{name}-tiny"
    pytest.skip(f"{name}-tiny is not in the repository, and no goldens lie beside it")


@pytest.fixture(params=NAMES)
def any_pipeline(request: pytest.FixtureRequest) -> LoadedPipeline:
    """Return each tiny pipeline in turn."""
    return load_case_pipeline(pipeline_folder(request.param))


@pytest.fixture
def sd15() -> LoadedPipeline:
    """Return the tiny Stable Diffusion."""
    return load_case_pipeline(pipeline_folder("sd15"))


@pytest.fixture
def sd3() -> LoadedPipeline:
    """Return the tiny Stable Diffusion 3."""
    return load_case_pipeline(pipeline_folder("sd3"))
