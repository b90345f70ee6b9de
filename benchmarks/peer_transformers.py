"""DiffusionGemma: transformers' generate and the engine on the same random weights, float32.

What transformers draws (first canvases, sampled tokens, random tokens) is recorded in an untimed run and
replayed through the engine, so that both must give the same tokens; its timed runs are as installed.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sfumato import Engine, EngineConfig, Limits, SamplingParams
from sfumato.text.decoding.entropy_bound import EntropyBound
from sfumato.text.door import Replay
from sfumato.text.ends import CanvasEnd
from tests.goldens.diffusion_gemma import RecordedCanvases
from tests.goldens.replay import make_spec

CANVAS = 64
STEPS = 8
_SEED = 5
# No canvas ends early, so that all make the same number of steps.
_NEVER_SURE = 1e-12
# Layers with fresh weights multiply rounding until other experts are chosen; trained ones add little each.
_LAYER_SHARE = 0.1
# Cooling further, entropies would sum up to the bound in steps as small as the peer's rounding of them.
_TEMPERATURES = {"t_min": 0.7, "t_max": 0.8}
# The last of the chosen experts has little weight, so that it matters little which of two equals that is.
_EXPERT_SPREAD = 500.0
_LAYERS = 6
# The published model's proportions: five sliding layers to a full one, MLP and experts side by side.
_TEXT: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": _LAYERS,
    "layer_types": ["sliding_attention"] * (_LAYERS - 1) + ["full_attention"],
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "per_layer_config": {str(_LAYERS - 1): {"head_dim": 128, "num_key_value_heads": 2}},
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_experts": 32,
    "top_k_experts": 4,
    "vocab_size": 32000,
    "sliding_window": 512,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
}
# Never run: no request here has an image.
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "patch_size": 2,
    "pooling_kernel_size": 1,
    "position_embedding_size": 16,
}


class TransformersPeer:
    """Implements the peer protocol of `peers.py`."""

    name = "transformers, DiffusionGemma"
    vocab_size = int(_TEXT["vocab_size"])

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

        self.max_tokens = max_tokens
        torch.manual_seed(0)
        config = DiffusionGemmaConfig(
            text_config=_TEXT, vision_config=_VISION, canvas_length=CANVAS, tie_word_embeddings=True
        )
        self._theirs = DiffusionGemmaForBlockDiffusion(config).float().eval()
        for layer in self._theirs.model.decoder.layers:
            layer.router.proj.weight.data *= _EXPERT_SPREAD
            layer.post_attention_layernorm.weight.data *= _LAYER_SHARE
            layer.post_feedforward_layernorm.weight.data *= _LAYER_SHARE
        with tempfile.TemporaryDirectory() as folder:
            self._theirs.save_pretrained(folder)
            self._ours = Engine.load(
                EngineConfig(
                    model=folder,
                    dtype="float32",
                    device="cpu",
                    kv_memory=256 << 20,
                    limits=Limits(max_running_requests=max_requests),
                )
            )
        self._draws: list[Tensor] = []

    def prepare(self, prompts: Sequence[list[int]]) -> None:
        """Record what transformers draws for these prompts."""
        self._draws = []
        with _recorded(self._draws):
            self.run_theirs(prompts)

    def run_theirs(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Generate in one batch."""
        torch.manual_seed(_SEED)
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            found = self._theirs.generate(
                ids,
                max_new_tokens=self.max_tokens,
                max_denoising_steps=STEPS,
                confidence_threshold=_NEVER_SURE,
                **_TEMPERATURES,
                eos_token_id=None,
            )
        return [row[ids.shape[1] :] for row in found.sequences.tolist()]

    def run_ours(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Replay the draws, all requests at once."""
        ids = []
        for row, prompt in enumerate(prompts):
            algorithm = EntropyBound(
                max_denoising_steps=STEPS, confidence_threshold=_NEVER_SURE, **_TEMPERATURES
            )
            replay = Replay(algorithm, CanvasEnd(), self._source(row, len(prompt)))
            spec = make_spec(prompt, max_tokens=self.max_tokens, block_length=CANVAS)
            ids.append(self._ours.add_request((), spec=spec, replay=replay))
        return finish(self._ours, ids)

    def run_served(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Run the same requests with the engine's own noise."""
        params = SamplingParams(
            max_tokens=self.max_tokens,
            ignore_eos=True,
            seed=0,
            algorithm="entropy_bound",
            algorithm_parameters={
                "max_denoising_steps": STEPS,
                "confidence_threshold": _NEVER_SURE,
                **_TEMPERATURES,
            },
        )
        return finish(self._ours, [self._ours.add_request(prompt, params) for prompt in prompts])

    def _source(self, row: int, start: int) -> RecordedCanvases:
        """Return one row's draws: per canvas its first tokens, then per step drawn and random tokens."""
        drawn: dict[tuple[int, int], Sequence[int]] = {}
        random: dict[tuple[int, int], Sequence[int]] = {}
        per_canvas = 1 + 2 * STEPS
        for number, draw in enumerate(self._draws):
            block, place = divmod(number, per_canvas)
            step, is_drawn = (place - 1) // 2, place % 2 == 1
            (drawn if is_drawn else random)[block, step] = draw.view(-1, CANVAS)[row].tolist()
        return RecordedCanvases(drawn, random, start, CANVAS)


def finish(engine: Engine, request_ids: Sequence[str]) -> list[list[int]]:
    """Run requests to their ends and return their tokens."""
    found: dict[str, list[int]] = {request_id: [] for request_id in request_ids}
    while engine.has_work:
        for turn in engine.step():
            assert not turn.refusals, turn.refusals
            for output in turn.outputs:
                assert output.error is None, output.error
                found[output.request_id].extend(output.token_ids)
    return list(found.values())


@contextlib.contextmanager
def _recorded(draws: list[Tensor]) -> Iterator[None]:
    """Keep what torch draws, in order."""

    def keeping(draw: Any) -> Any:
        def drawn(*args: Any, **options: Any) -> Tensor:
            draws.append(draw(*args, **options))
            return draws[-1]

        return drawn

    with (
        mock.patch.object(torch, "multinomial", keeping(torch.multinomial)),
        mock.patch.object(torch, "randint", keeping(torch.randint)),
    ):
        yield
