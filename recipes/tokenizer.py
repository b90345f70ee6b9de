"""Own the byte-level BPE tokenizer and the chat form of the tiny models."""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from recipes.data import WORDS, draw_training_example

SPECIAL_TOKENS = ("<|pad|>", "<|mask|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
PAD_ID, MASK_ID, END_ID = 0, 1, 2
VOCAB_SIZE = 720
NUM_TRAINING_TEXTS = 20_000
MODEL_MAX_LENGTH = 512

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(path: Path) -> None:
    """Learn the vocabulary from generated examples and write tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    random_source = random.Random("tokenizer")
    examples = [draw_training_example(random_source) for _ in range(NUM_TRAINING_TEXTS)]
    texts = [text for example in examples for text in (example.question, example.answer)]
    # Sorting hardly ever puts a late word first, so without these its first-word form would be cut in pieces.
    texts += [form for word in WORDS for form in (word, f" {word}")] * 100
    tokenizer.train_from_iterator(texts, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def load_tokenizer(path: Path) -> Tokenizer:
    """Load tokenizer.json, learning it first where it does not exist."""
    if not path.exists():
        train_tokenizer(path)
    return Tokenizer.from_file(str(path))


def render_chat(messages: list[dict[str, str]]) -> str:
    """Render messages as CHAT_TEMPLATE does with add_generation_prompt."""
    turns = "".join(f"<|{message['role']}|>{message['content']}<|end|>" for message in messages)
    return f"{turns}<|assistant|>"


def write_tokenizer_config(path: Path) -> None:
    """Write tokenizer_config.json for Hugging Face's fast-tokenizer class."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {
            str(token_id): {"content": token, **flags} for token_id, token in enumerate(SPECIAL_TOKENS)
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[3:]),
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL_TOKENS[END_ID],
        "mask_token": SPECIAL_TOKENS[MASK_ID],
        "model_max_length": MODEL_MAX_LENGTH,
        "pad_token": SPECIAL_TOKENS[PAD_ID],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    path.write_text(json.dumps(config, indent=2) + "\n")
