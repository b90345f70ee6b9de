"""Eight-bit weights: the arithmetic, loading, saving, and what they do to answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato import Engine, EngineConfig, SamplingParams
from sfumato.errors import CheckpointError, ConfigError
from sfumato.models import int8
from sfumato.models.folder import Overrides, read_folder
from sfumato.models.int8 import Int8Linear, quantized_rows, quantized_weight, zero_point
from sfumato.models.quantization import quantization_config, saved_quantization
from sfumato.models.save_int8 import save_int8
from sfumato.models.weights import load_model

DATA = Path(__file__).resolve().parent.parent / "data" / "goldens"
CHECKPOINTS = {
    name: DATA / family / "checkpoints" / name
    for family, name in (
        ("llada", "llada-tiny-gqa"),
        ("sdar", "sdar-moe-tiny"),
        ("llada2", "llada2-tiny"),
        ("diffusion_gemma", "dgemma-tiny"),
    )
}
PARAMS = SamplingParams(max_tokens=16, ignore_eos=True, seed=3)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    """Return normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_rows", [1, 5, 32, 100])
def test_a_product_is_the_exact_one_of_its_integers(num_rows: int) -> None:
    x, weight = normal(num_rows, 96), normal(64, 96, seed=2)
    narrow, scale = quantized_weight(weight)
    rows, row_scale = quantized_rows(x, zero_point() or 128)
    integers = (rows.long() - (zero_point() or 128)) @ narrow.long().T
    exact = integers.double() * row_scale.double() * scale.double().T
    found = Int8Linear(narrow, scale)(x)
    assert torch.allclose(found.double(), exact, rtol=1e-6, atol=1e-9)
    assert (found - x @ weight.T).norm() / (x @ weight.T).norm() < 0.03


def test_extreme_values_do_not_saturate() -> None:
    x, weight = torch.full((3, 512), 9.0), torch.full((16, 512), 2.0)
    found = Int8Linear(*quantized_weight(weight))(x)
    assert torch.allclose(found, torch.full((3, 16), 9.0 * 2.0 * 512), rtol=1e-6)


def test_a_row_does_not_depend_on_its_neighbours_in_a_single_bit() -> None:
    linear, x = Int8Linear(*quantized_weight(normal(48, 64, seed=2))), normal(7, 64)
    x[3] *= 1000
    together = linear(x)
    assert all(torch.equal(linear(x[row : row + 1])[0], together[row]) for row in range(7))


def test_rows_and_weights_of_zeros_and_no_rows_at_all() -> None:
    weight = normal(8, 16)
    weight[2] = 0
    linear = Int8Linear(*quantized_weight(weight))
    assert linear(torch.zeros(2, 16)).abs().max() == 0
    assert linear(normal(3, 16))[:, 2].abs().max() == 0
    assert linear(torch.empty(0, 16)).shape == (0, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    x = normal(3, 16)
    x[1, 4] = value
    found = Int8Linear(*quantized_weight(normal(8, 16, seed=2)))(x)
    assert not found[1].isfinite().any()
    assert found[[0, 2]].isfinite().all()


def test_without_onednn_the_plain_form_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (narrow, scale) = normal(5, 64), quantized_weight(normal(32, 64, seed=2))
    fast = Int8Linear(narrow, scale)
    monkeypatch.setattr(int8, "zero_point", lambda: 0)
    plain = Int8Linear(narrow, scale)
    # Perhaps with one bit more in the activations.
    assert torch.allclose(fast(x), plain(x), atol=0.05 * float(fast(x).abs().max()))
    assert (plain(x, torch.ones(32)) - plain(x)).allclose(torch.ones(5, 32))


def engine(path: Path | str, **options: Any) -> Engine:
    """Load an engine on the CPU."""
    return Engine.load(EngineConfig(model=str(path), device="cpu", kv_memory=8 << 20, **options))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_layer_of_every_family_is_narrow(name: str) -> None:
    folder = read_folder(str(CHECKPOINTS[name]), Overrides(quantization="int8"))
    model = load_model(folder, dtype=torch.float32, device="cpu", pack=False)
    narrow = {key for key, value in model.named_parameters() if value.dtype is torch.int8}
    for index in range(model.shape.num_layers):
        inside = [key for key in narrow if key.startswith(f"layers.{index}.")]
        assert {key.rpartition(".")[0].split(".", 2)[2].split(".")[0] for key in inside} >= {"attention"}
        assert any("mlp" in key or "experts" in key for key in inside)
    assert not any(key.startswith(("embedding", "output")) or "router" in key for key in narrow)
    prompts = [[1, 2, 3, 4, 5], [9, 8, 7]]
    fast = engine(CHECKPOINTS[name], quantization="int8")
    together = [choice.token_ids for choice in fast.generate(prompts, PARAMS)]
    alone = [fast.generate([prompt], PARAMS)[0].token_ids for prompt in prompts]
    assert together == alone
    assert all(len(tokens) == 16 for tokens in together)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_saved_folder_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    folder, out = read_folder(str(CHECKPOINTS[name])), tmp_path / "int8"
    save_int8(folder, out)
    again = read_folder(str(out))
    assert again.is_quantized
    assert again.quantization == "int8"
    made = load_model(
        read_folder(str(CHECKPOINTS[name]), Overrides(quantization="int8")),
        dtype=torch.float32,
        device="cpu",
        pack=False,
    )
    read = dict(load_model(again, dtype=torch.float32, device="cpu", pack=False).named_parameters())
    for key, value in made.named_parameters():
        assert torch.equal(read[key], value), key
    found = engine(out).generate([[1, 2, 3, 4]], PARAMS)[0].token_ids
    assert (
        found == engine(CHECKPOINTS[name], quantization="int8").generate([[1, 2, 3, 4]], PARAMS)[0].token_ids
    )


def test_the_embedded_model_answers_as_before() -> None:
    question = [
        {"role": "user", "content": "Ben has 7 apples and buys 5 more. How many apples does Ben have?"}
    ]
    params = SamplingParams(max_tokens=32, temperature=0.0)
    plain, fast = engine("sfumato-tiny-sdar"), engine("sfumato-tiny-sdar", quantization="int8")
    answers = [each.generate([each.encode(question)], params)[0].text for each in (plain, fast)]
    assert answers[0] == answers[1]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--quantization 'fp4' is not one of int8"):
        EngineConfig(model="sfumato-tiny-sdar", quantization="fp4").check()
    out = tmp_path / "int8"
    save_int8(read_folder(str(CHECKPOINTS["llada-tiny-gqa"])), out)
    with pytest.raises(CheckpointError, match="int8 already"):
        save_int8(read_folder(str(out)), tmp_path / "again")
    with pytest.raises(ConfigError, match="is not empty"):
        save_int8(read_folder(str(CHECKPOINTS["llada-tiny-gqa"])), out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq'"),
        ({"format": "pack-quantized"}, "format 'pack-quantized'"),
        ({"ignore": ["model.layers.0.mlp.down_proj"]}, r"ignore 'model\.layers\.0"),
        ({"config_groups": {}}, "0 config_groups"),
    ],
)
def test_other_quantizations_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    assert saved_quantization({}) is None
    assert saved_quantization({"quantization_config": quantization_config()}) == "int8"
    with pytest.raises(CheckpointError, match=message):
        saved_quantization({"quantization_config": quantization_config() | change})


def test_a_wide_weight_in_a_narrow_checkpoint_is_named(tmp_path: Path) -> None:
    out = tmp_path / "int8"
    save_int8(read_folder(str(CHECKPOINTS["llada-tiny-gqa"])), out)
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    name = next(key for key, value in tensors.items() if value.dtype is torch.int8)
    save_file({**tensors, name: tensors[name].float()}, file)
    with pytest.raises(CheckpointError, match=r"is torch\.float32, expected int8"):
        load_model(read_folder(str(out)), dtype=torch.float32, device="cpu")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
