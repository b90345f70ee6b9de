"""Fast-dLLM v2 against a plain loop written from the published `generate`: logits shifted over borders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.naive import whole_canvas_logits
from sfumato import Engine, EngineConfig, SamplingParams
from sfumato.engine.build import Loaded, load
from sfumato.errors import NotSupported
from tests.models.checkpoints import FAST_DLLM_V2, random_weights, write

BLOCK, MASK = 8, 89


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    path = write(tmp_path_factory.mktemp("model") / "v2", FAST_DLLM_V2, random_weights(FAST_DLLM_V2, seed=4))
    return load(EngineConfig(model=str(path), dtype="float32", device="cpu", kv_memory=4 << 20))


def shifted(loaded: Loaded, ids: list[int]) -> Tensor:
    """Return for each position the probabilities that the state in front of it gives, the mask left out."""
    logits = whole_canvas_logits(loaded.model, torch.tensor(ids), BLOCK)
    logits[:, MASK] = -torch.inf
    return torch.cat([logits[:1], logits[:-1]]).softmax(-1)


@torch.inference_mode()
def naive(
    loaded: Loaded, prompt: list[int], num_tokens: int, threshold: float, small: int
) -> tuple[list[int], int]:
    """Return the tokens and the denoise steps; every forward recomputes everything in front."""
    end = -(-(len(prompt) + num_tokens) // BLOCK) * BLOCK
    ids, steps = list(prompt), 0
    while len(ids) < end:
        stop = (len(ids) // BLOCK + 1) * BLOCK
        start = stop - BLOCK
        if len(ids) == start:
            # The forward that commits the block before decides the next one's first token.
            ids.append(int(shifted(loaded, [*ids, MASK])[start].argmax()))
            steps += 1
        ids += [MASK] * (stop - len(ids))
        while MASK in ids[start:stop]:
            first = ids.index(MASK, start)
            begin = start + (first - start) // small * small
            probabilities = shifted(loaded, ids)
            steps += 1
            open_now = [p for p in range(begin, min(begin + small, stop)) if ids[p] == MASK]
            best = max(open_now, key=lambda p: float(probabilities[p].max()))
            for position in open_now:
                confidence, token = probabilities[position].max(-1)
                if float(confidence) > threshold or position == best:
                    ids[position] = int(token)
    return ids[len(prompt) : len(prompt) + num_tokens], steps


@pytest.mark.parametrize("prompt_len", [1, 5, 8, 13, 16, 19])
@pytest.mark.parametrize(("threshold", "small"), [(0.2, 4), (0.9, 8), (0.1, 2)])
def test_the_engine_decodes_as_the_plain_loop(
    loaded: Loaded, prompt_len: int, threshold: float, small: int
) -> None:
    prompt = [(7 * index + 3) % 80 for index in range(prompt_len)]
    wanted, steps = naive(loaded, prompt, 30, threshold, small)
    params = SamplingParams(
        max_tokens=30,
        ignore_eos=True,
        algorithm_parameters={"threshold": threshold, "small_block_size": small},
    )
    engine = Engine.from_loaded(loaded)
    for _ in range(2):
        # The second time the prompt is in the prefix tree, whose pages a border must not change.
        (choice,) = engine.generate([prompt], params)
        assert choice.token_ids == wanted
        assert choice.usage.denoise_steps <= steps


def test_neighbours_and_other_algorithms_share_its_forwards(loaded: Loaded) -> None:
    engine = Engine.from_loaded(loaded)
    prompts = [[(5 * index + seed) % 80 for index in range(3 + 4 * seed)] for seed in range(6)]
    params = [
        SamplingParams(max_tokens=20, seed=seed, algorithm=name, temperature=0.5 * (seed % 2))
        for seed, name in enumerate(["fast_dllm_v2", "low_confidence", "fast_dllm"] * 2)
    ]
    together = engine.generate(prompts, params)
    for prompt, each, found in zip(prompts, params, together, strict=True):
        assert Engine.from_loaded(loaded).generate([prompt], each)[0].token_ids == found.token_ids


def test_it_needs_shifted_logits() -> None:
    with pytest.raises(NotSupported, match="shifted"):
        Engine.load("sfumato-tiny-sdar").generate("12+7=", SamplingParams(algorithm="fast_dllm_v2"))
