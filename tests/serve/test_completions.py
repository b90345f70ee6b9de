"""/v1/completions: texts, token ids, lists of both, and a model without a tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.serve.running import BARE, SDAR

PROMPT = "12+7="


def complete(client: OpenAI, prompt: Any = PROMPT, model: str = SDAR, **fields: Any) -> Any:
    extra = {"ignore_eos": True, "return_token_ids": True, **fields.pop("extra_body", {})}
    return client.completions.create(
        model=model, prompt=prompt, extra_body=extra, **{"max_tokens": 8, **fields}
    )


def test_text_and_its_token_ids_are_the_same_prompt(client: OpenAI) -> None:
    tokens = client.post("/../tokenize", body={"model": SDAR, "prompt": PROMPT}, cast_to=dict[str, Any])[
        "tokens"
    ]
    by_text, by_ids = complete(client), complete(client, tokens)
    assert by_text.object == "text_completion"
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert by_text.choices[0].token_ids == by_ids.choices[0].token_ids
    assert by_text.usage.prompt_tokens == by_ids.usage.prompt_tokens == len(tokens)
    assert by_text.choices[0].finish_reason == "length"


def test_lists_of_prompts_keep_their_order(client: OpenAI) -> None:
    alone = [complete(client, prompt) for prompt in (PROMPT, "sort: b a c")]
    together = complete(client, [PROMPT, "sort: b a c"])
    assert [choice.index for choice in together.choices] == [0, 1]
    for choice, single in zip(together.choices, alone, strict=True):
        assert choice.text == single.choices[0].text
    assert together.usage.prompt_tokens == sum(single.usage.prompt_tokens for single in alone)
    assert together.usage.completion_tokens == 16
    ids = complete(client, [[5, 6, 7], [8, 9]], n=2, seed=4, temperature=1.5)
    assert [choice.index for choice in ids.choices] == [0, 1, 2, 3]
    assert ids.usage.prompt_tokens == 5
    assert ids.usage.completion_tokens == 32
    second = complete(client, [8, 9], n=2, seed=4, temperature=1.5)
    assert [choice.text for choice in second.choices] == [choice.text for choice in ids.choices[2:]]


def test_a_stream_carries_every_choice(client: OpenAI) -> None:
    whole = complete(client, [PROMPT, "sort: b a"], n=2, seed=1, temperature=1.0)
    with complete(
        client,
        [PROMPT, "sort: b a"],
        n=2,
        seed=1,
        temperature=1.0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    for choice in whole.choices:
        parts = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts if part.finish_reason] == ["length"]
    assert chunks[-1].usage.completion_tokens == 32


def test_logprobs_line_up_with_the_text(client: OpenAI) -> None:
    fields = {"temperature": 1.0, "seed": 2, "max_tokens": 20, "extra_body": {"ignore_eos": False}}
    choice = complete(client, logprobs=2, **fields).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert 1 <= len(top) <= 3
        assert top[token] == pytest.approx(logprob, abs=1e-4)


def test_echo_repeats_the_prompt(client: OpenAI) -> None:
    plain, echoed = complete(client), complete(client, echo=True)
    assert echoed.choices[0].text == PROMPT + plain.choices[0].text
    # The mask token's own text is a prompt like any other.
    masked = complete(client, [5, 1, 6], echo=True)
    assert "<|mask|>" in masked.choices[0].text
    with complete(client, echo=True, stream=True) as stream:
        assert "".join(choice.text for chunk in stream for choice in chunk.choices) == echoed.choices[0].text


def test_stop_token_ids_end_the_text(client: OpenAI) -> None:
    free = complete(client, max_tokens=16, temperature=1.0, seed=8).choices[0].token_ids
    stopped = complete(
        client, max_tokens=16, temperature=1.0, seed=8, extra_body={"stop_token_ids": [free[5]]}
    )
    assert stopped.choices[0].token_ids == free[: free.index(free[5]) + 1]
    assert stopped.choices[0].finish_reason == "stop"


def test_a_second_request_finds_the_prompt_in_the_cache(client: OpenAI) -> None:
    prompt = [7] * 40 + [8] * 9
    first, second = complete(client, prompt), complete(client, prompt)
    assert first.choices[0].token_ids == second.choices[0].token_ids
    assert second.usage.cached_tokens == 48
    assert second.usage.prompt_tokens_details.cached_tokens == 48
    assert second.usage.nfe < first.usage.nfe


def test_a_model_without_a_tokenizer_serves_token_ids(client: OpenAI) -> None:
    answer = client.completions.create(model=BARE, prompt=[5, 6, 7], max_tokens=8, logprobs=1)
    choice: Any = answer.choices[0]
    assert choice.text == ""
    assert 1 <= len(choice.token_ids) <= 8
    assert choice.logprobs.tokens == [f"token_id:{token}" for token in choice.token_ids]
    with client.completions.create(model=BARE, prompt=[5, 6, 7], max_tokens=8, stream=True) as stream:
        streamed = [token for chunk in stream for each in chunk.choices for token in each.token_ids or []]
    assert streamed == choice.token_ids
    for refused in (
        lambda: client.completions.create(model=BARE, prompt="text"),
        lambda: client.completions.create(model=BARE, prompt=[5], stop="x"),
        lambda: client.chat.completions.create(model=BARE, messages=[{"role": "user", "content": "hi"}]),
    ):
        with pytest.raises(BadRequestError, match=r"no tokenizer|none"):
            refused()
