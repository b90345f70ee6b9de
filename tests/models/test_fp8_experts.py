"""Experts with eight-bit floating-point weights: the kernel, loading, whole forwards beside float ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.models import experts, fp8, layers
from sfumato.models.experts import Experts
from sfumato.models.folder import Overrides, read_folder
from sfumato.models.fp8 import FP8, fp8_rows, fp8_weight
from sfumato.models.language_model import LanguageModel
from sfumato.models.quantization import quantization_config
from sfumato.models.weights import build_on_meta, load_model

from . import checkpoints

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS, WIDTH, INNER = 6, 80, 48
DECODERS = ("llada2", "sdar_moe", "llada_moe")


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return seeded noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_experts(*, is_narrow: bool) -> Experts:
    """Return random experts, in float32 or in eight bits."""
    made = Experts(EXPERTS, WIDTH, INNER, num_chosen=2)
    if is_narrow:
        made.quantize(FP8)
    for seed, name in enumerate(("gate_up", "down")):
        weight = draw(*made.get_parameter(name).shape, seed=seed) * 0.3
        if is_narrow:
            weight, scale = fp8_weight(weight)
            made.get_parameter(f"{name}_scale").copy_(scale)
        made.get_parameter(name).copy_(weight)
    made = made.to(DEVICE)
    made.pack()
    return made


def choose(num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return experts and weights; the last expert has no token."""
    chosen = draw(num_tokens, EXPERTS - 1, seed=3).argsort(-1)[:, :2]
    return chosen.to(DEVICE), draw(num_tokens, 2, seed=4).abs().to(DEVICE)


def use_kernels(monkeypatch: pytest.MonkeyPatch, *, where: bool) -> None:
    """Let kernels compute, or the torch forms."""
    for module in (experts, layers, fp8):
        monkeypatch.setattr(module, "run_on", lambda tensor: where)


def test_a_mixture_is_near_and_a_token_does_not_depend_on_its_neighbours() -> None:
    x, (chosen, weights) = draw(9, WIDTH, seed=2).to(DEVICE), choose(9)
    expected = make_experts(is_narrow=False)(x, chosen, weights)
    made = make_experts(is_narrow=True)
    found = made(x, chosen, weights)
    assert (found - expected).norm() / expected.norm() < 0.06
    x[4] *= 1000
    again = made(x, chosen, weights)
    assert torch.equal(again[:4], found[:4])
    assert torch.equal(again[5:], found[5:])
    assert made(x[:0], chosen[:0], weights[:0]).shape == (0, WIDTH)


@pytest.mark.parametrize("ends", [[0, 2, 2, 7, 21, 21], [0, 0, 0, 0, 0, 21], [21] * 6, [3, 3, 5, 5, 5, 5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_multiplies_as_torch_does(ends: list[int], dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from sfumato.models.kernels.grouped import multiply_narrow

    made = make_experts(is_narrow=True)
    scales = torch.tensor([1e-3, 1.0, 50.0, 0.0, 7.0, 1.0, 300.0]).repeat(3)[:, None]
    rows = (draw(21, WIDTH, seed=5) * scales).to(DEVICE, dtype)
    starts = [0, *ends[:-1]]
    expected = torch.cat(
        [
            made.narrow[expert][0](rows[start:stop])
            for expert, (start, stop) in enumerate(zip(starts, ends, strict=True))
        ]
    )
    narrow, row_scales = fp8_rows(rows)
    limits = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    scale = made.get_parameter("gate_up_scale")
    found = multiply_narrow(narrow, row_scales, made.gate_up, scale, limits, dtype)[: ends[-1]]
    assert found.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_a_mixture_by_kernels_is_the_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    made, x, (chosen, weights) = make_experts(is_narrow=True), draw(9, WIDTH, seed=2).to(DEVICE), choose(9)
    use_kernels(monkeypatch, where=False)
    expected = made(x, chosen, weights)
    use_kernels(monkeypatch, where=True)
    found = made(x, chosen, weights)
    # The interpreter cuts numbers off where torch rounds them.
    assert (found - expected).norm() / expected.norm() < (0.08 if DEVICE == "cpu" else 0.02)


def exported(path: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """Write a folder as compressed-tensors' exporters do: scales in bfloat16 beside float8 weights."""
    model, targets = build_on_meta(config, quantization="fp8")
    narrow = {name for name, parameter in model.named_parameters() if parameter.dtype is FP8}
    tensors = {}
    for name, weight in weights.items():
        tensors[name] = weight
        if targets[name].parameter in narrow:
            tensors[name], scale = fp8_weight(weight)
            tensors[f"{name}_scale"] = scale.bfloat16()
    said = quantization_config()
    (group,) = said["config_groups"].values()
    floats = {part: {**group[part], "type": "float"} for part in ("weights", "input_activations")}
    said = {**said, "format": "float-quantized", "config_groups": {"group_0": {**group, **floats}}}
    return checkpoints.write(path, {**config, "quantization_config": said}, tensors)


def narrow_model(path: Path) -> LanguageModel:
    """Load a folder in eight bits."""
    return load_model(
        read_folder(str(path), Overrides(quantization="fp8")), dtype=torch.float32, device="cpu"
    )


@pytest.mark.parametrize("name", [*DECODERS, "diffusion_gemma"])
def test_experts_load_narrow_from_either_kind_of_checkpoint(tmp_path: Path, name: str) -> None:
    config, weights = checkpoints.EVERY[name], checkpoints.random_weights(checkpoints.EVERY[name])
    made = narrow_model(checkpoints.write(tmp_path / "plain", config, weights))
    mixtures = [(path, module) for path, module in made.named_modules() if isinstance(module, Experts)]
    assert mixtures
    plain = checkpoints.load(tmp_path / "plain", pack=False)
    for path, module in mixtures:
        whole = plain.get_submodule(path)
        for leaf in ("gate_up", "down"):
            found, scale = module.get_parameter(leaf), module.get_parameter(f"{leaf}_scale")
            assert found.dtype is FP8
            expected, wanted = fp8_weight(whole.get_parameter(leaf))
            assert torch.equal(found.float(), expected.float())
            assert torch.equal(scale, wanted)
    again = load_model(
        read_folder(str(exported(tmp_path / "narrow", config, weights))), dtype=torch.float32, device="cpu"
    )
    read = dict(again.named_parameters())
    for path, value in made.named_parameters():
        tolerance = {"atol": 0.0, "rtol": 2**-8} if path.endswith("_scale") else {"atol": 0.0, "rtol": 0.0}
        torch.testing.assert_close(read[path].float(), value.float(), **tolerance)


@pytest.mark.parametrize("name", DECODERS)
def test_a_whole_forward_stays_near(tmp_path: Path, name: str) -> None:
    config = with_all_chosen(checkpoints.EVERY[name])
    weights = {
        key: value * 0.5 if value.dim() > 1 else value
        for key, value in checkpoints.random_weights(config).items()
    }
    path = checkpoints.write(tmp_path / "plain", config, weights)
    ids = torch.arange(2, 34)
    expected = checkpoints.whole(checkpoints.load(path), ids)
    found = checkpoints.whole(narrow_model(path), ids)
    assert bool(((found - expected).norm(dim=-1) / expected.norm(dim=-1) < 0.2).all())


def with_all_chosen(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration whose tokens choose every expert: no rounding turns a choice."""
    changes = {"num_experts_per_tok": "num_experts", "topk_group": "n_group"}
    return {key: config[changes[key]] if key in changes else value for key, value in config.items()}
