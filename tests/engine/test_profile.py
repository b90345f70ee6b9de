"""Traces: valid, with every part of a step by name, of as many steps as were asked for; and no trace of them
in what is answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sfumato import Engine, ImageEngine, ImageParams, SamplingParams
from sfumato.config import EngineConfig
from sfumato.engine.build import load, resolve_device
from sfumato.engine.build_image import load_pipeline
from sfumato.engine.profile import Profile
from sfumato.engine.profile_config import ProfileConfig
from sfumato.errors import ConfigError
from tests.serve.running import PIPELINES, SD3, SDAR

TEXT = {"plan", "layout", "forward", "statistics", "decide", "read", "advance"}
IMAGE = {"plan", "inputs", "forward", "combine", "decode", "advance"}
PROMPTS = [[5, 6, 7], [8, 9]]
PARAMS = SamplingParams(
    max_tokens=16,
    ignore_eos=True,
    seed=0,
    algorithm="low_confidence",
    algorithm_parameters={"threshold": 2.0},
)


def names(path: Path) -> list[str]:
    """Return the names of the events with a length, in the order of time."""
    events = json.loads(path.read_text())["traceEvents"]
    lasting: list[dict[str, Any]] = [event for event in events if event.get("ph") == "X"]
    return [event["name"] for event in sorted(lasting, key=lambda event: event["ts"])]


def steps(path: Path) -> list[int]:
    """Return the numbers of the recorded steps."""
    return [int(name.split()[1].rstrip(":")) for name in names(path) if name.startswith("step ")]


@pytest.mark.parametrize("overlap", ["off", "on", "device"])
def test_text_steps_are_recorded(tmp_path: Path, overlap: str) -> None:
    loaded = load(
        EngineConfig(model=SDAR, dtype="float32", kv_memory=8 << 20, num_threads=1, overlap=overlap)
    )
    expected = [choice.token_ids for choice in Engine.from_loaded(loaded).generate(PROMPTS, PARAMS)]
    recorder = Profile.of(ProfileConfig(folder=str(tmp_path / "new"), num_steps=5, skip=3), "sdar")
    engine = Engine.from_loaded(loaded, recorder=recorder)
    assert [choice.token_ids for choice in engine.generate(PROMPTS, PARAMS)] == expected
    (path,) = (tmp_path / "new").iterdir()
    assert steps(path) == [3, 4, 5, 6, 7]
    found = names(path)
    assert set(found) >= TEXT
    assert {name: found.count(name) for name in TEXT - {"plan"}} == dict.fromkeys(TEXT - {"plan"}, 5)
    assert found.count("plan") >= 4
    assert any(name.startswith("aten::") for name in found)
    assert path.name.startswith("sdar-")
    assert path.name.endswith("-from-3-steps-5.json")


def test_image_steps_are_recorded(tmp_path: Path) -> None:
    config = EngineConfig(model=str(PIPELINES[SD3]), dtype="float32", num_threads=1)
    loaded = load_pipeline(config, PIPELINES[SD3], resolve_device("cpu"))
    recorder = Profile(tmp_path, "sd3")
    engine = ImageEngine.from_loaded(loaded, recorder=recorder)
    recorder.arm()
    params = ImageParams(width=64, height=64, num_inference_steps=4, seed=0)
    (drawing,) = engine.draw("a red circle", params)
    assert drawing.error is None
    path = recorder.stop()
    assert path is not None
    assert steps(path) == [0, 1, 2, 3]
    found = names(path)
    assert set(found) >= IMAGE | {"encode"}
    assert found.count("decode") == 1
    assert found.count("forward") == 4


def test_recordings_are_begun_and_ended_by_hand(tmp_path: Path) -> None:
    recorder = Profile(tmp_path, "sdar")
    assert recorder.stop() is None
    engine = Engine.from_loaded(
        load(EngineConfig(model=SDAR, kv_memory=8 << 20, num_threads=1)), recorder=recorder
    )
    engine.generate(PROMPTS, PARAMS)
    assert list(tmp_path.iterdir()) == []
    recorder.arm()
    with pytest.raises(ConfigError, match="stop it first"):
        recorder.arm(num_steps=1)
    engine.generate(PROMPTS[:1], PARAMS)
    first = recorder.stop()
    recorder.arm(num_steps=1000)
    engine.generate(PROMPTS[:1], PARAMS)
    # It never comes to its number.
    recorder.close()
    assert first is not None
    (second,) = set(tmp_path.iterdir()) - {first}
    assert steps(first)
    assert steps(second)[0] == steps(first)[-1] + 1


def test_one_that_waits_for_its_first_step_can_be_called_off(tmp_path: Path) -> None:
    recorder = Profile.of(ProfileConfig(folder=str(tmp_path)), "sdar")
    assert recorder.stop() is None
    recorder.arm(num_steps=1, skip=3)
    recorder.arm(num_steps=1, skip=5)
    assert recorder.stop() is None
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--profile .*file"):
        Profile(tmp_path / "file", "sdar")
    for config, reason in (
        (ProfileConfig(folder="x", num_steps=0), "--profile-steps 0"),
        (ProfileConfig(folder="x", skip=-1), "--profile-start -1"),
    ):
        with pytest.raises(ConfigError, match=reason):
            EngineConfig(model=SDAR, profile=config).check()
