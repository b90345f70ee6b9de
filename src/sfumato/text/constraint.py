"""One request's grammar on its canvas: what may stand next, and how far a step's decisions may reach.

A block is decided in any order, an automaton reads from left to right. So the automaton stands at the
*frontier*, the first undecided position: its logits are masked, it is decided in every step, and what follows
is decided as far as the algorithm is sure of tokens that the grammar takes, or the grammar leaves no choice.
Positions behind that stay guesses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from sfumato.core.plan import Decision
from sfumato.errors import RequestError
from sfumato.text.canvas import Canvas

# What is reported for a token that the grammar chose and no statistics were read of.
_UNKNOWN_LOGPROB = -9999.0


class Constraint:
    """An automaton and the canvas position at which it stands."""

    def __init__(self, matcher: Any, *, vocab_size: int, end_ids: tuple[int, ...], field: str) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._end_ids = end_ids
        self._field = field
        self._at: int | None = None
        self._bits = np.zeros(-(-vocab_size // 32), dtype=np.int32)

    def follow(self, canvas: Canvas) -> int:
        """Read what is decided and pinned up to the frontier; return its position, L where there is none.

        Raises RequestError where pinned text does not obey the grammar, or the automaton has given up.
        """
        self._check()
        at = canvas.prompt_len if self._at is None else self._at
        while at < canvas.length and not canvas.undecided[at]:
            token = int(canvas.token_ids[at])
            if not self._takes(token):
                raise RequestError(
                    f"the pinned text at position {at - canvas.prompt_len} does not obey {self._field}",
                    field=self._field,
                )
            at += 1
        self._at = at
        return at

    def allowed(self) -> NDArray[np.bool_]:
        """Return bool[V], the tokens that may stand at the frontier."""
        if self._matcher.is_stopped():
            found = np.zeros(self._vocab_size, dtype=np.bool_)
            found[list(self._end_ids)] = True
            return found
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        return np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._vocab_size].astype(
            np.bool_
        )

    def restrict(self, canvas: Canvas, decision: Decision, *, decides_at_end: bool = False) -> Decision:
        """Return a decision of which only what the grammar takes, from the frontier on, is left.

        decides_at_end: nothing is decided before the algorithm ends the block; then, in this step and those
        behind it, what is left of each.
        """
        if decides_at_end and not decision.done:
            return decision
        tokens, transfer = decision.tokens.copy(), np.zeros_like(decision.transfer)
        logprob = None if decision.logprob is None else decision.logprob.copy()
        first = self.follow(canvas) - decision.start
        num_read = 0
        for offset in range(max(first, 0), len(tokens)):
            position = decision.start + offset
            if self._matcher.is_error():
                # The next step begins with it, and ends the request.
                break
            if canvas.undecided[position]:
                is_sure = offset == first or bool(decision.transfer[offset])
                token = self._choice(int(decision.tokens[offset]), is_sure=is_sure, is_first=offset == first)
                if token is None:
                    break
                transfer[offset] = True
                if token != tokens[offset] and logprob is not None:
                    logprob[offset] = _UNKNOWN_LOGPROB
                tokens[offset] = token
            token = int(tokens[offset]) if transfer[offset] else int(canvas.token_ids[position])
            if self._matcher.is_stopped():
                continue
            if not self._takes(token):
                transfer[offset] = False
                break
            num_read += 1
        self._matcher.rollback(num_read)
        return replace(decision, tokens=tokens, transfer=transfer, logprob=logprob, done=None)

    def _check(self) -> None:
        """Raise RequestError where the automaton met one of its limits; it then calls itself stopped."""
        if self._matcher.is_error():
            reason = str(self._matcher.get_error()).strip().partition("\n")[0]
            raise RequestError(f"{self._field}: the grammar is too complex: {reason}", field=self._field)

    def _choice(self, guess: int, *, is_sure: bool, is_first: bool) -> int | None:
        """Return the token that is decided at the next position, or None."""
        if self._matcher.is_stopped():
            return guess if guess in self._end_ids else self._end_ids[0]
        forced = self._matcher.compute_ff_tokens()
        if forced:
            return int(forced[0])
        if is_sure and self._matcher.validate_tokens([guess]) == 1:
            return guess
        if is_first:
            # Its logits were not read, or nothing that the grammar takes was left of them.
            return int(self.allowed().argmax())
        return None

    def _takes(self, token: int) -> bool:
        if self._matcher.is_stopped():
            return token in self._end_ids
        return self._matcher.validate_tokens([token]) == 1 and bool(self._matcher.consume_token(token))
