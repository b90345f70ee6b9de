"""LLaDA2 against a forward pass written out token by token from the checkpoint's own tensor names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.naive import whole_canvas_logits
from sfumato.errors import CheckpointError
from sfumato.models.folder import Overrides, resolve_traits
from tests.models.checkpoints import LLADA2, load, random_weights, write
from tests.models.test_experts import naive_groups

LENGTH = 21


class Naive:
    """The semantics of the family's golden README, one token at a time where that is plainer."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        self.config, self.weights = config, weights

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Root-mean-square norm over the last axis."""
        eps = self.config["rms_norm_eps"]
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self.weights[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Matrix product, with a bias where the checkpoint has one."""
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def mlp(self, x: Tensor, name: str) -> Tensor:
        """The gated MLP."""
        inner = F.silu(self.linear(x, f"{name}.gate_proj")) * self.linear(x, f"{name}.up_proj")
        return self.linear(inner, f"{name}.down_proj")

    def turn(self, vector: Tensor, position: int, width: int) -> Tensor:
        """Rotate the first `width` dimensions of one head at one position, pair by pair."""
        turned = vector.clone()
        for pair in range(width // 2):
            angle = torch.tensor(position * self.config["rope_theta"] ** (-2 * pair / width))
            a, b = vector[pair], vector[pair + width // 2]
            turned[pair] = a * angle.cos() - b * angle.sin()
            turned[pair + width // 2] = b * angle.cos() + a * angle.sin()
        return turned

    def attention(self, x: Tensor, name: str, block: int) -> Tensor:
        """Block-causal attention, position by position and head by head."""
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        width = self.config["head_dim"]
        fused = self.linear(x, f"{name}.query_key_value").view(len(x), -1, width)
        query, key, value = fused.split([heads, kv_heads, kv_heads], dim=1)
        query, key = self.norm(query, f"{name}.query_layernorm"), self.norm(key, f"{name}.key_layernorm")
        turning = int(width * self.config["partial_rotary_factor"])
        rotate = lambda tensor: torch.stack(
            [torch.stack([self.turn(head, p, turning) for head in token]) for p, token in enumerate(tensor)]
        )
        query, key = rotate(query), rotate(key)
        output = torch.empty(len(x), heads, width)
        for position in range(len(x)):
            end = (position // block + 1) * block
            for head in range(heads):
                kv_head = head // (heads // kv_heads)
                scores = key[:end, kv_head] @ query[position, head] / width**0.5
                output[position, head] = scores.softmax(-1) @ value[:end, kv_head]
        return self.linear(output.flatten(1), f"{name}.dense")

    def candidates(self, ranks: Tensor) -> list[set[int]]:
        """Return the experts that each token may choose from."""
        config = self.config
        if "expert_capacity" not in config:
            return [naive_groups(row, config["n_group"], config["topk_group"]) for row in ranks.tolist()]
        found: list[set[int]] = []
        for start in range(0, len(ranks), config["block_size"]):
            block = ranks[start : start + config["block_size"]]
            top = block.amax(0).tolist()
            order = sorted(range(len(top)), key=lambda expert: (-top[expert], expert))
            found += [set(order[: config["expert_capacity"]])] * len(block)
        return found

    def experts(self, x: Tensor, name: str) -> Tensor:
        """Routed and shared experts."""
        scores = (x @ self.weights[f"{name}.gate.weight"].T).sigmoid()
        ranks = scores + self.weights[f"{name}.gate.expert_bias"]
        output = self.mlp(x, f"{name}.shared_experts")
        for token, allowed in enumerate(self.candidates(ranks)):
            order = sorted(allowed, key=lambda expert: (-float(ranks[token, expert]), expert))
            chosen = order[: self.config["num_experts_per_tok"]]
            total = sum(float(scores[token, expert]) for expert in chosen)
            for expert in chosen:
                weight = float(scores[token, expert]) / total * self.config["routed_scaling_factor"]
                output[token] += weight * self.mlp(x[token], f"{name}.experts.{expert}")
        return output

    def logits(self, ids: Tensor, block: int) -> Tensor:
        """The whole forward pass."""
        x = self.weights["model.word_embeddings.weight"][ids]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), f"{name}.attention", block)
            mlp = self.mlp if layer < self.config["first_k_dense_replace"] else self.experts
            x = x + mlp(self.norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")
        return self.linear(self.norm(x, "model.norm"), "lm_head")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"use_qkv_bias": False, "use_bias": False, "num_shared_experts": 1, "first_k_dense_replace": 0},
        {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 2, "num_key_value_heads": 1},
        {"partial_rotary_factor": 0.25, "rms_norm_eps": 1e-3, "routed_scaling_factor": 1.0},
        {"expert_capacity": 4},
        {"expert_capacity": 7, "block_size": 4},
    ],
)
def test_llada2_is_what_its_text_says(tmp_path: Path, change: dict[str, Any]) -> None:
    config = LLADA2 | change
    weights = random_weights(config)
    ids = torch.randint(0, 89, (LENGTH,), generator=torch.Generator().manual_seed(4))
    expected = Naive(config, weights).logits(ids, config["block_size"])
    model = load(write(tmp_path, config, weights))
    with torch.inference_mode():
        found = whole_canvas_logits(model, ids, config["block_size"])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "written",
    [
        {"partial_rotary_factor": 0.5},
        {"rotary_dim": 8},
        {"rotary_dim": 8, "partial_rotary_factor": 0.5},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ],
)
def test_partial_positions_are_written_in_several_ways(tmp_path: Path, written: dict[str, Any]) -> None:
    weights, ids = random_weights(LLADA2), torch.arange(LENGTH)
    bare = {name: value for name, value in LLADA2.items() if name != "partial_rotary_factor"}
    with torch.inference_mode():
        expected = whole_canvas_logits(load(write(tmp_path / "a", LLADA2, weights)), ids, 8)
        found = whole_canvas_logits(load(write(tmp_path / "b", bare | written, weights)), ids, 8)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_group": None}, "'n_group' is missing"),
        ({"n_group": 5}, "'n_group' is 5"),
        ({"topk_group": 4}, "'topk_group' is 4"),
        ({"num_experts_per_tok": 9}, "'num_experts_per_tok' is 9.* 8 experts"),
        ({"num_experts": 0}, "'num_experts' is 0, expected a positive"),
        ({"routed_scaling_factor": None}, "'routed_scaling_factor' is missing"),
        ({"partial_rotary_factor": None}, "'partial_rotary_factor' is missing"),
        ({"rotary_dim": 4}, "partial_rotary_factor: 8, rotary_dim: 4"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor: 32"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type = 'yarn'"),
        ({"score_function": "softmax"}, "score_function"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"rope_theta": None}, "'rope_theta' is missing"),
        ({"expert_capacity": 13}, "'expert_capacity' is 13"),
        ({"expert_capacity": 4, "block_size": None}, "'block_size' is missing"),
    ],
)
def test_a_wrong_configuration_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve_traits(LLADA2 | change, {}, {}, Overrides())


def test_what_the_file_lacks_is_the_tokenizers_or_the_familys() -> None:
    bare = {
        name: value
        for name, value in LLADA2.items()
        if name not in ("mask_token_id", "eos_token_id", "block_size")
    } | {"vocab_size": 157184}
    traits = resolve_traits(bare, {}, {}, Overrides())
    assert (traits.mask_token_id, traits.eos_token_ids, traits.block_length) == (156895, (156892,), 32)
    assert not traits.fixed_block_length
    traits = resolve_traits(bare | {"block_length": 16}, {"eos_token_id": [7]}, {"<|mask|>": 5}, Overrides())
    assert (traits.mask_token_id, traits.eos_token_ids, traits.block_length) == (5, (156892, 7), 16)
    assert resolve_traits(bare | {"eos_token_id": 3}, {}, {}, Overrides()).eos_token_ids == (3,)


def test_experts_of_a_block_fix_the_block_length() -> None:
    traits = resolve_traits(LLADA2 | {"expert_capacity": 4}, {}, {}, Overrides())
    assert (traits.block_length, traits.fixed_block_length) == (8, True)


def test_the_router_stays_in_float32(tmp_path: Path) -> None:
    weights = random_weights(LLADA2)
    model = load(write(tmp_path, LLADA2, weights), torch.bfloat16)
    router: Any = model.get_submodule("layers.1.mlp.router")
    assert model.dtype is torch.bfloat16
    assert torch.equal(router.weight, weights["model.layers.1.mlp.gate.weight"])
    assert torch.equal(router.bias, weights["model.layers.1.mlp.gate.expert_bias"])
