"""No attribute of a shared component changes while requests run, whatever runs beside them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sfumato.engine.build_image import LoadedPipeline
from tests.image.drawing import pixels, run, spec_for, start


class Guard:
    """Fails on assignments to any module of a pipeline, and on whatever else has changed at the end."""

    def __init__(self, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.components = dict(pipeline.components)
        modules = [part for part in self.components.values() if isinstance(part, torch.nn.Module)]
        self.modules = {id(module): name for part in modules for name, module in part.named_modules()}
        self.changes: list[str] = []
        self.before = dict(self._snapshot())
        for name in ("__setattr__", "__delattr__"):
            self._watch(name, monkeypatch)

    def _watch(self, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(torch.nn.Module, method)

        def watched(module: torch.nn.Module, name: str, *value: Any) -> None:
            if id(module) in self.modules:
                self.changes.append(f"{type(module).__name__} {self.modules[id(module)]}.{name}")
            original(module, name, *value)

        monkeypatch.setattr(torch.nn.Module, method, watched)

    def _snapshot(self) -> Iterator[tuple[str, Any]]:
        for name, part in self.components.items():
            if not isinstance(part, torch.nn.Module):
                yield name, pickle.dumps(part)
                continue
            for key, tensor in (*part.named_parameters(), *part.named_buffers()):
                yield f"{name}.{key}", (tensor.data_ptr(), tensor._version)
            for key, module in part.named_modules():
                plain = {field: value for field, value in vars(module).items() if not field.startswith("_")}
                yield f"{name}.{key}", repr(sorted(plain.items(), key=lambda item: item[0]))

    def check(self) -> None:
        """Raise AssertionError naming what changed."""
        assert not self.changes
        assert dict(self._snapshot()) == self.before


def test_components_stay_as_they_are(any_pipeline: LoadedPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(any_pipeline)
    specs = [spec_for(any_pipeline, seed=seed, num_inference_steps=2 + seed) for seed in range(3)]
    previews = spec_for(any_pipeline, seed=9, partial_images=1)
    guard = Guard(any_pipeline.family.pipeline, monkeypatch)
    for outputs in run(engine, [*specs, previews]):
        assert pixels(outputs)
    guard.check()


def test_the_guard_sees_a_change(sd15: LoadedPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard(sd15.family.pipeline, monkeypatch)
    sd15.family.pipeline.unet.something = 1
    with pytest.raises(AssertionError, match="something"):
        guard.check()
    del sd15.family.pipeline.unet.something


def test_a_timestep_scheduler_is_each_request_s_own(sd15: LoadedPipeline) -> None:
    engine = start(sd15)
    ids = [engine.add_request(spec_for(sd15, seed=seed)) for seed in range(2)]
    engine.step()
    schedulers = [engine.request(request_id).work.state.timestep_scheduler for request_id in ids]  # type: ignore[union-attr, attr-defined]
    template = sd15.family.pipeline.scheduler
    assert len({id(scheduler) for scheduler in (*schedulers, template)}) == 3
    assert template.num_inference_steps is None
    engine.close()
