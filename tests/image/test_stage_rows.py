"""Encoding and decoding beside the steps: small ones share a launch, large ones hold no step up."""

from __future__ import annotations

import pytest

from sfumato.core.plan import RowKind, StepPlan
from sfumato.engine.build_image import LoadedPipeline
from sfumato.engine.image_engine import ImageEngine
from tests.image.drawing import spec_for, start


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
