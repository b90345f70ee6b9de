"""Situation 42: unlike image requests share forwards, and each equals its solo run."""

from __future__ import annotations

import itertools

import torch

from sfumato.core.plan import RowKind
from sfumato.core.spec import TimestepSchedulerSpec
from sfumato.engine.build_image import LoadedPipeline
from sfumato.engine.image_engine import ImageEngine
from sfumato.image.work import ImageWork
from tests.image.drawing import pixels, run, spec_for, start


def planned(engine: ImageEngine) -> list[list[str]]:
    """Return who was in each denoise forward from now on; filled while the engine runs."""
    found: list[list[str]] = []
    plan = engine.loop.scheduler.plan

    def recorded(live, kinds):  # type: ignore[no-untyped-def]
        made = plan(live, kinds)
        if made.rows and RowKind.DENOISE in kinds:
            found.append(made.request_ids())
        return made

    engine.loop.scheduler.plan = recorded  # type: ignore[method-assign]
    return found


def latents(loaded: LoadedPipeline, specs: list, **options: object) -> list[torch.Tensor]:  # type: ignore[type-arg]
    """Return the final latents of requests that ran together."""
    engine = start(loaded, **options)
    ids = [engine.add_request(spec) for spec in specs]
    works: dict[str, ImageWork] = {}
    while engine.has_work:
        for turn in engine.step():
            assert not turn.refusals, turn.refusals
        for request_id in ids:
            request = engine.request(request_id)
            if request is not None:
                works[request_id] = request.work  # type: ignore[assignment]
    engine.close()
    return [works[request_id].state.latents for request_id in ids]  # type: ignore[misc]


def unlike(loaded: LoadedPipeline) -> list:  # type: ignore[type-arg]
    """Return requests with different steps, guidance, negative prompts and timestep schedulers."""
    # Families with true guidance take a scale only together with a negative prompt.
    is_plain = "guidance_scale" in loaded.traits.fields
    scale = "guidance_scale" if is_plain else "true_cfg_scale"
    without = {"negative_prompt": None} if is_plain else {}
    plain = spec_for(loaded, seed=3, num_inference_steps=4)
    guided = spec_for(loaded, seed=4, num_inference_steps=7, **{scale: 2.5}, **without)
    unguided = spec_for(loaded, seed=5, num_inference_steps=5, **{scale: 1.0, "negative_prompt": None})
    other = spec_for(loaded, seed=6, num_inference_steps=6)
    solvers = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
    name = next(name for name in solvers if name != loaded.traits.scheduler)
    from msgspec.structs import replace

    return [plain, guided, unguided, replace(other, timestep_scheduler=TimestepSchedulerSpec(name=name))]


def test_unlike_requests_share_forwards_and_equal_their_solo_runs(any_pipeline: LoadedPipeline) -> None:
    specs = unlike(any_pipeline)
    alone = [latents(any_pipeline, [spec])[0] for spec in specs]
    for found, expected in zip(latents(any_pipeline, specs), alone, strict=True):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_they_really_share_forwards(sd15: LoadedPipeline) -> None:
    engine = start(sd15)
    forwards = planned(engine)
    run(engine, unlike(sd15))
    assert max(len(ids) for ids in forwards) == 4
    assert len(forwards) < sum(len(ids) for ids in forwards)


def test_in_deterministic_mode_not_a_bit_differs(any_pipeline: LoadedPipeline) -> None:
    specs = unlike(any_pipeline)
    alone = [latents(any_pipeline, [spec], deterministic_rows=4)[0] for spec in specs]
    together = latents(any_pipeline, specs[::-1], deterministic_rows=4)[::-1]
    assert all(torch.equal(found, expected) for found, expected in zip(together, alone, strict=True))


def test_another_shape_at_the_head_lets_others_pass_for_a_bounded_time(sd15: LoadedPipeline) -> None:
    engine = start(sd15)
    forwards = planned(engine)
    large = engine.add_request(spec_for(sd15, height=64, width=64, num_inference_steps=6))
    small = [engine.add_request(spec_for(sd15, seed=seed, num_inference_steps=6)) for seed in range(3)]
    while engine.has_work:
        engine.step()
    # No forward mixes shapes, and neither of them waits more than a step for the other.
    assert all(len(ids) == 1 or large not in ids for ids in forwards)
    both = [number for number, ids in enumerate(forwards) if large in ids]
    assert max(b - a for a, b in itertools.pairwise(both)) <= 2
    assert any(set(ids) == set(small) for ids in forwards)


def test_a_request_joins_between_two_steps_and_changes_nobody(sd15: LoadedPipeline) -> None:
    first, second = spec_for(sd15, seed=1, num_inference_steps=8), spec_for(sd15, seed=2)
    alone = [pixels(run(start(sd15, deterministic_rows=4), [spec])[0]) for spec in (first, second)]
    engine = start(sd15, deterministic_rows=4)
    found: dict[str, list] = {engine.add_request(first): []}  # type: ignore[type-arg]
    joined = False
    while engine.has_work:
        for turn in engine.step():
            for output in turn.outputs:
                found[output.request_id].append(output)
                if output.step is not None and output.step.done == 4 and not joined:
                    joined = True
                    found[engine.add_request(second)] = []
    assert [pixels(outputs) for outputs in found.values()] == alone
