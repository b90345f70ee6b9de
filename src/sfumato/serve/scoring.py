"""Scores of given tokens: /v1/log_likelihood, and completions that echo their prompt with log probs."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from sfumato.core.messages import Score, Submit, TokenLogprob, Usage
from sfumato.core.spec import ScoreSpec
from sfumato.engine.frontend import draw_seed, make_score_spec
from sfumato.errors import NotSupported
from sfumato.serve.errors import failed, unavailable
from sfumato.serve.fields import Count, OnePrompt, Priority, Seed
from sfumato.serve.logprobs import TokenEntry, completion_logprobs, text_offsets
from sfumato.serve.metrics import Metrics
from sfumato.serve.registry import Registry, ServedModel
from sfumato.serve.schema import STRICT
from sfumato.serve.streams import CLIENT_GONE, ClientGone, json_response, until_gone

router = APIRouter()


class LogLikelihoodRequest(BaseModel):
    """Body of /v1/log_likelihood: how likely is a completion behind a prompt?"""

    model_config = STRICT

    model: str
    prompt: OnePrompt
    completion: OnePrompt
    num_samples: Count | None = None
    batch_size: Count | None = None
    cfg_scale: float | None = None
    seed: Seed | None = None
    block_length: Count | None = None
    priority: Priority | None = None
    timeout: Annotated[float, Field(gt=0, le=1e9)] | None = None


@router.post("/v1/log_likelihood")
async def create(request: Request, body: LogLikelihoodRequest) -> Response:
    """Score a completion: exactly where the model allows it, else by Monte Carlo."""
    registry: Registry = request.app.state.registry
    if registry.is_draining:
        raise unavailable("the server is shutting down and takes no new requests")
    model = registry.find(body.model)
    try:
        return json_response(await until_gone(request, _answer(model, body, request.app.state.metrics)))
    except ClientGone:
        return Response(status_code=CLIENT_GONE)


async def _answer(model: ServedModel, body: LogLikelihoodRequest, metrics: Metrics) -> dict[str, Any]:
    is_exact = model.traits.has_exact_cache
    seed = draw_seed() if body.seed is None else body.seed
    prompt_ids = await model.encode(body.prompt)
    target_ids = await model.encode(body.completion, add_special_tokens=False)
    spec = make_score_spec(
        prompt_ids,
        target_ids,
        model.traits,
        num_samples=body.num_samples,
        batch_size=body.batch_size,
        seed=seed,
        cfg_scale=body.cfg_scale or 0.0,
        logprobs=0 if is_exact else None,
        block_length=body.block_length,
    )
    name = f"loglik-{secrets.token_hex(12)}"
    ((score, usage),) = await score_all(
        model, name, [spec], priority=body.priority or 0, timeout=body.timeout
    )
    metrics.observe_score(model.name, "/v1/log_likelihood", usage)
    tokens = [token.logprob for token in score.tokens] if is_exact else None
    return {
        "id": name,
        "object": "log_likelihood",
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": model.fingerprint,
        "method": "exact" if is_exact else "monte_carlo",
        "log_likelihood": score.log_likelihood,
        "standard_error": score.standard_error,
        "num_samples": spec.num_samples,
        "seed": seed,
        "token_logprobs": tokens,
        "usage": {
            "prompt_tokens": len(prompt_ids),
            "completion_tokens": len(target_ids),
            "total_tokens": len(prompt_ids) + len(target_ids),
            "cached_tokens": usage.cached_tokens,
            "nfe": usage.nfe,
        },
    }


async def score_all(
    model: ServedModel, name: str, specs: list[ScoreSpec], *, priority: int = 0, timeout: float | None = None
) -> list[tuple[Score, Usage]]:
    """Let a model's engine score several targets together. Raises ApiError, RequestError or EngineError."""
    ids = [f"{name}-score-{index}" for index in range(len(specs))]
    submissions = [
        Submit(request_id=request_id, spec=spec, priority=priority, timeout=timeout)
        for request_id, spec in zip(ids, specs, strict=True)
    ]
    outputs = await model.client.submit(submissions)
    found: dict[str, tuple[Score, Usage]] = {}
    try:
        async for output in outputs:
            if output.score is not None:
                found[output.request_id] = (output.score, output.usage)
            elif output.finish_reason is not None:
                raise failed(output.error or f"the score was not computed: {output.finish_reason}")
    finally:
        outputs.close()
    return [found[request_id] for request_id in ids]


def check_echo(model: ServedModel) -> None:
    """Raise NotSupported where a prompt's tokens have no exact log probability."""
    if not model.traits.has_exact_cache:
        raise NotSupported(
            "echo with logprobs: every token of this model sees all others, so that the log probability of a "
            "prompt's token is only estimated, by POST /v1/log_likelihood",
            field="echo",
            value=True,
        )


async def prompt_logprobs(
    model: ServedModel, name: str, prompts: list[list[int]], logprobs: int, block_length: int | None
) -> list[list[TokenEntry]]:
    """Return the entries of each prompt's tokens; the first has nothing before it and no log probability."""
    specs = [
        make_score_spec(prompt[:1], prompt[1:], model.traits, logprobs=logprobs, block_length=block_length)
        for prompt in prompts
        if len(prompt) > 1
    ]
    scores = iter(await score_all(model, name, specs) if specs else [])
    entries = []
    for prompt in prompts:
        found = next(scores)[0].tokens if len(prompt) > 1 else ()
        offsets = text_offsets(model.tokenizer, prompt)
        first = [TokenEntry(token_id, TokenLogprob(logprob=0.0), 0) for token_id in prompt[:1]]
        entries.append(
            first
            + [
                TokenEntry(token_id, logprob, offset)
                for token_id, logprob, offset in zip(prompt[1:], found, offsets[1:], strict=True)
            ]
        )
    return entries


def echoed_logprobs(
    model: ServedModel, prompt: list[TokenEntry], generated: list[TokenEntry]
) -> dict[str, Any]:
    """Return the plain completions' form of a prompt's and an answer's tokens; the first has none."""
    shown = completion_logprobs(model, [*prompt, *generated])
    if prompt:
        shown["token_logprobs"][0] = None
        shown["top_logprobs"][0] = None
    return shown
