"""Random prompts of a given length, and prompts of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfumato.errors import ConfigError
from sfumato.evaluation.load.prompts import Length, Workload, find_tokenizer
from sfumato.models.folder import ZOO, embedded_models


@pytest.mark.parametrize("model", embedded_models())
def test_random_prompts_have_their_length_in_tokens(model: str) -> None:
    tokenizer = find_tokenizer(None, model)
    assert tokenizer is not None
    workload = Workload(
        input_length=Length(mean=40, spread=0.5), output_length=Length(mean=8, spread=0.25), prefix_len=16
    )
    prompts = workload.prompts(20, tokenizer=tokenizer, seed=3)
    assert prompts == workload.prompts(20, tokenizer=tokenizer, seed=3)
    assert prompts != workload.prompts(20, tokenizer=tokenizer, seed=4)
    counts = [len(tokenizer.encode(str(each.content), add_special_tokens=False)) for each in prompts]
    # Where two texts meet a token may be lost.
    assert all(16 + 20 - 1 <= count <= 16 + 60 for count in counts)
    assert len(set(counts)) > 5
    assert {each.max_tokens for each in prompts} <= set(range(6, 11))
    texts = [str(each.content) for each in prompts]
    assert len(set(texts)) == 20
    assert len({text[:24] for text in texts}) == 1


def test_without_a_tokenizer_words_are_counted() -> None:
    prompts = Workload(input_length=Length(mean=12), prefix_len=3).prompts(5, tokenizer=None, seed=0)
    assert {len(str(each.content).split()) for each in prompts} == {15}
    assert {each.max_tokens for each in prompts} == {None}


def test_a_tokenizer_is_found_where_it_is() -> None:
    assert find_tokenizer(None, "somebody-elses") is None
    assert find_tokenizer("sfumato-tiny-sdar", "somebody-elses") is not None
    assert find_tokenizer(str(ZOO / "sfumato-tiny-llada"), "somebody-elses") is not None
    with pytest.raises(ConfigError, match="--tokenizer 'nowhere' is neither"):
        find_tokenizer("nowhere", "sfumato-tiny-sdar")


def test_a_file_is_asked_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "c"}]
    lines = [{"prompt": "a", "max_tokens": 3}, {"question": "b", "answer": "x"}, {"messages": messages}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    workload = Workload(dataset=str(path), output_length=Length(mean=5))
    prompts = workload.prompts(4, tokenizer=None, seed=0)
    assert [each.content for each in prompts] == ["a", "b", messages, "a"]
    assert [each.max_tokens for each in prompts] == [3, 5, 5, 3]
    with_prefix = Workload(dataset=str(path), prefix_len=2).prompts(3, tokenizer=None, seed=0)
    assert str(with_prefix[0].content).split()[2:] == ["a"]
    assert [message["role"] for message in with_prefix[2].content if isinstance(message, dict)] == [
        "system",
        "user",
    ]


def test_an_embedded_task_is_a_dataset() -> None:
    prompts = Workload(dataset="word-problems").prompts(3, tokenizer=None, seed=0)
    assert len({str(each.content) for each in prompts}) == 3


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "no prompt in it"),
        ("[]", "line 1: not a JSON object"),
        ('{"text": "a"}', "exactly one of the fields prompt, question, messages"),
        ('{"prompt": "a", "question": "b"}', "exactly one of the fields"),
        ('{"prompt": 3}', "'prompt'"),
        ('{"prompt": ""}', "'prompt' must not be empty"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens at least 1"),
    ],
)
def test_a_wrong_file_names_line_and_field(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=r"prompts\.jsonl") as caught:
        Workload(dataset=str(path)).prompts(1, tokenizer=None, seed=0)
    assert reason in str(caught.value)
