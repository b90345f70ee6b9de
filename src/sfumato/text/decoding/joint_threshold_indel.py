"""SGLang's JointThresholdInDel (LLaDA2.1): joint threshold whose edits may delete a position or split one.

A DELETE token takes its position out of the block, a SPLIT token puts a mask in front of the token that it
replaces; what is pushed out at the block's end is lost, what is missing there is masked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from sfumato.text.decoding.protocol import (
    Algorithm,
    Outcome,
    Statistics,
    Transform,
    View,
    Wanted,
    parameter,
)

# Alternatives that are read per position: more than a block has steps, each of which may rule one out.
_ALTERNATIVES = 128


@dataclass(frozen=True, slots=True)
class History:
    """What one block has been through.

    is_original: masks that the block began with; the flag moves with its token. post_edit_steps: steps
    without such masks. num_updates: steps that wrote. seen: inputs so far. written: tokens by position.
    is_finished: the clean-up step has run.
    """

    is_original: tuple[bool, ...]
    written: tuple[frozenset[int], ...]
    seen: frozenset[tuple[int, ...]] = frozenset()
    post_edit_steps: int = 0
    num_updates: int = 0
    is_finished: bool = False


@dataclass(frozen=True, slots=True)
class JointThresholdInDel(Algorithm):
    """Each step decides masks, edits tokens, and removes or inserts positions; a last step cleans up."""

    threshold: float = parameter(0.5, "positions more confident than this are decided together", minimum=0.0)
    edit_threshold: float = parameter(
        0.0, "a decided token is replaced by a better one of more than this confidence", minimum=0.0
    )
    max_post_edit_steps: int = parameter(16, "steps per block after its last original mask", minimum=0)
    delete_token_id: int | None = parameter(None, "the model's DELETE token; null: none", minimum=0)
    split_token_id: int | None = parameter(None, "the model's SPLIT token; null: none", minimum=0)

    is_monotone: ClassVar[bool] = False
    reads_decided: ClassVar[bool] = True
    obeys_grammars: ClassVar[bool] = False

    @property
    def wanted(self) -> Wanted:
        return Wanted(top=_ALTERNATIVES)

    def transform(self, ends: tuple[int, ...], eot: int | None) -> Transform:
        """The confidence is that of the distribution a token is drawn from."""
        return Transform(filtered_confidence=True)

    @staticmethod
    def decide(
        rows: Sequence[JointThresholdInDel], view: View, statistics: Statistics, states: Sequence[Any]
    ) -> Outcome:
        """Let each row edit its block; a change of length moves tokens, so rows are taken one by one."""
        tokens = view.token_ids.clone()
        done, new_states = [], []
        for index, row in enumerate(rows):
            block = _Block.of(row, view, statistics, index)
            after, is_done, state = block.step(states[index])
            tokens[index, : len(after)] = torch.tensor(after, device=tokens.device)
            done.append(is_done)
            new_states.append(state)
        movable = view.eligible | view.editable
        transfer = movable & (tokens != view.token_ids)
        return Outcome(
            transfer=transfer,
            tokens=tokens,
            done=torch.tensor(done, device=tokens.device),
            states=new_states,
        )


@dataclass(frozen=True, slots=True)
class _Block:
    """One row's block as plain lists, and what its logits say."""

    row: JointThresholdInDel
    mask_id: int
    size: int
    ids: list[int]
    is_mask: list[bool]
    is_movable: list[bool]
    guesses: list[int]
    confidence: list[float]
    alternatives: list[list[int]]
    probabilities: list[list[float]]

    @classmethod
    def of(cls, row: JointThresholdInDel, view: View, statistics: Statistics, index: int) -> _Block:
        """Take one row apart."""
        assert statistics.top_ids is not None
        assert statistics.top_probabilities is not None
        size = min(view.block_length[index], view.token_ids.shape[1])
        return cls(
            row=row,
            mask_id=view.mask_token_id[index],
            size=size,
            ids=view.token_ids[index, :size].tolist(),
            is_mask=view.eligible[index, :size].tolist(),
            is_movable=(view.eligible | view.editable)[index, :size].tolist(),
            guesses=statistics.token[index, :size].tolist(),
            confidence=statistics.confidence[index, :size].tolist(),
            alternatives=statistics.top_ids[index, :size].tolist(),
            probabilities=statistics.top_probabilities[index, :size].tolist(),
        )

    def step(self, state: History | None) -> tuple[list[int], bool, History]:
        """Return the block's tokens after the step, whether it is done, and its history."""
        if state is None:
            state = History(tuple(self.is_mask), tuple(frozenset[int]() for _ in self.ids))
        original = [mask and mine for mask, mine in zip(self.is_mask, state.is_original, strict=True)]
        row = self.row
        post_steps = state.post_edit_steps + (not any(original))
        is_final = (
            (row.max_post_edit_steps > 0 and post_steps >= row.max_post_edit_steps)
            or (row.max_post_edit_steps == 0 and not any(original))
            or state.num_updates > self.size + row.max_post_edit_steps
        )
        guesses, confidence = self._guesses(original, is_final)
        chosen = self._chosen(original, confidence, is_final)
        if not row.max_post_edit_steps and not [
            p for p, mine in enumerate(original) if mine and p not in chosen
        ]:
            is_final = True
            chosen = {position for position, mask in enumerate(self.is_mask) if mask}
        writes = {position: guesses[position] for position in chosen | self._edits(guesses, confidence)}
        state = replace(state, post_edit_steps=post_steps)
        if not writes:
            return self.ids, True, replace(state, is_finished=True)
        if is_final:
            writes = {position: self._allowed(position, token) for position, token in writes.items()}
        elif tuple(self.ids) in state.seen:
            self._break_loop(writes, confidence, original, state)
        written = [set(tokens) for tokens in state.written]
        for position, token in writes.items():
            written[position].add(token)
        after, flags = self._rebuilt(writes, list(state.is_original))
        state = replace(
            state,
            is_original=tuple(flags),
            written=tuple(map(frozenset, written)),
            seen=state.seen | {tuple(self.ids)},
            num_updates=state.num_updates + 1,
            is_finished=is_final,
        )
        return after, is_final, state

    def _guesses(self, original: list[bool], is_final: bool) -> tuple[list[int], list[float]]:
        """Return guesses and confidences; an original mask never stays one by the model's own guess."""
        guesses, confidence = list(self.guesses), list(self.confidence)
        for position, mine in enumerate(original):
            if mine and not is_final and guesses[position] == self.mask_id:
                guesses[position], confidence[position] = self._best_outside(position, {self.mask_id})
        return guesses, confidence

    def _chosen(self, original: list[bool], confidence: list[float], is_final: bool) -> set[int]:
        """Return the masks that are decided."""
        masks = [position for position, mask in enumerate(self.is_mask) if mask]
        if is_final or not any(original):
            return set(masks)
        needed = 1 + len(masks) - sum(original)
        above = [position for position in masks if confidence[position] > self.row.threshold]
        if len(above) >= needed:
            return set(above)
        return set(sorted(masks, key=lambda position: -confidence[position])[:needed])

    def _edits(self, guesses: list[int], confidence: list[float]) -> set[int]:
        return {
            position
            for position, movable in enumerate(self.is_movable)
            if movable
            and not self.is_mask[position]
            and confidence[position] > self.row.edit_threshold
            and guesses[position] != self.ids[position]
        }

    def _commands(self) -> set[int]:
        return {token for token in (self.row.delete_token_id, self.row.split_token_id) if token is not None}

    def _allowed(self, position: int, token: int) -> int:
        """Return a token that is text."""
        forbidden = {self.mask_id, *self._commands()}
        return token if token not in forbidden else self._best_outside(position, forbidden)[0]

    def _best_outside(self, position: int, forbidden: set[int]) -> tuple[int, float]:
        """Return the best token outside a set and its probability."""
        for token, probability in zip(self.alternatives[position], self.probabilities[position], strict=True):
            if token not in forbidden:
                return token, probability
        return self.ids[position], 0.0

    def _break_loop(
        self, writes: dict[int, int], confidence: list[float], original: list[bool], state: History
    ) -> None:
        """Give the least sure of the changing positions a token that it has not had; changes `writes`."""
        changing = [position for position, token in writes.items() if token != self.ids[position]]
        if not changing:
            return
        position = min(changing, key=lambda place: confidence[place])
        forbidden = set(state.written[position]) | ({self.mask_id} if original[position] else set())
        writes[position] = self._best_outside(position, forbidden)[0]

    def _rebuilt(self, writes: dict[int, int], flags: list[bool]) -> tuple[list[int], list[bool]]:
        """Return tokens and flags after writing, deleting and splitting behind the last pinned position."""
        commands = self._commands()
        pinned = [position for position, movable in enumerate(self.is_movable) if not movable]
        start = pinned[-1] + 1 if pinned else 0
        after = list(self.ids)
        for position, token in writes.items():
            is_command = token in commands and position < start
            after[position] = self._allowed(position, token) if is_command else token
        if not commands & {after[position] for position in writes if position >= start}:
            return after, flags
        moved: list[tuple[int, bool]] = []
        for position in range(start, self.size):
            token = after[position]
            if position in writes and token == self.row.delete_token_id:
                continue
            if position in writes and token == self.row.split_token_id:
                moved += [(self.mask_id, False), (self.ids[position], flags[position])]
            else:
                moved.append((token, flags[position]))
        moved = (moved + [(self.mask_id, False)] * self.size)[: self.size - start]
        return after[:start] + [token for token, _ in moved], flags[:start] + [flag for _, flag in moved]
