"""Encoding and decoding beside the steps: small ones share a launch, large ones hold no step up."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.core.plan import RowKind, StepPlan
from sfumato.engine.build_image import LoadedPipeline
from sfumato.engine.image_engine import ImageEngine
from tests.image.drawing import pixels, run, spec_for, start


def plans_of(engine: ImageEngine, kind: RowKind) -> list[StepPlan]:
    """Return the plans of one lane from now on, and whether each ran between steps; filled meanwhile."""
    found: list[StepPlan] = []
    (lane,) = (lane for lane in engine.loop.lanes if lane.kinds == frozenset({kind}))
    launch = lane.launch

    def recorded(plan, live):  # type: ignore[no-untyped-def]
        found.append(plan)
        launch(plan, live)

    lane.launch = recorded  # type: ignore[method-assign]
    return found


def run_all(engine: ImageEngine) -> None:
    """Run everything to its end."""
    while engine.has_work:
        for turn in engine.step():
            assert all(output.error is None for output in turn.outputs)


@pytest.mark.parametrize("order", ["fair", "shortest"])
def test_what_is_due_together_is_encoded_and_decoded_together(sd15: LoadedPipeline, order: str) -> None:
    engine = start(sd15, limits={"order": order})
    encodes, decodes = plans_of(engine, RowKind.ENCODE), plans_of(engine, RowKind.DECODE)
    for seed in range(4):
        engine.add_request(spec_for(sd15, num_inference_steps=4, seed=seed, partial_images=1))
    run_all(engine)
    assert [len(plan.rows) for plan in encodes] == [4]
    # A preview each, then a picture each.
    assert [len(plan.rows) for plan in decodes] == [4, 4]


def test_large_pictures_are_decoded_one_by_one_beside_the_steps(sd15: LoadedPipeline) -> None:
    engine = start(sd15)
    decodes = plans_of(engine, RowKind.DECODE)
    (lane,) = (lane for lane in engine.loop.lanes if lane.kinds == frozenset({RowKind.DECODE}))
    for seed in range(2):
        engine.add_request(
            spec_for(sd15, num_inference_steps=2, seed=seed, height=160, width=160, partial_images=0)
        )
    engine.add_request(spec_for(sd15, num_inference_steps=2, seed=7, partial_images=0))
    run_all(engine)
    sizes = [(len(plan.rows), plan.rows[0].cost.tokens, lane._is_short(plan)) for plan in decodes]
    assert (1, 160 * 160, False) in sizes
    assert not any(count > 1 for count, tokens, _ in sizes if tokens == 160 * 160)
    assert all(is_short for _, tokens, is_short in sizes if tokens < 100 * 100)


def test_what_is_shown_on_the_way_costs_no_turn(sd3: LoadedPipeline) -> None:
    engine = start(sd3)
    engine.add_request(spec_for(sd3, num_inference_steps=4, partial_images=3))
    num_turns, kinds = 0, []
    while engine.has_work:
        for turn in engine.step():
            kinds += [step.kind for step in turn.steps]
            if any(output.pictures for output in turn.outputs):
                # A picture is sent before the step that follows it.
                assert [step.kind for step in turn.steps] == ["decode"]
        num_turns += 1
    assert kinds == ["encode", "denoise", *["decode", "denoise"] * 3, "decode"]
    assert num_turns == 5


def test_pictures_of_one_size_are_decoded_by_one_call(
    sd3: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    family = type(sd3.family)
    decode = family.decode

    def counted(self, vae, latents):  # type: ignore[no-untyped-def]
        calls.append(len(latents))
        return decode(self, vae, latents)

    monkeypatch.setattr(family, "decode", counted)
    specs = [spec_for(sd3, num_inference_steps=2, seed=seed, partial_images=0) for seed in range(3)]
    specs.append(spec_for(sd3, num_inference_steps=2, seed=3, partial_images=0, height=48))
    together = [pixels(outputs) for outputs in run(start(sd3), specs)]
    assert sorted(calls) == [1, 3]
    calls.clear()
    apart = [pixels(outputs) for outputs in run(start(sd3, deterministic_rows=2), specs)]
    assert calls == [1] * 4
    for some, others in zip(together, apart, strict=True):
        for one, other in zip(some, others, strict=True):
            near = abs(np.frombuffer(one, np.uint8).astype(int) - np.frombuffer(other, np.uint8)) <= 1
            assert near.mean() >= 0.999


def test_a_picture_that_cannot_be_decoded_harms_no_other_of_its_call(
    sd3: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = type(sd3.family)
    decode, poison = family.decode, 12.5

    def picky(self, vae, latents):  # type: ignore[no-untyped-def]
        if bool((latents == poison).any()):
            raise ValueError("not this one")
        return decode(self, vae, latents)

    monkeypatch.setattr(family, "decode", picky)
    engine = start(sd3)
    specs = [spec_for(sd3, num_inference_steps=2, seed=seed, partial_images=0) for seed in range(3)]
    names = [engine.add_request(spec) for spec in specs]
    ended: dict[str, str | None] = {}
    while engine.has_work:
        for turn in engine.step():
            ended |= {out.request_id: out.error for out in turn.outputs if out.finish_reason is not None}
        for request in engine.loop.live.values():
            state = request.work.state  # type: ignore[attr-defined]
            if request.id == names[1] and state.is_denoised:
                state.latents.fill_(poison)
    assert ended[names[0]] is None
    assert ended[names[2]] is None
    assert "decoding failed: not this one" in str(ended[names[1]])
