"""Plans the generate kinds of the Dream family: whole canvas, Fast-dLLM's blocks, d3LLM."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sfumato.core.spec import Sampling, TextSpec
from sfumato.text.decoding.d3llm import D3LLM
from sfumato.text.decoding.dream import Dream
from sfumato.text.decoding.entropy_threshold import EntropyThreshold
from sfumato.text.decoding.fast_dllm_dream import FastDLLMDream
from sfumato.text.decoding.protocol import Algorithm
from sfumato.text.door import Replay
from sfumato.text.ends import CanvasEnd
from sfumato.text.random_source import RandomSource
from tests.goldens.cases import Case
from tests.goldens.replay import (
    Asked,
    Checkpoint,
    Planned,
    Recording,
    expect_canvases,
    expect_equal,
    make_spec,
)
from tests.goldens.sources import ArgmaxSource

_NEVER_CACHED = 10_000


def plan_diffusion_generate(case: Case) -> Planned:
    """Plan `diffusion_generate`, one request per row, padding removed."""
    used = case["effective_generation_config"]
    algorithm = Dream(
        alg=used["alg"],
        steps=used["steps"],
        eps=used["eps"],
        threshold=case["params"].get("threshold", 0.9),
        alg_temp=used.get("alg_temp") or 0.0,
        is_reference=True,
    )
    return _plan(case, algorithm, case["params"]["max_new_tokens"])


def plan_fast_dllm(case: Case) -> Planned:
    """Plan Fast-dLLM's block loops with a prefix or dual cache."""
    params, used = case["params"], case["effective_generation_config"]
    alg = used["alg"] if used["alg"].endswith("_threshold") else "entropy"
    algorithm = FastDLLMDream(
        alg=alg,
        threshold=params.get("threshold", 0.9),
        cache="dual" if params.get("dual_cache") else "prefix",
        steps=params["steps"],
        eps=used["eps"],
        is_reference=True,
    )
    return _plan(case, algorithm, params["block_length"])


def plan_single_block(case: Case) -> Planned:
    """Plan d3LLM's block by block form."""
    algorithm = EntropyThreshold(threshold=case["params"]["threshold"])
    return _plan(case, algorithm, case["params"]["block_length"], has_filters=False)


def plan_multi_block(case: Case) -> Planned:
    """Plan d3LLM's `generate_multi_block`."""
    params = case["params"]
    algorithm = D3LLM(
        threshold=params["threshold"],
        block_add_threshold=params["block_add_threshold"],
        decoded_token_threshold=params["decoded_token_threshold"],
        cache_delay_iter=params.get("cache_delay_iter", _NEVER_CACHED),
        refresh_interval=params.get("refresh_interval", 10_000),
        early_stop=params.get("early_stop", False),
        variant="dream",
        is_reference=True,
        reference_eos=case["eos_token_id"],
    )
    return _plan(case, algorithm, params["block_size"], has_filters=False)


def _plan(case: Case, algorithm: Algorithm, block_length: int, *, has_filters: bool = True) -> Planned:
    used = case["effective_generation_config"]
    sampling = Sampling()
    if has_filters:
        # A top_p or top_k of null is off.
        sampling = Sampling(top_p=used["top_p"] or 1.0, top_k=used["top_k"] or 0)
    masks = case["attention_mask"] or [[1] * len(row) for row in case["input_ids"]]
    paddings = [row.index(1) for row in masks]
    asked = []
    for row, (ids, padding) in enumerate(zip(case["input_ids"], paddings, strict=True)):
        spec = _spec(case, ids[padding:], block_length, sampling)
        asked.append(Asked(spec, Replay(algorithm, CanvasEnd(), _source(case, row))))

    def verify(recordings: list[Recording]) -> None:
        for row, (recording, padding) in enumerate(zip(recordings, paddings, strict=True)):
            canvases = [entry["canvas"] for entry in case["trace"]]
            rows = [canvas[row] if isinstance(canvas[0], list) else canvas for canvas in canvases]
            expect_canvases(f"row {row}, ", recording, [canvas[padding:] for canvas in rows])
            expect_equal(f"row {row}: nfe", recording.usage.denoise_steps, case["nfe"])
            expect_equal(f"row {row}: final ids", recording.final_ids, case["final_ids"][row][padding:])

    return Planned(Checkpoint(case.checkpoint_path, mask_token_id=case["mask_token_id"]), asked, verify)


def _spec(case: Case, prompt: list[int], block_length: int, sampling: Sampling) -> TextSpec:
    """Return the spec of one row; masks that its prompt holds are open, and decided like any other."""
    mask, length = case["mask_token_id"], case["params"]["max_new_tokens"]
    first = prompt.index(mask) if mask in prompt else len(prompt)
    infill = tuple(None if token == mask else token for token in prompt[first:]) + (None,) * length
    return make_spec(
        prompt[:first],
        max_tokens=len(infill),
        block_length=block_length,
        sampling=sampling,
        infill=infill,
    )


class RecordedUniforms(ArgmaxSource):
    """Uniform numbers f32 per forward, for the positions that were masked then."""

    def __init__(self, drawn: list[dict[int, float]]) -> None:
        self._drawn = drawn

    def uniform(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the recorded numbers; a position that is decided had none."""
        return np.asarray([self._drawn[step].get(int(p), 1.0) for p in positions], dtype=np.float32)


def _source(case: Case, row: int) -> RandomSource:
    if case.get("uniforms") is None:
        return ArgmaxSource()
    mask = case["mask_token_id"]
    length = case["params"]["max_new_tokens"]
    before = [[*ids, *[mask] * length] for ids in case["input_ids"]]
    drawn = []
    for numbers, entry in zip(case["uniforms"], case["trace"], strict=True):
        masked = [
            (r, p) for r, canvas in enumerate(before) for p, token in enumerate(canvas) if token == mask
        ]
        by_place = dict(zip(masked, numbers, strict=True))
        drawn.append({p: value for (r, p), value in by_place.items() if r == row})
        before = entry["canvas"]
    return RecordedUniforms(drawn)
