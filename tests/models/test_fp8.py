"""Eight-bit floating-point weights: the arithmetic, loading, and where they are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sfumato import Engine, EngineConfig, SamplingParams
from sfumato.errors import CheckpointError, ConfigError
from sfumato.models import fp8
from sfumato.models.folder import Overrides, read_folder
from sfumato.models.fp8 import FP8, Fp8Linear, fp8_rows, fp8_weight, has_fp8
from sfumato.models.layers import Linear
from sfumato.models.quantization import quantization_config, saved_quantization
from sfumato.models.weights import load_model

DATA = Path(__file__).resolve().parent.parent / "data" / "goldens"
CHECKPOINTS = ("llada/checkpoints/llada-tiny-gqa", "llada2/checkpoints/llada2-tiny")


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    """Return normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_product_is_near_and_a_row_does_not_depend_on_its_neighbours() -> None:
    x, weight = normal(7, 96), normal(64, 96, seed=2)
    linear = Fp8Linear(*fp8_weight(weight))
    found, expected = linear(x), x @ weight.T
    assert (found - expected).norm() / expected.norm() < 0.05
    x[3] *= 1000
    again = linear(x)
    assert torch.equal(again[:3], found[:3])
    assert torch.equal(linear(x[5:6]), again[5:6])


def test_extreme_values_and_zeros() -> None:
    weight = torch.zeros(16, 32)
    weight[3] = 1e4
    x = torch.zeros(2, 32)
    x[1] = -70000.0
    found = Fp8Linear(*fp8_weight(weight))(x)
    assert found[0].abs().max() == 0
    torch.testing.assert_close(found[1, 3], x[1] @ weight[3])
    assert Fp8Linear(*fp8_weight(weight))(x[:0]).shape == (0, 16)
    assert not bool(Fp8Linear(*fp8_weight(weight))(torch.full((1, 32), torch.nan)).isfinite().any())


def test_the_kernel_narrows_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = (normal(5, 80) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 7.0])[:, None]).to(device)
    expected, scale = fp8_weight(x)
    monkeypatch.setattr(fp8, "run_on", lambda tensor: True)
    found, found_scale = fp8_rows(x)
    torch.testing.assert_close(found_scale, scale)
    assert found.dtype is FP8
    wide, wanted = found.float(), expected.float()
    # The interpreter cuts off where torch rounds, and carries nothing into the exponent.
    is_carried = (wanted.abs().log2() % 1 == 0) & (device == "cpu")
    is_near = (wide - wanted).abs() <= wanted.abs() / 8 + 2**-9
    assert bool((is_near | is_carried).all())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_layers_load_narrow_and_stay_near(name: str) -> None:
    folder = read_folder(str(DATA / name), Overrides(quantization="fp8"))
    model = load_model(folder, dtype=torch.float32, device="cpu")
    plain = load_model(read_folder(str(DATA / name)), dtype=torch.float32, device="cpu", pack=False)
    wide = dict(plain.named_modules())
    narrow = [(path, module) for path, module in model.named_modules() if isinstance(module, Linear)]
    assert sum(isinstance(module.narrow, Fp8Linear) for _, module in narrow) == len(narrow) - 1
    for path, module in narrow:
        x = normal(3, wide[path].weight.shape[1])
        expected = wide[path](x)
        assert (module(x) - expected).norm() / expected.norm() < 0.06, path


def test_no_cpu_and_no_division_serves_them() -> None:
    assert not has_fp8("cpu")
    with pytest.raises(ConfigError, match=r"fp8 needs a GPU of compute capability 8\.9"):
        Engine.load(EngineConfig(model=str(DATA / CHECKPOINTS[0]), device="cpu", quantization="fp8"))


def test_checkpoints_say_so() -> None:
    config = quantization_config()
    (group,) = config["config_groups"].values()
    floats = {part: {**group[part], "type": "float"} for part in ("weights", "input_activations")}
    made = {**config, "format": "float-quantized", "config_groups": {"group_0": {**group, **floats}}}
    assert saved_quantization({"quantization_config": made}) == "fp8"
    mixed = {**made, "config_groups": config["config_groups"]}
    with pytest.raises(CheckpointError, match=r"weights\.type 'int'"):
        saved_quantization({"quantization_config": mixed})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_products_of_a_gpu_are_those_of_the_cpu() -> None:
    if not has_fp8("cuda"):
        pytest.skip("needs compute capability 8.9")
    x, weight = normal(33, 256).bfloat16(), normal(128, 256, seed=2)
    narrow, scale = fp8_weight(weight)
    expected = Fp8Linear(narrow, scale)(x)
    found = Fp8Linear(narrow.cuda(), scale.cuda())(x.cuda()).cpu()
    torch.testing.assert_close(found, expected, atol=0.2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_embedded_model_answers_in_eight_bits() -> None:
    question = "Ben has 7 apples and buys 5 more. How many apples does Ben have?"
    params = SamplingParams(max_tokens=32, temperature=0.0)
    answers = []
    for quantization in (None, "fp8"):
        engine = Engine.load(
            EngineConfig(
                model="sfumato-tiny-sdar", dtype="bfloat16", device="cuda", quantization=quantization
            )
        )
        answers.append(
            engine.generate([engine.encode([{"role": "user", "content": question}])], params)[0].text
        )
    assert answers[0] == answers[1]
