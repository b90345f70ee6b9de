"""Replays step functions: decoding algorithms on recorded logits, with a table in the model's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.core.plan import Decision, Row, StepPlan
from sfumato.core.request import Request
from sfumato.core.traits import BlockOrigin, ModelTraits, Visibility
from sfumato.models.batch import Batch
from sfumato.text.canvas import Canvas
from sfumato.text.decoding.block_refinement import BlockRefinement
from sfumato.text.decoding.dinfer import DInfer
from sfumato.text.decoding.entropy_bound import EntropyBound
from sfumato.text.decoding.entropy_threshold import EntropyThreshold
from sfumato.text.decoding.fast_dllm import FastDLLM
from sfumato.text.decoding.joint_threshold import JointThreshold
from sfumato.text.decoding.joint_threshold_indel import History, JointThresholdInDel
from sfumato.text.decoding.low_confidence import LowConfidence
from sfumato.text.decoding.protocol import Algorithm
from sfumato.text.decoding.ranking import scheduled_count
from sfumato.text.ends import CanvasEnd
from sfumato.text.random_source import RandomSource
from sfumato.text.runner import TextRunner
from sfumato.text.work import TextWork
from tests.goldens.cases import Case
from tests.goldens.diffusion_gemma import RecordedCanvases, diffusers_algorithm
from tests.goldens.replay import Mismatch, expect_equal, make_spec
from tests.goldens.sources import ArgmaxSource
from tests.goldens.tensors import expect_close

_SOFT_TOLERANCE = 1e-4


class TableModel:
    """Returns recorded logits: `table` f32[rows of the plan * block, V] is set before each launch."""

    def __init__(self, embedding: Tensor | None = None, scale: float = 1.0) -> None:
        self.device = torch.device("cpu")
        self.table = torch.empty(0)
        self._embedding, self._scale = embedding, scale

    def hidden(self, batch: Batch) -> Tensor:
        """Return which packed token each state belongs to, f32[P, 1]."""
        assert batch.output_tokens is not None
        return batch.output_tokens[:, None].float()

    def head(self, hidden: Tensor) -> Tensor:
        """Look the logits up."""
        return self.table[hidden[:, 0].long()]

    def soft_embedding(self, probabilities: Tensor) -> Tensor:
        """Return expected embeddings."""
        assert self._embedding is not None
        return probabilities @ self._embedding * self._scale


def _traits(vocab_size: int, mask_id: int | None, block_length: int, *, is_conditioned: bool) -> ModelTraits:
    return ModelTraits(
        family="table",
        architecture="Table",
        vocab_size=vocab_size,
        mask_token_id=-1 if mask_id is None else mask_id,
        eos_token_ids=(),
        eot_token_id=None,
        context_length=block_length,
        block_length=block_length,
        visibility=Visibility.BIDIRECTIONAL if mask_id is not None else Visibility.BLOCK_CAUSAL,
        block_origin=BlockOrigin.PROMPT_END,
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        default_algorithm="low_confidence",
        has_mask_token=mask_id is not None,
        has_self_conditioning=is_conditioned,
    )


@dataclass
class Bench:
    """Rows of one algorithm, each a canvas of one block, on a table for a model."""

    algorithm: Algorithm
    vocab_size: int
    mask_id: int | None
    model: TableModel
    is_conditioned: bool = False

    def __post_init__(self) -> None:
        self.works: list[TextWork] = []
        self.last: dict[str, Decision] = {}

    def add(self, ids: Sequence[int], pinned: Sequence[bool], source: RandomSource) -> TextWork:
        """Add a row; what is neither pinned nor a mask may be edited."""
        length = len(ids)
        traits = _traits(self.vocab_size, self.mask_id, length, is_conditioned=self.is_conditioned)
        tokens, is_pinned = np.asarray(ids, dtype=np.int64), np.asarray(pinned, dtype=np.bool_)
        undecided = ~is_pinned & ((tokens == self.mask_id) | (self.mask_id is None))
        canvas = Canvas(
            token_ids=tokens,
            pinned=is_pinned,
            undecided=undecided,
            given=is_pinned.copy(),
            prompt_len=0,
            block_length=length,
            origin=0,
            random_source=source,
            num_blocks=1,
            masks_at_start=int(undecided.sum()),
        )
        spec = make_spec([0], max_tokens=length, block_length=length)
        work = TextWork(
            spec,
            traits,
            canvas=canvas,
            algorithm=self.algorithm,
            walk=self.algorithm.walk(canvas, spec, traits),
            end_rule=CanvasEnd(),
            page_size=length,
            excluded_ids=(),
        )
        self.works.append(work)
        return work

    def step(self, logits: Tensor) -> None:
        """Run one step of every row that has not ended; logits: f32[rows, block, V]."""
        active = [index for index, work in enumerate(self.works) if not work.canvas.is_complete]
        if not active:
            return
        rows: list[Row] = []
        live: dict[str, Request] = {}
        for index in active:
            standing = self.works[index].standing(str(index))
            (row,) = standing.denoise
            rows.append(row)
            live[row.request_id] = Request(
                id=row.request_id, work=self.works[index], standing=standing, arrival=index, arrived_at=0.0
            )
        self.model.table = torch.cat([logits[index] for index in active]).float()
        runner = TextRunner(self.model, self.works[0].traits, store=None, page_size=1, chunk_bytes=1 << 20)
        result = runner.launch(StepPlan(launch_id=1, rows=tuple(rows)), live)
        for outcome in result.rows:
            if outcome.error is not None or outcome.decision is None:
                raise Mismatch(f"row {outcome.row.request_id}: {outcome.error}")
            self.last[outcome.row.request_id] = outcome.decision
            live[outcome.row.request_id].work.advance([outcome])


def replay_mask_steps(case: Case) -> None:
    """Replay the step functions of algorithms with a mask token."""
    params = case["params"]
    mask_id = params.get("mask_id", params.get("mask_token_id"))
    bench = Bench(_mask_algorithm(case), params["vocab_size"], mask_id, TableModel())
    entries = case.get("trace") or case["steps"]
    for row, ids in enumerate(entries[0]["ids_in"]):
        bench.add(ids, _pinned(case, row, ids, mask_id), ArgmaxSource())
    logits = case.tensors["logits"]
    for step, entry in enumerate(entries):
        shaped = logits[step].view(len(bench.works), -1, params["vocab_size"])
        bench.step(shaped)
        for row, work in enumerate(bench.works):
            where = f"step {step}, row {row}"
            expect_equal(f"{where}: ids", work.canvas.token_ids.tolist(), entry["ids_out"][row])
            if "done" in entry and entry["done"][row]:
                expect_equal(f"{where}: done", work.canvas.is_complete, True)
            _expect_state(where, entry, row, bench)


def _expect_state(where: str, entry: dict[str, Any], row: int, bench: Bench) -> None:
    """Compare what an algorithm counts with what the reference does."""
    decision = bench.last.get(str(row))
    if decision is None or "post_edit_steps" not in entry:
        return
    state = decision.state
    if isinstance(state, History):
        expect_equal(f"{where}: post edit steps", state.post_edit_steps, entry["post_edit_steps"][row])
        expect_equal(f"{where}: updates", state.num_updates, entry["num_update_steps"][row])
        expect_equal(f"{where}: finished", state.is_finished, entry["finished"][row])
        expect_equal(f"{where}: originals", list(map(int, state.is_original)), entry["is_orig_mask"][row])
    elif not bench.works[row].canvas.is_complete:
        expect_equal(f"{where}: post edit steps", state, entry["post_edit_steps"][row])


def _mask_algorithm(case: Case) -> Algorithm:
    params = case["params"]
    config = params.get("algorithm_config", {})
    made: dict[str, Callable[[], Algorithm]] = {
        "sglang_step_low_confidence": lambda: LowConfidence(threshold=config.get("threshold", 0.95)),
        "sglang_step_joint_threshold": lambda: JointThreshold(**config),
        "sglang_step_joint_threshold_indel": lambda: JointThresholdInDel(
            delete_token_id=params["delete_token_id"], split_token_id=params["split_token_id"], **config
        ),
        "diffusers_block_refinement_step": lambda: BlockRefinement(
            threshold=params["threshold"],
            editing_threshold=params["editing_threshold"],
            num_inference_steps=len(params["transfer_schedule"]),
            never_ends=True,
        ),
        "dinfer_ThresholdParallelDecoder": lambda: DInfer(threshold=params["threshold"]),
        "dinfer_HierarchyDecoder": lambda: DInfer(
            rule="hierarchy", threshold=params["threshold"], low_threshold=params["low_threshold"]
        ),
        "dinfer_CreditThresholdParallelDecoder": lambda: DInfer(rule="credit", threshold=params["threshold"]),
    }
    return made[case.kind]()


def _pinned(case: Case, row: int, ids: list[int], mask_id: int | None) -> list[bool]:
    """Return which positions are the prompt, as each reference tells."""
    given = case.get("prompt_mask")
    if given is not None:
        return [bool(flag) for flag in (given[row] if isinstance(given[0], list) else given)]
    if case.kind == "diffusers_block_refinement_step":
        return [False] * len(ids)
    if case.kind == "sglang_step_joint_threshold_indel":
        first = ids.index(mask_id) if mask_id in ids else len(ids)
        return [position < first for position in range(len(ids))]
    return [token != mask_id for token in ids]


class RecordedDraws(RecordedCanvases):
    """Draws of one row: what `RecordedCanvases` has, uniform numbers, and noise f32[B, V] by step."""

    def __init__(
        self,
        drawn: dict[tuple[int, int], Sequence[int]],
        random: dict[tuple[int, int], Sequence[int]],
        routes: dict[tuple[int, int], Sequence[int]],
        uniforms: dict[int, Sequence[float]],
        noise: dict[int, Tensor],
    ) -> None:
        super().__init__(drawn, random, 0, 1 << 20, routes)
        self._uniforms, self._noise = uniforms, noise

    def tokens(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return the recorded tokens of this step, if it has any."""
        return self._of(self._drawn[block, step], block, positions) if (block, step) in self._drawn else None

    def routes(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return the recorded routes of this step, if it has any."""
        return (
            self._of(self._routes[block, step], block, positions) if (block, step) in self._routes else None
        )

    def vocabulary(
        self, block: int, step: int, positions: NDArray[np.int64], vocab_size: int
    ) -> NDArray[np.int64]:
        """Return the recorded random tokens; a corrector step has none."""
        if (block, step) not in self._random:
            return np.zeros(len(positions), dtype=np.int64)
        return super().vocabulary(block, step, positions, vocab_size)

    def uniform(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the recorded numbers; a step without has none that count."""
        if step not in self._uniforms:
            return np.zeros(len(positions), dtype=np.float32)
        return np.asarray(self._uniforms[step], dtype=np.float32)[positions]

    def gumbel(self, block: int, step: int, positions: NDArray[np.int64], vocab_size: int) -> Tensor:
        """Return -log of the recorded exponential noise [M, V]; zeros where none was drawn."""
        if step not in self._noise:
            return torch.zeros(len(positions), vocab_size)
        return -self._noise[step][torch.from_numpy(positions)].log()


def replay_renoising_steps(case: Case) -> None:
    """Replay diffusers' step functions without a mask token; all of their draws are recorded."""
    params = case["params"]
    size, entries = params["block_length"], case.get("trace") or case["steps"]
    scheduler = {
        "diffusers_block_refinement_uniform_step": "BlockRefinement",
        "diffusers_entropy_bound_step": "EntropyBound",
        "diffusers_discrete_ddim_step": "DiscreteDDIM",
    }[case.kind]
    algorithm = diffusers_algorithm({**params, "scheduler": scheduler, "confidence_threshold": None})
    bench = Bench(algorithm, params["vocab_size"], None, TableModel(), is_conditioned=False)
    for row, ids in enumerate(entries[0]["ids_in"]):
        bench.add(ids, [False] * size, _diffusers_draws(entries, scheduler, row, size, params))
    for step, entry in enumerate(entries):
        name = "corrector_logits" if entry.get("corrector") else "logits"
        bench.step(case.tensors[f"{name}_{entry['timestep']}"])
        for row, work in enumerate(bench.works):
            found = work.canvas.token_ids.tolist()
            expect_equal(f"step {step}, row {row}: ids", found, entry["ids_out"][row])


def _diffusers_draws(
    entries: list[dict[str, Any]], scheduler: str, row: int, size: int, params: dict[str, Any]
) -> RecordedDraws:
    drawn: dict[tuple[int, int], Sequence[int]] = {}
    random: dict[tuple[int, int], Sequence[int]] = {(0, -1): entries[0]["ids_in"][row]}
    routes: dict[tuple[int, int], Sequence[int]] = {}
    uniforms: dict[int, Sequence[float]] = {}
    span = slice(row * size, (row + 1) * size)
    for step, entry in enumerate(entries):
        if entry.get("corrector"):
            # Where a position was drawn anew, its token is what came out.
            drawn[0, step] = entry["ids_out"][row]
            uniforms[step] = next(draw["values"] for draw in entry["draws"] if draw["op"] == "rand")[span]
            continue
        draws = [(draw["op"], draw["values"][span]) for draw in entry["draws"]]
        random[0, step] = next(values for op, values in draws if op == "randint")
        multinomials = [values for op, values in draws if op == "multinomial"]
        if scheduler == "DiscreteDDIM":
            routes[0, step] = multinomials[-1]
        if scheduler == "EntropyBound" or params.get("temperature", 0.0) > 0:
            drawn[0, step] = entry["sampled_tokens"][row]
    return RecordedDraws(drawn, random, routes, uniforms, {})


def replay_gemma_renoise(case: Case) -> None:
    """Replay SGLang's Gemma4Renoise with its recorded noise; self-conditioning is compared too."""
    params, tensors = case["params"], case.tensors
    config = params["algorithm_config"]
    algorithm = EntropyBound(
        max_denoising_steps=config["max_denoising_steps"],
        **config.get("sampler_config", {}),
        **config.get("temperature_schedule", {}),
        **config.get("stopping_config", {}),
    )
    model = TableModel(tensors["embed_weight"], params["embed_scale"])
    bench = Bench(algorithm, params["vocab_size"], None, model, is_conditioned=True)
    entries = case.get("trace") or case["steps"]
    for row, ids in enumerate(tensors["initial_canvas"].tolist()):
        random = {(0, -1): ids}
        random |= {(0, step): entry["random_canvas"][row] for step, entry in enumerate(entries)}
        noise = {step: tensors[f"noise_{step}"][row] for step in range(len(entries))}
        bench.add(ids, [False] * len(ids), RecordedDraws({}, random, {}, {}, noise))
    for step, entry in enumerate(entries):
        bench.step(tensors[f"logits_{step}"].view(len(bench.works), params["block_size"], -1))
        for row, work in enumerate(bench.works):
            where = f"step {step}, row {row}"
            expect_equal(f"{where}: canvas", work.canvas.token_ids.tolist(), entry["canvas_out"][row])
            expect_equal(f"{where}: done", work.canvas.is_complete, entry["done"][row])
            if entry["has_self_conditioning"][row]:
                assert work.addend is not None
                expected = tensors[f"self_conditioning_{step}"][row]
                expect_close(f"{where}: self-conditioning", work.addend, expected, _SOFT_TOLERANCE)


def replay_selection(case: Case) -> None:
    """Replay the selection functions of the LLaDA references on synthetic logits, and the transfer counts."""
    for masked, steps, per_step in case["num_transfer_tokens_table"]:
        found = [
            int(scheduled_count(torch.tensor(masked), torch.tensor(steps), torch.tensor(step)))
            for step in range(steps)
        ]
        expect_equal(f"{masked} masks in {steps} steps", found, per_step)
    for sub in case["subcases"]:
        _replay_subcase(case, sub)


# What the synthetic canvases hold.
_DECIDED_ID, _MASK_ID = 3, 15


def _replay_subcase(case: Case, sub: dict[str, Any]) -> None:
    logits = case.tensors[f"{sub['name']}.logits"]
    algorithm: Algorithm = EntropyThreshold(threshold=sub.get("threshold"), is_inclusive=True, steps=1)
    if sub["function"] != "get_transfer_index_entropy":
        algorithm = FastDLLM(threshold=sub.get("threshold"), factor=sub.get("factor"), steps=1)
    bench = Bench(algorithm, logits.shape[-1], _MASK_ID, TableModel())
    flags = sub["mask_index"][0]
    ids = [_MASK_ID if flag else _DECIDED_ID for flag in flags]
    work = bench.add(ids, [not flag for flag in flags], ArgmaxSource())
    # With one step in all, a schedule decides as many as there were masks at its start.
    work.canvas.masks_at_start = sub.get("num_transfer_tokens") or sum(flags)
    bench.step(logits)
    decision = bench.last["0"]
    found = np.flatnonzero(decision.transfer).tolist()
    expect_equal(f"{sub['name']}: transferred", found, sorted(sub["transferred"]))
    expect_equal(f"{sub['name']}: x0", decision.tokens.tolist(), sub["x0"])
