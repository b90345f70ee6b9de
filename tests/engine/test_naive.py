"""The engine against the naive loops of the benchmarks: same tokens and forwards, random requests."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.naive import dual_cache_generate, llada_generate, sdar_generate
from sfumato.core.spec import Sampling
from sfumato.models.folder import read_folder
from sfumato.models.weights import load_model
from sfumato.text.decoding.fast_dllm import FastDLLM
from sfumato.text.decoding.llada import LLaDA
from sfumato.text.decoding.protocol import Algorithm
from sfumato.text.decoding.sdar import SDAR
from sfumato.text.door import Replay
from sfumato.text.ends import CanvasEnd, EndRule, FillAfterEos
from tests.goldens.replay import Asked, load_checkpoint, make_spec, run
from tests.goldens.sources import ArgmaxSource

GOLDENS = Path(__file__).resolve().parent.parent / "data" / "goldens"


def asked(prompt: list[int], algorithm: Algorithm, end_rule: EndRule, *, length: int, block: int) -> Asked:
    """Return a request in reference mode."""
    spec = make_spec(prompt, max_tokens=length, block_length=block, sampling=Sampling())
    return Asked(spec, Replay(algorithm, end_rule, ArgmaxSource()))


@pytest.mark.parametrize("checkpoint", ["llada-tiny-mha", "llada-tiny-gqa"])
@pytest.mark.parametrize("variant", ["scheduled", "threshold", "early_stop"])
def test_llada_in_one_batch_equals_the_naive_loop_alone(checkpoint: str, variant: str) -> None:
    path = GOLDENS / "llada" / "checkpoints" / checkpoint
    plain = load_model(read_folder(str(path)), dtype=load_checkpoint(path).dtype, device="cpu", pack=False)
    rng = random.Random(f"{checkpoint} {variant}")
    mask_id = load_checkpoint(path).traits.mask_token_id
    requests, expected = [], []
    for _ in range(6):
        block = rng.choice([8, 16])
        length, prompt = 2 * block, [rng.randrange(1, 240) for _ in range(rng.randrange(2, 20))]
        steps = rng.choice([length, length // 2])
        threshold = None if variant == "scheduled" else rng.choice([0.5, 0.8])
        # Any token may play the end token: one that is often predicted stops early.
        eos = rng.choice([153, 28, 2]) if variant == "early_stop" else None
        algorithm: Algorithm = LLaDA(steps=steps) if threshold is None else FastDLLM(threshold=threshold)
        end_rule: EndRule = CanvasEnd() if eos is None else FillAfterEos(eos)
        requests.append(asked(prompt, algorithm, end_rule, length=length, block=block))
        naive = llada_generate(
            plain, prompt, mask_id=mask_id, steps=steps, gen_length=length, block_length=block,
            threshold=threshold, eos_id=eos,
        )  # fmt: skip
        expected.append((naive.canvas.tolist(), naive.num_forwards))
    found = [(item.final_ids, item.usage.denoise_steps) for item in run(load_checkpoint(path), requests)]
    assert found == expected
    if variant == "early_stop":
        assert any(forwards < 8 for _, forwards in expected)


@pytest.mark.parametrize("checkpoint", ["llada-tiny-mha", "llada-tiny-gqa"])
def test_dual_cache_in_one_batch_equals_a_plain_loop_with_kept_keys(checkpoint: str) -> None:
    path = GOLDENS / "llada" / "checkpoints" / checkpoint
    plain = load_model(read_folder(str(path)), dtype=load_checkpoint(path).dtype, device="cpu", pack=False)
    rng, mask_id = random.Random(checkpoint), load_checkpoint(path).traits.mask_token_id
    requests, expected, uncached = [], [], []
    for _ in range(6):
        block = rng.choice([8, 16])
        length, prompt = 2 * block, [rng.randrange(1, 240) for _ in range(rng.randrange(2, 20))]
        loop = {
            "mask_id": mask_id,
            "steps": rng.choice([length, length // 2]),
            "gen_length": length,
            "block_length": block,
        }
        algorithm = FastDLLM(threshold=None, steps=loop["steps"], cache="dual")
        requests.append(asked(prompt, algorithm, CanvasEnd(), length=length, block=block))
        kept = dual_cache_generate(plain, prompt, **loop)
        expected.append((kept.canvas.tolist(), kept.num_forwards))
        uncached.append(llada_generate(plain, prompt, **loop).canvas.tolist())
    found = [(item.final_ids, item.usage.denoise_steps) for item in run(load_checkpoint(path), requests)]
    assert found == expected
    assert [canvas for canvas, _ in expected] != uncached


def test_sdar_in_one_batch_equals_the_naive_loop_without_a_cache() -> None:
    path = GOLDENS / "sdar" / "checkpoints" / "sdar-tiny"
    loaded = load_checkpoint(path)
    plain = load_model(read_folder(str(path)), dtype=loaded.dtype, device="cpu", pack=False)
    rng = random.Random(0)
    requests, expected = [], []
    for _ in range(8):
        block = rng.choice([4, 8])
        steps = rng.choice([block, block // 2])
        length, prompt = rng.randrange(3, 24), [rng.randrange(1, 300) for _ in range(rng.randrange(1, 30))]
        algorithm = SDAR(remasking_strategy="low_confidence_static", denoising_steps=steps)
        requests.append(asked(prompt, algorithm, CanvasEnd(), length=length, block=block))
        naive = sdar_generate(
            plain, prompt, mask_id=loaded.traits.mask_token_id, gen_length=length, block_length=block,
            steps_per_block=steps,
        )  # fmt: skip
        expected.append((naive.canvas.tolist(), naive.num_forwards))
    found = [(item.final_ids, item.usage.denoise_steps) for item in run(loaded, requests)]
    assert found == expected


def test_llada_runs_all_its_steps_also_with_nothing_left_to_decide() -> None:
    path = GOLDENS / "llada" / "checkpoints" / "llada-tiny-gqa"
    algorithm = LLaDA(steps=40, is_reference=True)
    (found,) = run(load_checkpoint(path), [asked([1, 2, 3], algorithm, CanvasEnd(), length=16, block=8)])
    assert found.usage.denoise_steps == 40
    plain = load_model(read_folder(str(path)), dtype=load_checkpoint(path).dtype, device="cpu", pack=False)
    mask_id = load_checkpoint(path).traits.mask_token_id
    naive = llada_generate(plain, [1, 2, 3], mask_id=mask_id, steps=16, gen_length=16, block_length=8)
    assert found.final_ids == naive.canvas.tolist()
