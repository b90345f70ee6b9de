"""LLaDA2: diffusers' pipeline around our own model class, and the engine, on the same model in float32.

The pipeline recomputes everything up to the open block in every step; both use the very same packed weights,
so that the ratio is the loop's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import loaded_of
from benchmarks.peer_transformers import finish
from sfumato import Engine, Limits, SamplingParams
from sfumato.models.batch import Batch, Segment, group_segments
from sfumato.models.llada2 import shape_from_hf, traits_from_hf
from sfumato.text.decoding.block_refinement import BlockRefinement
from sfumato.text.door import Replay
from sfumato.text.ends import CanvasEnd
from tests.goldens.replay import make_spec
from tests.goldens.sources import ArgmaxSource

BLOCK = 32
# Denoise steps per block, that is four tokens per step.
STEPS = 8
_CONFIG: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "num_experts": 32,
    "num_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "moe_intermediate_size": 256,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "moe_router_enable_expert_bias": True,
    "score_function": "sigmoid",
    "mask_token_id": 31999,
}


@dataclass
class _Answer:
    """What the pipeline reads of a model's output."""

    logits: Tensor


class PipelineModel(nn.Module):
    """Our model class as the pipeline calls it: rows of equal length, block-causal from position 0."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        device: torch.device = self._model.device
        return device

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> _Answer:
        """Return logits f32[B, L, V]; the pipeline's mask hides nothing where lengths are whole blocks."""
        assert bool(attention_mask.all())
        rows, length = input_ids.shape
        ends = (position_ids[0] // BLOCK + 1) * BLOCK
        segments = [Segment(row * length, length, None, ends) for row in range(rows)]
        batch = Batch(
            token_ids=input_ids.flatten(),
            positions=position_ids.flatten(),
            groups=group_segments(segments, self._model.device),
        )
        logits = self._model.head(self._model.hidden(batch)).float()
        return _Answer(logits.view(rows, length, -1))


class DiffusersPeer:
    """Implements the peer protocol of `peers.py`."""

    name = "diffusers, LLaDA2 pipeline"
    vocab_size = int(_CONFIG["vocab_size"]) - 1

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

        self.max_tokens = max_tokens
        limits = Limits(max_running_requests=max_requests)
        traits = traits_from_hf(_CONFIG, {})
        loaded = loaded_of(traits, shape_from_hf(_CONFIG), torch.float32, limits)
        self._ours = Engine.from_loaded(loaded)
        scheduler = BlockRefinementScheduler(block_length=BLOCK)
        self._theirs = LLaDA2Pipeline(model=PipelineModel(loaded.model), scheduler=scheduler)
        self._theirs.set_progress_bar_config(disable=True)

    def prepare(self, prompts: Sequence[list[int]]) -> None:
        """Nothing is drawn."""

    def run_theirs(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Run the pipeline on one batch."""
        found = self._theirs(
            input_ids=torch.tensor(prompts),
            gen_length=self.max_tokens,
            block_length=BLOCK,
            num_inference_steps=STEPS,
            editing_threshold=None,
            eos_early_stop=False,
            mask_token_id=_CONFIG["mask_token_id"],
            output_type="seq",
        )
        rows: list[list[int]] = found.sequences.tolist()
        return rows

    def run_ours(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Run the engine in reference mode, all requests at once."""
        ids = []
        for prompt in prompts:
            algorithm = BlockRefinement(num_inference_steps=STEPS, is_reference=True)
            spec = make_spec(prompt, max_tokens=self.max_tokens, block_length=BLOCK)
            replay = Replay(algorithm, CanvasEnd(), ArgmaxSource())
            ids.append(self._ours.add_request((), spec=spec, replay=replay))
        return finish(self._ours, ids)

    def run_served(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Run the same requests as they are served."""
        params = SamplingParams(
            max_tokens=self.max_tokens,
            ignore_eos=True,
            seed=0,
            block_length=BLOCK,
            algorithm="block_refinement",
            algorithm_parameters={"num_inference_steps": STEPS},
        )
        return finish(self._ours, [self._ours.add_request(prompt, params) for prompt in prompts])
