"""Tokenizers read from their file alone: tokens, texts and prompts as through transformers, or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.models.folder import ZOO, embedded_models
from sfumato.text.plain_tokenizer import PlainTokenizer
from sfumato.text.tokenizer import ThroughTransformers, Tokenizer

MODEL = ZOO / "sfumato-tiny-sdar"
PLAIN = {name: PlainTokenizer.read(ZOO / name) for name in embedded_models()}
THROUGH = {name: ThroughTransformers(ZOO / name) for name in embedded_models()}
TEXTS = st.lists(
    st.sampled_from(
        ["<|end|>", "<|user|>", "<|mask|>", " ", "  ", "\n", " ,", " n't", "Köln", "日本", "12+7="]
    )
    | st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12),
    max_size=8,
).map("".join)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXTS}),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", embedded_models())
@settings(max_examples=100, deadline=None)
@given(text=TEXTS, messages=MESSAGES, data=st.data())
def test_tokens_texts_and_prompts_are_those_of_transformers(
    name: str, text: str, messages: list[dict[str, Any]], data: st.DataObject
) -> None:
    plain, through = PLAIN[name], THROUGH[name]
    assert plain is not None
    assert len(plain) == len(through)
    for adds in (True, False):
        assert plain.encode(text, add_special_tokens=adds) == through.encode(text, add_special_tokens=adds)
    token_ids = data.draw(st.lists(st.integers(0, len(plain) - 1), max_size=12))
    for skips in (True, False):
        assert plain.decode(token_ids, skip_special_tokens=skips) == through.decode(
            token_ids, skip_special_tokens=skips
        )
    assert plain.chat_template == through.chat_template
    assert plain.render(messages) == through.render(messages)


def test_an_empty_conversation_is_refused_alike() -> None:
    for tokenizer in (PLAIN[MODEL.name], THROUGH[MODEL.name]):
        assert tokenizer is not None
        with pytest.raises(ValueError, match="message"):
            tokenizer.render([])


def changed(folder: Path, **fields: Any) -> Path:
    """Return a copy of a tokenizer with other fields in its configuration; None removes one."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"clean_up_tokenization_spaces": True},
        {"clean_up_tokenization_spaces": None},
        {"add_bos_token": True},
        {"split_special_tokens": True},
        {"bos_token": "<|new|>"},
        {"eos_token": {"content": "<|end|>"}},
        {"additional_special_tokens": ["<|new|>"]},
        {"added_tokens_decoder": {}},
        {"chat_template": [{"name": "default", "template": "x"}]},
        {"chat_template": "{{ messages | tojson }}"},
        {"chat_template": "{% if tools %}x{% endif %}"},
        {"chat_template": "{{ strftime_now('%Y') }}"},
        {"chat_template": "{{ messages[0].reasoning_content }}"},
        {"chat_template": "{% for message in messages %}{{ loop.index }}{% endfor %}"},
        {"chat_template": "{% generation %}x{% endgeneration %}"},
    ],
)
def test_what_says_more_is_left_to_transformers(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert PlainTokenizer.read(changed(tmp_path)) is not None
    assert PlainTokenizer.read(changed(tmp_path, **fields)) is None


def test_files_beside_it_are_left_to_transformers(tmp_path: Path) -> None:
    folder = changed(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert PlainTokenizer.read(folder) is None
    tokenizer = Tokenizer(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "12"}]) == tokenizer.encode("12")


def test_templates_keep_and_drop_the_same_white_space(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}\n{% if add_generation_prompt %}\n  {{ eos_token }}{% endif %}\n"
    folder = changed(tmp_path, chat_template=template)
    plain = PlainTokenizer.read(folder)
    assert plain is not None
    messages = [{"role": "user", "content": "a", "name": None}]
    assert plain.render(messages) == ThroughTransformers(folder).render(messages)
