"""What every family does alike: load from shards, in two dtypes, packed, narrowed; name what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.errors import CheckpointError, ConfigError
from sfumato.models.folder import Overrides, resolve_traits
from tests.models.checkpoints import EVERY, LLADA2, SDAR_MOE, load, random_weights, whole, write, write_shards

IDS = torch.arange(3, 20)

families = pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)


@families
def test_shards_and_packed_weights_give_the_same_model(tmp_path: Path, config: dict[str, Any]) -> None:
    weights = random_weights(config)
    expected = whole(load(write(tmp_path / "one", config, weights), pack=False), IDS)
    assert torch.equal(
        whole(load(write_shards(tmp_path / "two", config, weights), pack=False), IDS), expected
    )
    torch.testing.assert_close(whole(load(tmp_path / "two"), IDS), expected, atol=1e-4, rtol=1e-4)


@families
def test_bfloat16_stays_close_to_float32(tmp_path: Path, config: dict[str, Any]) -> None:
    # Weights that bfloat16 holds exactly, so that only the arithmetic differs.
    weights = {name: tensor.bfloat16().float() for name, tensor in random_weights(config).items()}
    path = write(tmp_path, config, weights)
    exact = load(path)
    expected = exact.head(whole(exact, IDS))
    for pack in (False, True):
        model = load(path, torch.bfloat16, pack=pack)
        logits = model.head(whole(model, IDS))
        assert logits.dtype is torch.bfloat16
        error = (logits.float() - expected).norm() / expected.norm()
        assert float(error) < 0.05


@families
@pytest.mark.parametrize("wanted", [[4, 0, 16], [9], []])
def test_only_wanted_states_are_computed(tmp_path: Path, config: dict[str, Any], wanted: list[int]) -> None:
    model = load(write(tmp_path, config, random_weights(config)))
    tokens = torch.tensor(wanted, dtype=torch.long)
    found = whole(model, IDS, tokens)
    torch.testing.assert_close(found, whole(model, IDS)[tokens], atol=1e-5, rtol=1e-5)


def test_only_wanted_states_are_returned_where_blocks_choose(tmp_path: Path) -> None:
    config = LLADA2 | {"expert_capacity": 4}
    model = load(write(tmp_path, config, random_weights(config)))
    tokens = torch.tensor([4, 0, 16])
    torch.testing.assert_close(whole(model, IDS, tokens), whole(model, IDS)[tokens], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("config", "layer"), [(LLADA2, 1), (SDAR_MOE, 2)])
def test_a_wrong_expert_is_named(tmp_path: Path, config: dict[str, Any], layer: int) -> None:
    weights, last = random_weights(config), config["num_experts"] - 1
    stem = f"model.layers.{layer}.mlp.experts"
    name = f"{stem}.{last}.up_proj.weight"
    short = {key: tensor for key, tensor in weights.items() if key != name}
    with pytest.raises(CheckpointError, match=f"'{name}' is missing$"):
        load(write(tmp_path / "missing", config, short))
    extra = {f"{stem}.{last + 1}.up_proj.weight": weights[name].clone()}
    with pytest.raises(
        CheckpointError, match=rf"experts\.{last + 1}\.up_proj\.weight' is not part of [^(]*$"
    ):
        load(write(tmp_path / "extra", config, weights | extra))
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \[24, 7\], expected \[24, 48\]"):
        load(write(tmp_path / "shape", config, weights | {name: torch.zeros(24, 7)}))


@pytest.mark.parametrize("layer", [1, 2])
def test_each_expert_lands_in_its_own_place(tmp_path: Path, layer: int) -> None:
    weights = random_weights(LLADA2)
    model = load(write(tmp_path, LLADA2, weights), pack=False)
    experts: Any = model.get_submodule(f"layers.{layer}.mlp.experts")
    for expert in range(12):
        stem = f"model.layers.{layer}.mlp.experts.{expert}"
        gate, up = experts.gate_up[expert].chunk(2)
        assert torch.equal(gate, weights[f"{stem}.gate_proj.weight"])
        assert torch.equal(up, weights[f"{stem}.up_proj.weight"])
        assert torch.equal(experts.down[expert], weights[f"{stem}.down_proj.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": None}, "'num_experts' is missing"),
        ({"num_experts_per_tok": 7}, "'num_experts_per_tok' is 7, there are 6"),
        ({"moe_intermediate_size": None}, "'moe_intermediate_size' is missing"),
        ({"norm_topk_prob": None}, "'norm_topk_prob' is missing"),
        ({"norm_topk_prob": "yes"}, "'norm_topk_prob' is 'yes', expected true or false"),
        ({"decoder_sparse_step": 0}, "'decoder_sparse_step' is 0"),
        ({"mlp_only_layers": "none"}, "'mlp_only_layers' is 'none'"),
        ({"num_key_value_heads": 3}, "'num_key_value_heads' is 3"),
    ],
)
def test_a_wrong_sdar_moe_configuration_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve_traits(SDAR_MOE | change, {}, {}, Overrides())


def test_blocks_that_share_experts_keep_their_length() -> None:
    config = LLADA2 | {"expert_capacity": 4}
    assert resolve_traits(config, {}, {}, Overrides(block_length=8)).block_length == 8
    with pytest.raises(ConfigError, match="--block-length 4: this model's blocks have 8"):
        resolve_traits(config, {}, {}, Overrides(block_length=4))
    assert resolve_traits(LLADA2, {}, {}, Overrides(block_length=4)).block_length == 4


def test_dream_declares_its_shift_and_the_end_of_a_turn() -> None:
    traits = resolve_traits(EVERY["dream"], {}, {"<|im_end|>": 77}, Overrides())
    assert (traits.shifts_logits, traits.mask_token_id, traits.block_length) == (True, 89, 32)
    assert (traits.eot_token_id, traits.eos_token_ids) == (77, (88, 77))
    assert traits.layer_kv_shapes == ((2, 16), (2, 16))
