"""Own the tokenizer: a CLIP tokenizer whose byte-pair merges make every word of the prompts one token."""

import json
from pathlib import Path

from recipes.image.wording import WORDS

START, END = "<|startoftext|>", "<|endoftext|>"
# The longest prompt has 16 words, with start and end.
MODEL_MAX_LENGTH = 18
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_END_OF_WORD = "</w>"


def build_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return token ids and merges; the end token has the highest id, as CLIP's pooling once required."""
    merges: list[tuple[str, str]] = []
    tokens = [*_LETTERS, *(letter + _END_OF_WORD for letter in _LETTERS)]
    for word in WORDS:
        parts = _apply(merges, [*word[:-1], word[-1] + _END_OF_WORD])
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            tokens.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    tokens += [START, END]
    return {token: token_id for token_id, token in enumerate(dict.fromkeys(tokens))}, merges


def _apply(merges: list[tuple[str, str]], parts: list[str]) -> list[str]:
    for left, right in merges:
        position = 0
        while position < len(parts) - 1:
            if (parts[position], parts[position + 1]) == (left, right):
                parts = [*parts[:position], left + right, *parts[position + 2 :]]
            position += 1
    return parts


class PromptTokens:
    """Token ids of known words, without the tokenizer's cost per call."""

    def __init__(self) -> None:
        vocabulary, _ = build_vocabulary()
        self.size = len(vocabulary)
        self.start_id, self.end_id = vocabulary[START], vocabulary[END]
        self.word_ids = {word: vocabulary[word + _END_OF_WORD] for word in WORDS}

    def encode(self, prompt: str) -> list[int]:
        """Return MODEL_MAX_LENGTH ids, padded with the end token as CLIP does."""
        ids = [self.start_id, *(self.word_ids[word] for word in prompt.split())][: MODEL_MAX_LENGTH - 1]
        return ids + [self.end_id] * (MODEL_MAX_LENGTH - len(ids))


def save_tokenizer(folder: Path) -> None:
    """Write the folder that `CLIPTokenizer.from_pretrained` and `AutoTokenizer` read."""
    from transformers import CLIPTokenizer

    vocabulary, merges = build_vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MODEL_MAX_LENGTH)
    tokenizer.save_pretrained(folder)
    # Older readers of CLIP's byte-pair files look for these two.
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
