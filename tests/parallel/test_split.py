"""Models in parts: every family's parts together compute what the whole does, and each reads only its own."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.models import weights as weights_module
from sfumato.models.batch import Batch, KVStore, Segment, group_segments
from sfumato.models.folder import read_folder
from sfumato.models.language_model import LanguageModel
from sfumato.models.split import cuts_of, span_of
from sfumato.models.weights import build_on_meta, load_model
from sfumato.parallel.groups import Group
from sfumato.parallel.tensor import TensorRanks
from tests.models.checkpoints import EVERY, LLADA2, random_weights, write
from tests.parallel.threads import run_ranks

LLADA: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"], "vocab_size": 90, "embedding_size": 91, "d_model": 64, "n_heads": 4,
    "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 90, "max_sequence_length": 128, "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5, "weight_tying": False, "mask_token_id": 89, "eos_token_id": 88,
}  # fmt: skip
SDAR: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"], "vocab_size": 93, "hidden_size": 48, "intermediate_size": 81,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "rope_theta": 10000.0, "eos_token_id": 88,
    "mask_token_id": 89, "block_size": 4, "attention_bias": True, "tie_word_embeddings": True,
}  # fmt: skip
ALL = EVERY | {
    "llada": LLADA,
    "sdar": SDAR,
    "llada2_blocks": LLADA2 | {"expert_capacity": 5, "block_size": 4},
}
LENGTH, CONTEXT = 24, 8


@dataclass(frozen=True)
class Computed:
    """What a model made of one batch; keys: of the first layer, as stored."""

    hidden: Tensor
    logits: Tensor
    soft: Tensor
    keys: Tensor


def compute(model: LanguageModel, is_gemma: bool) -> Computed:
    """Feed two rows, one of them in blocks behind keys that were written before."""
    generator = torch.Generator().manual_seed(3)
    store = KVStore.allocate(shapes=model.kv_shapes, num_slots=2 * LENGTH, dtype=model.dtype, device="cpu")
    ids = torch.randint(0, 88, (2 * LENGTH,), generator=generator)
    slots = torch.arange(LENGTH)
    ends = (slots // 8 + 1) * 8
    segments = [Segment(0, LENGTH, slots, ends), Segment(LENGTH, LENGTH, slots + LENGTH, None)]
    groups = group_segments(segments, "cpu")
    batch = Batch(
        token_ids=ids,
        positions=torch.cat([slots, slots]),
        groups=groups,
        windowed=groups,
        store=store,
        write_slots=torch.arange(2 * LENGTH),
        write_tokens=torch.arange(2 * LENGTH),
        output_tokens=torch.tensor([3, 5, 30, 47]),
        is_context=torch.arange(2 * LENGTH) < CONTEXT if is_gemma else None,
        addend=torch.randn(2 * LENGTH, model.shape.width, generator=generator) if is_gemma else None,
    )
    hidden = model.hidden(batch)
    logits = model.head(hidden)
    told = torch.randn(4, model.shape.vocab_size, generator=generator).softmax(-1)
    return Computed(hidden, logits, model.soft_embedding(told), store.keys[0])


def load_part(path: Path, group: Group) -> LanguageModel:
    """Load one rank's part."""
    ranks = TensorRanks(group.rank, group.size)
    ranks.group = group
    folder = read_folder(str(path))
    return load_model(
        folder, dtype=torch.float32, device="cpu", divide=lambda model: model.divide(ranks), pack=True
    )


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ALL)
def test_the_parts_compute_what_the_whole_does(name: str, size: int, tmp_path: Path) -> None:
    config = ALL[name]
    is_gemma = name == "diffusion_gemma"
    write(tmp_path / "model", config, random_weights(config))
    whole_model = load_model(read_folder(str(tmp_path / "model")), dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        whole = compute(whole_model, is_gemma)
    found = run_ranks(size, lambda group: compute(load_part(tmp_path / "model", group), is_gemma))
    close = {"rtol": 2e-4, "atol": 2e-4}
    for part in found:
        torch.testing.assert_close(part.hidden, whole.hidden, **close)
        assert torch.equal(part.hidden, found[0].hidden)
        torch.testing.assert_close(part.soft, whole.soft, **close)
    torch.testing.assert_close(found[0].logits, whole.logits, **close)
    heads = whole_model.kv_shapes[0][0]
    if heads >= size:
        torch.testing.assert_close(torch.cat([part.keys for part in found], dim=1), whole.keys, **close)
    else:
        for rank, part in enumerate(found):
            head = rank * heads // size
            torch.testing.assert_close(part.keys, whole.keys[:, head : head + 1], **close)


def test_what_does_not_divide_is_refused_with_both_numbers(tmp_path: Path) -> None:
    def divide(config: dict[str, Any], rank: int, size: int) -> None:
        build_on_meta(config, lambda model: model.divide(TensorRanks(rank, size)))

    with pytest.raises(ConfigError, match="3 ranks: the model's 4 query heads are not a multiple of 3"):
        divide(SDAR, 0, 3)
    six = LLADA2 | {"num_attention_heads": 12, "num_key_value_heads": 6, "num_experts": 12}
    with pytest.raises(ConfigError, match="4 ranks: the model's 6 key-value heads are neither a multiple"):
        divide(six, 3, 4)
    few = LLADA2 | {"num_attention_heads": 16, "num_experts": 12}
    with pytest.raises(ConfigError, match="16 ranks: the model's 12 experts do not give each rank one"):
        divide(few, 0, 16)
    divide(few, 3, 4)


def test_spans_lie_side_by_side_and_differ_by_one() -> None:
    for total in range(1, 40):
        for size in range(1, min(total, 9) + 1):
            spans = [span_of(total, TensorRanks(rank, size), "things") for rank in range(size)]
            assert spans[0][0] == 0
            assert spans[-1][1] == total
            assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
            lengths = {stop - start for start, stop in spans}
            assert max(lengths) - min(lengths) <= 1


class CountingSlice:
    """A safetensors slice that counts the bytes that are read of it."""

    def __init__(self, inner: Any, counts: dict[str, int], name: str) -> None:
        self._inner, self._counts, self._name = inner, counts, name

    def get_shape(self) -> list[int]:
        """Read nothing."""
        shape: list[int] = self._inner.get_shape()
        return shape

    def __getitem__(self, index: Any) -> Tensor:
        part: Tensor = self._inner[index]
        self._counts[self._name] = self._counts.get(self._name, 0) + part.numel() * part.element_size()
        return part


class CountingFile:
    """A safetensors handle whose tensors can only be read in counted slices."""

    counts: dict[str, int]

    def __init__(self, inner: Any, counts: dict[str, int]) -> None:
        self._inner, self.counts = inner, counts

    def __enter__(self) -> CountingFile:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def keys(self) -> Any:
        """Pass on."""
        return self._inner.keys()

    def get_slice(self, name: str) -> CountingSlice:
        """Count what is read of it."""
        return CountingSlice(self._inner.get_slice(name), self.counts, name)


def kv_heads(model: LanguageModel, parameter: str) -> set[int]:
    """Return how many key-value heads the whole model has in the layer of a parameter."""
    return {model.shape.kv_shapes[int(parameter.split(".")[1])][0]}


@pytest.mark.parametrize("name", ALL)
def test_a_rank_reads_its_own_part_of_the_files_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ALL[name]
    path = write(tmp_path / "model", config, random_weights(config))
    counts: dict[str, int] = {}
    opened = safetensors.safe_open
    monkeypatch.setattr(weights_module, "safe_open", lambda *a, **k: CountingFile(opened(*a, **k), counts))
    targets = build_on_meta(config)[1]
    read_by_rank = []
    for rank in range(2):
        counts.clear()
        ranks = TensorRanks(rank, 2)
        model = load_model(
            read_folder(str(path)),
            dtype=torch.float32,
            device="cpu",
            divide=lambda model, ranks=ranks: model.divide(ranks),
            pack=False,
        )
        held = {id(parameter): parameter.numel() * 4 for parameter in model.parameters()}
        assert sum(counts.values()) == sum(held.values())
        read_by_rank.append(dict(counts))
    cuts = cuts_of(model)
    for tensor, target in targets.items():
        size = 4 * torch.Size(target.shape).numel()
        both = sum(read.get(tensor, 0) for read in read_by_rank)
        # A lone key-value head is on both ranks, as is what is not divided.
        has_one_head = "qkv" in target.parameter and 1 in kv_heads(model, target.parameter)
        if target.parameter not in cuts or (has_one_head and "q_proj" not in tensor):
            assert both == 2 * size, tensor
        else:
            assert both == size, tensor
