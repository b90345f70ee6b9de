"""Own the scoring of a tiny model: a small decoding loop of its own and exact-match scores.

It recomputes the whole visible text at every step; the package's engine is the fast and complete one.
"""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from recipes.data import SCORED_GROUPS, Example, draw_held_out
from recipes.model import CLEAN_COPY, PADDING_COPY, TinyModel
from recipes.plan import Plan
from recipes.tokenizer import END_ID, MASK_ID, PAD_ID, render_chat

# Confidence at which a token is decided; above 1 only the most confident one is, so one token per step.
DECODING_RULES = {"one_token": 2.0, "threshold": 0.9}
CANVAS_LENGTH = 64
ROWS_PER_FORWARD = 64


@dataclass(frozen=True)
class Score:
    """Exact answers of one group; tokens_per_forward counts answer tokens and one end token."""

    questions: int
    correct: int
    tokens_per_forward: float


@dataclass
class Decoding:
    """One answer in progress; the masks in [.., end) are those that may be decided now."""

    token_ids: list[int]
    prompt_len: int
    end: int
    num_forwards: int = 0
    is_finished: bool = False

    def answer_ids(self) -> list[int]:
        """Return the answer up to its first end token, without it."""
        ids = self.token_ids[self.prompt_len :]
        return ids[: ids.index(END_ID)] if END_ID in ids else ids


def start_decoding(prompt: list[int], plan: Plan) -> Decoding:
    """Lay out a prompt with masks: the whole canvas, or the first open block if block-causal."""
    if plan.is_block_causal:
        end = (len(prompt) // plan.block_length + 1) * plan.block_length
        return Decoding(prompt + [MASK_ID] * (end - len(prompt)), len(prompt), end)
    return Decoding(prompt + [MASK_ID] * CANVAS_LENGTH, len(prompt), len(prompt) + plan.block_length)


def advance(decoding: Decoding, plan: Plan) -> None:
    """Finish the answer or open the next block, if the current block is decided."""
    if MASK_ID in decoding.token_ids[: decoding.end]:
        return
    has_end = END_ID in decoding.token_ids[decoding.prompt_len : decoding.end]
    if has_end or decoding.end - decoding.prompt_len >= CANVAS_LENGTH:
        decoding.is_finished = True
        return
    decoding.end += plan.block_length
    decoding.token_ids += [MASK_ID] * (decoding.end - len(decoding.token_ids))


@torch.no_grad()
def predict(model: TinyModel, rows: list[list[int]]) -> Tensor:
    """Return logits f32[B, L, V] for rows padded to the longest."""
    length = max(len(row) for row in rows)
    token_ids = torch.tensor([row + [PAD_ID] * (length - len(row)) for row in rows])
    copies = torch.tensor([[CLEAN_COPY] * len(row) + [PADDING_COPY] * (length - len(row)) for row in rows])
    positions = torch.arange(length).expand(len(rows), length)
    blocks = (
        positions // model.plan.block_length if model.plan.is_block_causal else torch.zeros_like(positions)
    )
    return model.head(model.hidden(token_ids, positions, copies, blocks)).float()


def decode(model: TinyModel, prompts: list[list[int]], threshold: float) -> list[Decoding]:
    """Answer every prompt: a forward decides the block's best masked position and all above the threshold."""
    decodings = [start_decoding(prompt, model.plan) for prompt in prompts]
    by_length = sorted(decodings, key=lambda decoding: decoding.prompt_len)
    for i in range(0, len(by_length), ROWS_PER_FORWARD):
        active = by_length[i : i + ROWS_PER_FORWARD]
        while active:
            probabilities = predict(model, [decoding.token_ids for decoding in active]).softmax(-1)
            confidences, choices = probabilities.max(-1)
            for decoding, confidence, choice in zip(active, confidences, choices, strict=True):
                _decide(decoding, confidence.tolist(), choice.tolist(), threshold)
                advance(decoding, model.plan)
            active = [decoding for decoding in active if not decoding.is_finished]
    return decodings


def _decide(decoding: Decoding, confidence: list[float], choice: list[int], threshold: float) -> None:
    decoding.num_forwards += 1
    open_positions = [p for p in range(decoding.end) if decoding.token_ids[p] == MASK_ID]
    best = max(open_positions, key=confidence.__getitem__)
    for position in open_positions:
        if position == best or confidence[position] >= threshold:
            decoding.token_ids[position] = choice[position]


def score(model: TinyModel, tokenizer: Tokenizer, examples: list[Example], threshold: float) -> Score:
    """Decode the examples' questions and compare whole answers."""
    chats = [render_chat([{"role": "user", "content": example.question}]) for example in examples]
    prompts = [tokenizer.encode(chat).ids for chat in chats]
    decodings = decode(model, prompts, threshold)
    correct = sum(
        tokenizer.decode(decoding.answer_ids(), skip_special_tokens=False) == example.answer
        for decoding, example in zip(decodings, examples, strict=True)
    )
    num_tokens = sum(len(decoding.answer_ids()) + 1 for decoding in decodings)
    num_forwards = sum(decoding.num_forwards for decoding in decodings)
    return Score(len(examples), correct, round(num_tokens / num_forwards, 2))


def score_groups(
    model: TinyModel, tokenizer: Tokenizer, num_questions: int, seed: int
) -> dict[str, dict[str, Score]]:
    """Score each group of held-out questions under each decoding rule."""
    examples = {group: draw_held_out(group, num_questions, seed) for group in SCORED_GROUPS}
    return {
        rule: {group: score(model, tokenizer, examples[group], threshold) for group in SCORED_GROUPS}
        for rule, threshold in DECODING_RULES.items()
    }
