"""Plans DiffusionGemma's generate kinds: transformers' sampler and diffusers' pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfumato.text.decoding.discrete_ddim import DiscreteDDIM
from sfumato.text.decoding.entropy_bound import EntropyBound
from sfumato.text.decoding.protocol import Algorithm
from sfumato.text.decoding.uniform_refinement import UniformRefinement
from sfumato.text.door import Replay
from sfumato.text.ends import CanvasEnd, EndRule, PadAfterEos
from tests.goldens.cases import Case
from tests.goldens.replay import (
    Asked,
    Checkpoint,
    Planned,
    Recording,
    expect_equal,
    load_for,
    make_spec,
)
from tests.goldens.sources import ArgmaxSource


class RecordedCanvases(ArgmaxSource):
    """Tokens that a reference drew: for (block, step) the drawn and the random tokens i64[C] of one row."""

    def __init__(
        self,
        drawn: dict[tuple[int, int], Sequence[int]],
        random: dict[tuple[int, int], Sequence[int]],
        start: int,
        length: int,
        routes: dict[tuple[int, int], Sequence[int]] | None = None,
    ) -> None:
        self._drawn, self._random, self._routes = drawn, random, routes or {}
        self._start, self._length = start, length

    def _of(self, numbers: Sequence[int], block: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(numbers, dtype=np.int64)[positions - self._start - block * self._length]

    def tokens(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return the recorded tokens; a sampler that takes the best has none."""
        return self._of(self._drawn[block, step], block, positions) if self._drawn else None

    def routes(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return the recorded routes of a discrete DDIM step."""
        return self._of(self._routes[block, step], block, positions) if self._routes else None

    def vocabulary(
        self, block: int, step: int, positions: NDArray[np.int64], vocab_size: int
    ) -> NDArray[np.int64]:
        """Return the recorded random tokens; step -1 is the first canvas."""
        return self._of(self._random[block, step], block, positions)


def plan_transformers(case: Case) -> Planned:
    """Plan transformers' generate, one request per row; the random draws are injected."""
    params = case["params"]
    checkpoint = Checkpoint(case.checkpoint_path)
    length = load_for(checkpoint).traits.block_length
    algorithm = EntropyBound(
        max_denoising_steps=params["max_denoising_steps"],
        entropy_bound=params["entropy_bound"],
        t_min=params["t_min"],
        t_max=params["t_max"],
        stability_threshold=params["stability_threshold"],
        confidence_threshold=params["confidence_threshold"],
    )
    end_rule: EndRule = CanvasEnd()
    if params["eos_token_id"] is not None:
        end_rule = PadAfterEos(params["eos_token_id"], params["pad_token_id"])
    num_canvases = -(-params["max_new_tokens"] // length)
    asked = []
    for row, prompt in enumerate(case["input_ids"]):
        drawn, random = {}, {}
        for block, canvas in enumerate(case["canvases"]):
            random[block, -1] = canvas["initial_canvas"][row]
            for index, step in enumerate(canvas["steps"]):
                drawn[block, index] = step["denoiser_canvas"][row]
                random[block, index] = step["random_canvas"][row]
        source = RecordedCanvases(drawn, random, len(prompt), length)
        spec = make_spec(prompt, max_tokens=num_canvases * length, block_length=length)
        asked.append(Asked(spec, Replay(algorithm, end_rule, source)))

    def verify(recordings: list[Recording]) -> None:
        for row, recording in enumerate(recordings):
            _verify_row(case, row, recording, length)
        if len(recordings) == 1:
            expect_equal("denoise forwards", recordings[0].usage.denoise_steps, case["forwards"]["denoise"])
            expect_equal("encoder forwards", recordings[0].num_encoded, case["forwards"]["encoder"])

    return Planned(checkpoint, asked, verify)


def plan_diffusers(case: Case) -> Planned:
    """Plan diffusers' pipeline with one of its three schedulers, one request per row."""
    params = case["params"]
    checkpoint = Checkpoint(case.checkpoint_path)
    length = load_for(checkpoint).traits.block_length
    num_canvases = -(-params["gen_length"] // length)
    canvases = _split(case["trace"])
    asked = [
        Asked(
            make_spec(prompt, max_tokens=num_canvases * length, block_length=length),
            Replay(
                diffusers_algorithm(params),
                CanvasEnd(),
                _diffusers_source(params, canvases, row, prompt, length),
            ),
        )
        for row, prompt in enumerate(case["input_ids"])
    ]

    def verify(recordings: list[Recording]) -> None:
        for row, recording in enumerate(recordings):
            found = iter(recording.canvases)
            start = len(case["input_ids"][row])
            for block, steps in enumerate(canvases):
                for index, step in enumerate(steps):
                    ours = next(found)[start + block * length : start + (block + 1) * length].tolist()
                    # A canvas that has stopped early shows its best tokens; the trace still the noisy ones.
                    if index + 1 < len(steps):
                        expect_equal(
                            f"row {row}, canvas {block}, step {index}", ours, step["canvas_out"][row]
                        )
            sequence = case["sequences"][row]
            expect_equal(f"row {row}: sequence", recording.final_ids[start : start + len(sequence)], sequence)
            forwards = case["forwards"]
            expect_equal("denoise forwards", recording.usage.denoise_steps, forwards["denoise"])
            expect_equal("encoder forwards", recording.num_encoded, forwards["encoder"])

    return Planned(checkpoint, asked, verify)


def _diffusers_source(
    params: dict[str, Any], canvases: list[list[dict[str, Any]]], row: int, prompt: list[int], length: int
) -> RecordedCanvases:
    """Return the draws of one row: drawn tokens if there are any, routes of discrete DDIM, random tokens."""
    drawn: dict[tuple[int, int], Sequence[int]] = {}
    random: dict[tuple[int, int], Sequence[int]] = {}
    routes: dict[tuple[int, int], Sequence[int]] = {}
    span = slice(row * length, (row + 1) * length)
    for block, steps in enumerate(canvases):
        random[block, -1] = steps[0]["canvas_in"][row]
        for index, step in enumerate(steps):
            # The last draw of a kind is the route, where tokens are drawn before it.
            draws = {draw["op"]: draw["values"][span] for draw in step["draws"]}
            random[block, index] = draws["randint"]
            if params["scheduler"] == "DiscreteDDIM":
                routes[block, index] = draws["multinomial"]
            if params["scheduler"] == "EntropyBound" or params.get("temperature", 0.0) > 0:
                drawn[block, index] = step["sampled_tokens"][row]
    return RecordedCanvases(drawn, random, len(prompt), length, routes)


def diffusers_algorithm(params: dict[str, Any]) -> Algorithm:
    """Return the algorithm of a scheduler and its configuration, in diffusers' names."""
    config, steps = dict(params["scheduler_config"]), params["num_inference_steps"]
    config.pop("block_length", None)
    if params["scheduler"] == "EntropyBound":
        return EntropyBound(
            max_denoising_steps=steps,
            confidence_threshold=params.get("confidence_threshold"),
            keeps_canvas=True,
            **config,
        )
    if params["scheduler"] == "DiscreteDDIM":
        config.pop("corrector_selection", None)
        return DiscreteDDIM(num_inference_steps=steps, **config)
    return UniformRefinement(num_inference_steps=steps, is_reference=True, **config)


def _split(trace: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the steps of each canvas; their numbers begin again at 0."""
    canvases: list[list[dict[str, Any]]] = []
    for entry in trace:
        if entry["step"] == 0:
            canvases.append([])
        canvases[-1].append(entry)
    return canvases


def _verify_row(case: Case, row: int, recording: Recording, length: int) -> None:
    """Compare each canvas with the reference's up to the step at which this row had finished there."""
    found = iter(recording.canvases)
    start = len(case["input_ids"][row])
    for block, canvas in enumerate(case["canvases"]):
        if block and case["canvases"][block - 1]["finished_sequences"][row]:
            break
        for index, step in enumerate(canvas["steps"]):
            is_done = step["finished_denoising"][row] or index + 1 == len(canvas["steps"])
            ours = next(found)[start : start + length].tolist()
            theirs = step["argmax_canvas" if is_done else "canvas_out"][row]
            expect_equal(f"row {row}, canvas {block}, step {index}", ours, theirs)
            if is_done:
                break
        start += length
    expect_equal(f"row {row}: further steps", len(list(found)), 0)
    expected = case["sequences"][row][:start]
    expect_equal(f"row {row}: sequence", recording.final_ids[:start], expected)
