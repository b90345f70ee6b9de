"""A request whose engine is gone is run again behind what its client has: the same answer, and no seam."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sfumato import Engine, Limits, SamplingParams
from sfumato.core.messages import FinishReason, Output
from sfumato.core.spec import TextSpec
from sfumato.engine.build import Loaded
from sfumato.engine.frontend import make_spec
from sfumato.errors import RequestError
from tests.engine.test_laws_families import choices_for, engine_with, loaded

__all__ = ["loaded"]

PROMPT = [5, 6, 7, 11, 12]


def outputs_of(engine: Engine, spec: TextSpec) -> list[Output]:
    """Run one request to its end and return all that came of it."""
    engine.add_request((), spec=spec)
    found: list[Output] = []
    while engine.has_work:
        for turn in engine.step():
            found.extend(turn.outputs)
    assert found[-1].error is None
    return found


def tokens_of(outputs: list[Output]) -> tuple[int, ...]:
    """Return what was output."""
    return tuple(token for output in outputs for token in output.token_ids)


def cuts(outputs: list[Output]) -> list[int]:
    """Return how many tokens a client may have when an engine dies, at five places at most."""
    lengths, total = [0], 0
    for output in outputs[:-1]:
        total += len(output.token_ids)
        lengths.append(total)
    places = sorted(set(lengths))
    return places if len(places) <= 5 else [places[index * (len(places) - 1) // 4] for index in range(5)]


def spec_of(loaded: Loaded, name: str, parameters: dict[str, Any], **fields: Any) -> TextSpec:
    """Return a request of three blocks and a rest."""
    asked: dict[str, Any] = {"max_tokens": 44, "seed": 3, "temperature": 0.7, "ignore_eos": True, **fields}
    if parameters.get("rule") == "credit":
        asked["temperature"] = 0.0
    if "steps" in parameters and name != "dream":
        asked["max_tokens"] = loaded.traits.block_length
    params = SamplingParams(algorithm=name, algorithm_parameters=parameters, **asked)
    return make_spec(PROMPT, params, loaded.traits)


@pytest.mark.parametrize("overlap", ["off", "device"])
def test_an_answer_goes_on_wherever_it_broke(loaded: Loaded, overlap: str) -> None:
    for name, parameters in choices_for(loaded):
        spec = spec_of(loaded, name, parameters)
        whole = outputs_of(engine_with(loaded, Limits()), spec)
        wanted = tokens_of(whole)
        for cut in cuts(whole):
            again = msgspec.structs.replace(spec, delivered=wanted[:cut])
            found = outputs_of(engine_with(loaded, Limits(), overlap=overlap), again)
            assert tokens_of(found) == wanted[cut:], (name, parameters, cut)
            assert found[-1].finish_reason is whole[-1].finish_reason
            assert found[-1].usage.completion_tokens == len(wanted)
            assert found[-1].usage.denoise_steps <= whole[-1].usage.denoise_steps


def test_whole_blocks_are_not_denoised_again(loaded: Loaded) -> None:
    name, parameters = choices_for(loaded)[0]
    spec = spec_of(loaded, name, parameters)
    whole = outputs_of(engine_with(loaded, Limits()), spec)
    wanted = tokens_of(whole)
    again = msgspec.structs.replace(spec, delivered=wanted[:-1])
    found = outputs_of(engine_with(loaded, Limits()), again)
    assert tokens_of(found) == wanted[-1:]
    if loaded.traits.block_length < len(wanted):
        assert found[-1].usage.denoise_steps < whole[-1].usage.denoise_steps


def test_what_was_delivered_stands_in_any_numerics(loaded: Loaded) -> None:
    """Tokens that this engine would never choose: it goes on behind them, and cannot take them back."""
    for name, parameters in choices_for(loaded):
        spec = spec_of(loaded, name, parameters)
        strange = tuple(range(20, 31))
        engine = engine_with(loaded, Limits())
        request_id = engine.add_request((), spec=msgspec.structs.replace(spec, delivered=strange))
        request = engine.request(request_id)
        tokens: list[int] = []
        while engine.has_work:
            request = engine.request(request_id) or request
            for turn in engine.step():
                for output in turn.outputs:
                    tokens.extend(output.token_ids)
        assert request is not None
        canvas = request.work.canvas  # type: ignore[attr-defined]
        end = len(PROMPT) + len(strange)
        assert len(tokens) == spec.max_tokens - len(strange), (name, parameters)
        shown = canvas.token_ids[len(PROMPT) : end][~canvas.undecided[len(PROMPT) : end]].tolist()
        kept = [
            token
            for token, is_open in zip(strange, canvas.undecided[len(PROMPT) : end], strict=True)
            if not is_open
        ]
        assert shown == kept, (name, parameters)


def test_pins_and_a_stop_go_on_as_well(loaded: Loaded) -> None:
    name, parameters = choices_for(loaded)[0]
    infill = tuple(9 if place % 5 == 0 else None for place in range(30))
    spec = spec_of(loaded, name, parameters, infill=infill, max_tokens=30)
    if loaded.traits.has_exact_cache or loaded.traits.has_mask_token:
        whole = outputs_of(engine_with(loaded, Limits()), spec)
        wanted = tokens_of(whole)
        for cut in cuts(whole):
            again = msgspec.structs.replace(spec, delivered=wanted[:cut])
            assert tokens_of(outputs_of(engine_with(loaded, Limits()), again)) == wanted[cut:]
    open_ended = spec_of(loaded, name, parameters)
    wanted = tokens_of(outputs_of(engine_with(loaded, Limits()), open_ended))
    stops = msgspec.structs.replace(open_ended, stop_token_ids=(wanted[20],))
    whole = outputs_of(engine_with(loaded, Limits()), stops)
    assert whole[-1].finish_reason is FinishReason.STOP
    for cut in cuts(whole):
        again = msgspec.structs.replace(stops, delivered=tokens_of(whole)[:cut])
        found = outputs_of(engine_with(loaded, Limits()), again)
        assert tokens_of(found) == tokens_of(whole)[cut:]
        assert found[-1].finish_reason is FinishReason.STOP


def test_what_cannot_have_been_delivered_is_refused(loaded: Loaded) -> None:
    name, parameters = choices_for(loaded)[0]
    spec = spec_of(loaded, name, parameters, max_tokens=8)
    engine = engine_with(loaded, Limits())
    for delivered, reason in (
        (tuple(range(8)), "delivered has 8 tokens, an answer of 8 has ended with them"),
        ((loaded.traits.vocab_size,), "delivered has token id"),
    ):
        with pytest.raises(RequestError, match=reason):
            engine.add_request((), spec=msgspec.structs.replace(spec, delivered=delivered))
    stops = msgspec.structs.replace(spec, stop_token_ids=(4,), delivered=(3, 4))
    with pytest.raises(RequestError, match="delivered has the stop token 4"):
        engine.add_request((), spec=stops)
