"""Log likelihoods: what sequential decoding would draw, and the estimate; whoever runs beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfumato.core.spec import ScoreSpec
from sfumato.engine.engine import Engine
from sfumato.engine.frontend import SamplingParams, make_score_spec
from sfumato.errors import NotSupported, RequestError
from sfumato.models.batch import Batch, Segment, group_segments
from sfumato.text.scoring import draw_masks

SDAR, LLADA = "sfumato-tiny-sdar", "sfumato-tiny-llada"
MESSAGES = [{"role": "user", "content": "Mia, 34, nurse in Oslo"}]


@pytest.fixture(scope="module")
def sdar() -> Engine:
    return Engine.load(SDAR, dtype="float32")


@pytest.fixture(scope="module")
def llada() -> Engine:
    return Engine.load(LLADA, dtype="float32")


def test_an_exact_score_is_what_sequential_decoding_reports(sdar: Engine) -> None:
    prompt = sdar.encode(MESSAGES)
    params = SamplingParams(
        max_tokens=21,
        temperature=1.3,
        seed=5,
        logprobs=3,
        ignore_eos=True,
        algorithm="sdar",
        algorithm_parameters={"remasking_strategy": "sequential"},
    )
    (choice,) = sdar.generate([prompt], params)
    score = sdar.log_likelihood(prompt, choice.token_ids, logprobs=3)
    assert choice.logprobs is not None
    assert len(score.tokens) == 21
    for drawn, scored in zip(choice.logprobs, score.tokens, strict=True):
        assert scored.logprob == pytest.approx(drawn.logprob, abs=1e-4)
        assert scored.top_ids == drawn.top_ids
    assert score.log_likelihood == pytest.approx(sum(token.logprob for token in score.tokens), abs=1e-4)
    assert score.standard_error is None


def test_exact_scores_depend_on_neither_cache_nor_neighbours_nor_room(sdar: Engine) -> None:
    tokens = sdar.encode("one two three four five six seven eight nine ten " * 4)
    wanted = Engine.load(SDAR, dtype="float32").log_likelihood(tokens[:3], tokens[3:])
    small = Engine.load(
        SDAR, dtype="float32", kv_memory=sdar.traits.kv_bytes_per_token(4) * (len(tokens) + 520)
    )
    for engine in (sdar, sdar, small):
        for _ in range(3):
            engine.add_request(sdar.encode(MESSAGES), SamplingParams(max_tokens=24, seed=1))
        found = engine.log_likelihood(tokens[:3], tokens[3:])
        assert found.log_likelihood == pytest.approx(wanted.log_likelihood, rel=1e-5)


def test_an_exact_score_may_begin_with_nothing(sdar: Engine) -> None:
    tokens = sdar.encode("one two three")
    whole = sdar.log_likelihood([], tokens, logprobs=0)
    rest = sdar.log_likelihood(tokens[:1], tokens[1:], logprobs=0)
    assert len(whole.tokens) == len(tokens)
    assert whole.tokens[1].logprob == pytest.approx(rest.tokens[0].logprob, abs=1e-5)


@torch.inference_mode()
def naive_estimate(engine: Engine, prompt: list[int], target: list[int], spec: ScoreSpec) -> float:
    """Return the estimate by one plain forward a sample."""
    model, mask = engine._loaded.model, engine.traits.mask_token_id
    values = []
    for masked in draw_masks(len(target), spec):
        ids = torch.tensor([*prompt, *(mask if m else t for t, m in zip(target, masked, strict=True))])

        def logits(tokens: torch.Tensor) -> torch.Tensor:
            segment = Segment(0, len(tokens), None, None)
            batch = Batch(tokens, torch.arange(len(tokens)), group_segments([segment], "cpu"))
            return model.head(model.hidden(batch)).float()

        shown = logits(ids)
        if spec.cfg_scale:
            hidden = ids.clone()
            hidden[: len(prompt)] = mask
            other = logits(hidden)
            shown = other + (spec.cfg_scale + 1) * (shown - other)
        at = len(prompt) + np.flatnonzero(masked)
        picked = shown.log_softmax(-1)[at, [target[p - len(prompt)] for p in at]]
        values.append(float(picked.sum()) / masked.mean())
    return float(np.mean(values))


@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_an_estimate_is_the_mean_over_its_maskings(llada: Engine, cfg_scale: float) -> None:
    prompt, target = llada.encode(MESSAGES), llada.encode('{"name": "Bob"}')
    spec = make_score_spec(
        prompt, target, llada.traits, num_samples=11, batch_size=4, seed=3, cfg_scale=cfg_scale
    )
    score = llada.log_likelihood(prompt, target, num_samples=11, batch_size=4, seed=3, cfg_scale=cfg_scale)
    assert score.log_likelihood == pytest.approx(naive_estimate(llada, prompt, target, spec), rel=1e-4)
    assert score.standard_error is not None
    again = llada.log_likelihood(prompt, target, num_samples=11, batch_size=4, seed=3, cfg_scale=cfg_scale)
    assert again == score
    other = llada.log_likelihood(prompt, target, num_samples=11, batch_size=4, seed=4, cfg_scale=cfg_scale)
    assert other != score


def test_maskings_are_spread_evenly_within_a_stratum() -> None:
    spec = ScoreSpec(
        prompt_ids=(1,), target_ids=tuple(range(12)), block_length=4, num_samples=8, batch_size=4, seed=9
    )
    counts = draw_masks(12, spec).sum(1)
    for stratum in (counts[:4], counts[4:]):
        assert sorted((stratum - stratum[0]) % 12) == [0, 3, 6, 9]
    assert ((counts >= 1) & (counts <= 12)).all()


@pytest.mark.parametrize(
    ("model", "fields", "field"),
    [
        (SDAR, {"num_samples": 5}, "num_samples"),
        (SDAR, {"cfg_scale": 0.5}, "cfg_scale"),
        (LLADA, {"num_samples": 0}, "num_samples"),
        (LLADA, {"num_samples": 4, "batch_size": 5}, "batch_size"),
        (LLADA, {"cfg_scale": -1.0}, "cfg_scale"),
        (LLADA, {"logprobs": 1}, "logprobs"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(
    model: str, fields: dict[str, float], field: str, request: pytest.FixtureRequest
) -> None:
    engine: Engine = request.getfixturevalue("sdar" if model == SDAR else "llada")
    with pytest.raises((RequestError, NotSupported)) as refused:
        engine.log_likelihood([5, 6], [7, 8], **fields)  # type: ignore[arg-type]
    assert refused.value.field == field


@pytest.mark.parametrize("model", ["sdar", "llada"])
def test_an_empty_or_too_long_target_is_refused(model: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(model)
    for target in ([], [5] * (engine.traits.context_length + 1), [engine.traits.vocab_size]):
        with pytest.raises(RequestError) as refused:
            engine.log_likelihood([5, 6], target)
        assert refused.value.field == "completion"
