"""Steps whose forwards are recorded and replayed give the pictures of those that are not."""

from __future__ import annotations

import pytest
import torch

from sfumato.engine.build_image import LoadedPipeline
from sfumato.image.recorded import RecordedForwards
from sfumato.image.runner import DenoiseRunner
from tests.image.drawing import pixels, run, spec_for, start


def drawn(loaded: LoadedPipeline, graphs: str) -> tuple[list[list[bytes]], RecordedForwards | None]:
    """Return the pictures of two requests of unlike lengths, and what was recorded."""
    engine = start(loaded, graphs=graphs)
    specs = [spec_for(loaded, num_inference_steps=4 + number, seed=number) for number in range(2)]
    found = [pixels(outputs) for outputs in run(engine, specs)]
    (runner,) = (lane.runner for lane in engine.loop.lanes if isinstance(lane.runner, DenoiseRunner))
    engine.close()
    return found, runner.forwards


def test_pictures_are_the_same(any_pipeline: LoadedPipeline) -> None:
    expected, nothing = drawn(any_pipeline, "off")
    found, forwards = drawn(any_pipeline, "on")
    assert nothing is None
    assert found == expected
    assert forwards is not None
    assert forwards.failure is None


def test_a_shape_is_recorded_when_it_comes_again(sd3: LoadedPipeline) -> None:
    _, forwards = drawn(sd3, "on")
    assert forwards is not None
    # Of each shape the first forward runs as it is.
    shapes = set(forwards._seen)
    assert forwards.num_replays > 0
    assert set(forwards._places) <= shapes
    before = forwards.num_replays
    inputs = next(iter(forwards._places.values())).inputs
    changed = {name: value + 1 if name == "sample" else value for name, value in inputs.items()}
    expected = sd3.family.forward(changed, "transformer")
    assert torch.equal(forwards(changed, next(iter(forwards._places))[0]), expected)
    assert forwards.num_replays == before + 1


def test_what_cannot_be_recorded_runs(sd3: LoadedPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(forward: object) -> None:
        raise RuntimeError("not while capturing")

    forwards = RecordedForwards(sd3.family, refuse)  # type: ignore[arg-type]
    inputs = {
        "sample": torch.zeros(1, 4, 8, 8),
        "time": torch.ones(1),
    }
    calls = []

    class Plain:
        device = torch.device("cpu")

        def forward(self, given: dict[str, torch.Tensor], expert: str) -> torch.Tensor:
            calls.append(expert)
            return given["sample"] + 1

    forwards._family = Plain()  # type: ignore[assignment]
    for _ in range(4):
        assert torch.equal(forwards(inputs, "only"), torch.ones(1, 4, 8, 8))
    assert len(calls) == 4
    assert capsys.readouterr().err.count("without CUDA graphs") == 1
