"""Own the noise: how dialogues become rows of masked tokens, and rows become batches of fixed shapes."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor

from recipes.data import draw_dialogue
from recipes.model import CLEAN_COPY, PADDING_COPY
from recipes.plan import Plan
from recipes.tokenizer import END_ID, MASK_ID, PAD_ID, render_chat

EXAMPLES_PER_POOL = 2048
NUM_NOISY_COPIES = 2
CANVAS_LENGTHS, CANVAS_SHARES = (32, 64, 96, 128), (0.55, 0.35, 0.05, 0.05)
BLOCK_PATTERN_SHARE = 0.5
# The filling after the first end token is easy and long; at full weight it would drown the answer.
TAIL_WEIGHT = 0.05
IGNORED = -100


@dataclass
class Row:
    """One training row, a list entry per position; `targets` is IGNORED where nothing is predicted."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def append(self, token_id: int, position: int, copy: int, block: int, target: int, weight: float) -> None:
        """Add one position."""
        self.token_ids.append(token_id)
        self.positions.append(position)
        self.copies.append(copy)
        self.blocks.append(block)
        self.targets.append(target)
        self.weights.append(weight)


def noisy_llada_row(prompt: list[int], answer: list[int], random_source: random.Random, plan: Plan) -> Row:
    """Mask an answer that is filled with end tokens up to a canvas length; all positions see each other.

    Half of the rows are masked at one ratio all over. In the others one drawn block is masked at the ratio,
    those before it are clean and all later ones fully masked, as when blocks are decoded from left to right.
    """
    row = Row()
    for position, token_id in enumerate(prompt):
        row.append(token_id, position, CLEAN_COPY, 0, IGNORED, 0.0)
    fitting = [(n, share) for n, share in zip(CANVAS_LENGTHS, CANVAS_SHARES, strict=True) if n > len(answer)]
    canvas_length = random_source.choices([n for n, _ in fitting], weights=[share for _, share in fitting])[0]
    canvas = answer + [END_ID] * (canvas_length - len(answer))
    start, end = 0, canvas_length
    if random_source.random() < BLOCK_PATTERN_SHARE:
        # One more block than the answer has, so that a tail of whole end blocks is met too.
        num_blocks = min(canvas_length // plan.block_length, len(answer) // plan.block_length + 2)
        weights = [1.0] * (num_blocks - 1) + [0.2 if num_blocks > 1 else 1.0]
        start = random_source.choices(range(num_blocks), weights=weights)[0] * plan.block_length
        end = start + plan.block_length
    masked = _draw_masked(end - start, random_source)
    for i, token_id in enumerate(canvas):
        position = len(prompt) + i
        if start <= i < end and i - start in masked:
            weight = 1.0 if i <= len(answer) else TAIL_WEIGHT
            row.append(MASK_ID, position, CLEAN_COPY, 0, token_id, weight)
        else:
            row.append(MASK_ID if i >= end else token_id, position, CLEAN_COPY, 0, IGNORED, 0.0)
    return row


def noisy_sdar_row(prompt: list[int], answer: list[int], random_source: random.Random, plan: Plan) -> Row:
    """Lay out the clean text and noisy copies of its answer blocks, each block masked at its own ratio.

    Blocks are counted from position 0, so the prompt's end can share one with the start of the answer.
    """
    row, size = Row(), plan.block_length
    text = prompt + answer + [END_ID]
    text += [END_ID] * (-len(text) % size)
    for position, token_id in enumerate(text):
        row.append(token_id, position, CLEAN_COPY, position // size, IGNORED, 0.0)
    for copy in range(1, NUM_NOISY_COPIES + 1):
        for block in range(len(prompt) // size, len(text) // size):
            first = max(len(prompt), block * size)
            masked = _draw_masked((block + 1) * size - first, random_source)
            for position in range(block * size, (block + 1) * size):
                token_id = text[position]
                if position >= first and position - first in masked:
                    weight = 1.0 if position <= len(prompt) + len(answer) else TAIL_WEIGHT
                    row.append(MASK_ID, position, copy, block, token_id, weight)
                else:
                    row.append(token_id, position, copy, block, IGNORED, 0.0)
    return row


def _draw_masked(length: int, random_source: random.Random) -> set[int]:
    ratio = random_source.random()
    masked = {i for i in range(length) if random_source.random() < ratio}
    return masked or {random_source.randrange(length)}


@dataclass(frozen=True)
class Batch:
    """Rows of one bucket length L: weights f32[B, L], all others i64[B, L]."""

    token_ids: Tensor
    positions: Tensor
    copies: Tensor
    blocks: Tensor
    targets: Tensor
    weights: Tensor

    @classmethod
    def from_rows(cls, rows: list[Row], length: int) -> "Batch":
        """Pad every row to `length`."""

        def padded(lists: list[list[int]], filler: int) -> Tensor:
            return torch.tensor([values + [filler] * (length - len(values)) for values in lists])

        return cls(
            token_ids=padded([row.token_ids for row in rows], PAD_ID),
            positions=padded([row.positions for row in rows], 0),
            copies=padded([row.copies for row in rows], PADDING_COPY),
            blocks=padded([row.blocks for row in rows], 0),
            targets=padded([row.targets for row in rows], IGNORED),
            weights=torch.tensor([row.weights + [0.0] * (length - len(row.weights)) for row in rows]),
        )


def draw_row(tokenizer: Tokenizer, random_source: random.Random, plan: Plan) -> Row:
    """Draw one dialogue and mask its answer."""
    messages, answer = draw_dialogue(random_source)
    prompt_ids, answer_ids = tokenizer.encode(render_chat(messages)).ids, tokenizer.encode(answer).ids
    make_row = noisy_sdar_row if plan.is_block_causal else noisy_llada_row
    return make_row(prompt_ids, answer_ids, random_source, plan)


def draw_batches(tokenizer: Tokenizer, plan: Plan, first_pool: int) -> Iterator[tuple[int, Batch]]:
    """Yield (pool number, batch) of masked dialogues forever."""
    return gather(plan, first_pool, lambda random_source: draw_row(tokenizer, random_source, plan))


def gather(plan: Plan, first_pool: int, draw: Callable[[random.Random], Row]) -> Iterator[tuple[int, Batch]]:
    """Yield (pool number, batch) forever; a pool's draws depend on the seed and its number alone.

    Rows longer than the longest bucket (a few two-turn dialogues) are dropped.
    """
    waiting: dict[int, list[Row]] = {length: [] for length in plan.bucket_lengths}
    pool = first_pool
    while True:
        random_source = random.Random(f"{plan.name} {plan.seed} {pool}")
        ready = []
        for _ in range(EXAMPLES_PER_POOL):
            row = draw(random_source)
            length = min((n for n in plan.bucket_lengths if n >= len(row.token_ids)), default=None)
            if length is None:
                continue
            waiting[length].append(row)
            if len(waiting[length]) == plan.tokens_per_batch // length:
                ready.append(Batch.from_rows(waiting[length], length))
                waiting[length] = []
        random_source.shuffle(ready)
        for batch in ready:
            yield pool, batch
        pool += 1
