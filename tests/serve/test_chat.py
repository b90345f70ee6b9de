"""/v1/chat/completions with the official client."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.serve.running import KEY, LLADA, SDAR, SLOW, Server

MESSAGES: list[Any] = [{"role": "user", "content": "Mia, 34, nurse in Oslo"}]


def ask(client: OpenAI, model: str = SDAR, **fields: Any) -> Any:
    return client.chat.completions.create(model=model, messages=MESSAGES, **{"max_tokens": 24, **fields})


def text_of(chunks: list[Any], index: int = 0) -> str:
    return "".join(
        choice.delta.content or "" for chunk in chunks for choice in chunk.choices if choice.index == index
    )


@pytest.mark.parametrize("model", [SDAR, LLADA])
def test_an_answer_says_what_it_cost(client: OpenAI, model: str) -> None:
    answer = ask(client, model, extra_body={"ignore_eos": True})
    assert answer.object == "chat.completion"
    assert answer.model == model
    assert answer.system_fingerprint.startswith("sfumato-")
    (choice,) = answer.choices
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    assert choice.logprobs is None
    usage = answer.usage
    assert usage.completion_tokens == 24
    assert usage.total_tokens == usage.prompt_tokens + 24
    assert usage.prompt_tokens_details.cached_tokens == usage.cached_tokens
    assert 1 <= usage.denoise_steps <= usage.nfe <= 40
    assert usage.tokens_per_forward == pytest.approx(24 / usage.nfe, abs=1e-3)


@pytest.mark.parametrize("model", [SDAR, LLADA])
def test_a_stream_is_the_same_answer(client: OpenAI, model: str) -> None:
    answer = ask(client, model, seed=3, temperature=0.7)
    options = {"include_usage": True}
    with ask(client, model, seed=3, temperature=0.7, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert text_of(chunks) == answer.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


def test_a_stream_has_openais_form_byte_for_byte(server: Server) -> None:
    body = {"model": SDAR, "messages": MESSAGES, "max_tokens": 4, "stream": True}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert '"usage"' not in answer.text


def test_a_seed_repeats_and_a_missing_one_is_reported(client: OpenAI) -> None:
    drawn = ask(client, temperature=1.5, extra_body={"return_token_ids": True, "ignore_eos": True})
    again = ask(
        client, temperature=1.5, seed=drawn.seed, extra_body={"return_token_ids": True, "ignore_eos": True}
    )
    assert again.seed == drawn.seed
    assert again.choices[0].token_ids == drawn.choices[0].token_ids
    assert len(drawn.choices[0].token_ids) == 24
    other = ask(client, temperature=1.5, extra_body={"return_token_ids": True, "ignore_eos": True})
    assert other.seed != drawn.seed


def test_choices_share_a_seed_and_differ(client: OpenAI) -> None:
    fields = {"temperature": 50.0, "seed": 7, "extra_body": {"ignore_eos": True}}
    answer = ask(client, n=4, **fields)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    alone = ask(client, **fields)
    assert alone.choices[0].message.content == texts[0]
    assert answer.usage.completion_tokens == 4 * 24
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
    with ask(client, n=4, stream=True, **fields) as stream:
        chunks = list(stream)
    assert [text_of(chunks, index) for index in range(4)] == texts


def test_logprobs_spell_the_text(client: OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3, temperature=0.5, seed=1)
    choice = answer.choices[0]
    content = choice.logprobs.content
    assert "".join(entry.token for entry in content) == choice.message.content
    for entry in content:
        assert bytes(entry.bytes).decode() == entry.token
        assert -9999.0 <= entry.logprob <= 0.0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[2].logprob
    with ask(client, logprobs=True, temperature=0.5, seed=1, stream=True) as stream:
        streamed = [
            entry.token
            for chunk in stream
            for each in chunk.choices
            if each.logprobs is not None
            for entry in each.logprobs.content
        ]
    assert streamed == [entry.token for entry in content]


def test_a_stop_string_ends_the_text_and_the_request(server: Server, client: OpenAI) -> None:
    fields = {"temperature": 1.0, "seed": 11, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    whole = ask(client, **fields).choices[0].message.content
    stop = whole[len(whole) // 3 : len(whole) // 3 + 3]
    cut = ask(client, stop=["never to be seen", stop], logprobs=True, **fields)
    choice = cut.choices[0]
    assert choice.message.content == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    assert cut.usage.completion_tokens < 200
    assert "".join(entry.token for entry in choice.logprobs.content).startswith(choice.message.content)
    with ask(client, stop=stop, stream=True, **fields) as stream:
        assert text_of(list(stream)) == choice.message.content
    assert server.wait_for("sfumato_running_requests", SDAR, 0)


def test_empty_lists_nulls_and_zeros_are_legal(client: OpenAI) -> None:
    answer = ask(client, stop=[], temperature=0, seed=0, logit_bias={}, n=None, top_p=None)
    assert answer.seed == 0


def test_a_bias_bans_and_forces_tokens(client: OpenAI) -> None:
    fields = {"extra_body": {"return_token_ids": True, "ignore_eos": True}, "max_tokens": 8}
    first = ask(client, **fields).choices[0].token_ids[0]
    banned = ask(client, logit_bias={str(first): -100}, **fields).choices[0].token_ids
    assert first not in banned
    forced = ask(client, logit_bias={"40": 100}, **fields).choices[0].token_ids
    assert set(forced) == {40}


def test_each_algorithm_runs_with_its_parameters(client: OpenAI) -> None:
    steps = {}
    for threshold in (0.0, 2.0):
        extra = {**SLOW, "algorithm_parameters": {"threshold": threshold}, "block_length": 32}
        steps[threshold] = ask(client, LLADA, max_tokens=32, extra_body=extra).usage.denoise_steps
    assert steps[2.0] == 32
    assert steps[0.0] < 32
    fewer = {"algorithm": "llada", "algorithm_parameters": {"steps": 8}, "block_length": 32}
    assert ask(client, LLADA, max_tokens=32, extra_body=fewer).usage.denoise_steps <= 8


def test_content_parts_and_developer_messages(client: OpenAI) -> None:
    parts: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "sort: b a"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
    ]
    assert client.chat.completions.create(model=SDAR, messages=parts, max_tokens=4).choices


def test_the_canvas_of_every_step(client: OpenAI) -> None:
    options: Any = {"include_canvas": True, "include_usage": True}
    with ask(client, stream=True, stream_options=options, extra_body=SLOW, max_tokens=20) as stream:
        chunks = list(stream)
    canvases = [
        choice.canvas for chunk in chunks for choice in chunk.choices if "canvas" in choice.model_extra
    ]
    assert [canvas["step"] for canvas in canvases] == list(range(1, chunks[-1].usage.denoise_steps + 1))
    for canvas in canvases:
        lengths = {len(canvas[name]) for name in ("token_ids", "tokens", "confidence", "undecided")}
        assert len(lengths) == 1
        assert canvas["start"] >= 0
    assert any(any(canvas["undecided"]) for canvas in canvases)
    with ask(client, extra_body=SLOW, max_tokens=20, stream=True) as stream:
        plain = list(stream)
    assert text_of(plain) == text_of(chunks)
    assert not any("canvas" in choice.model_extra for chunk in plain for choice in chunk.choices)


def test_a_client_that_leaves_frees_its_place(server: Server, client: OpenAI) -> None:
    with ask(client, stream=True, max_tokens=400, extra_body=SLOW) as stream:
        next(iter(stream))
        assert server.wait_for("sfumato_running_requests", SDAR, 1)
    assert server.wait_for("sfumato_running_requests", SDAR, 0, seconds=1)


def test_a_client_that_leaves_before_its_answer_frees_its_place(server: Server) -> None:
    async def leave() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as openai:
            waiting = asyncio.create_task(
                openai.chat.completions.create(model=SDAR, messages=MESSAGES, max_tokens=400, extra_body=SLOW)
            )
            while server.gauge("sfumato_running_requests", SDAR) < 1:
                await asyncio.sleep(0.02)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(leave())
    assert server.wait_for("sfumato_running_requests", SDAR, 0, seconds=1)


def test_64_clients_at_once_get_their_own_answers(server: Server, client: OpenAI) -> None:
    async def one(openai: AsyncOpenAI, index: int) -> str:
        fields: dict[str, Any] = {
            "model": (SDAR, LLADA)[index % 2],
            "messages": MESSAGES,
            "max_tokens": 12,
            "seed": index % 8,
            "temperature": 1.0,
            "extra_body": {"algorithm": ("low_confidence", "fast_dllm")[index % 2]},
        }
        if index % 4 < 2:
            answer = await openai.chat.completions.create(**fields)
            return answer.choices[0].message.content
        async with await openai.chat.completions.create(**fields, stream=True) as stream:
            return "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])

    async def all_of_them() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as openai:
            return await asyncio.gather(*(one(openai, index) for index in range(64)))

    texts = asyncio.run(all_of_them())
    for index in range(8):
        assert len({texts[at] for at in range(index, 64, 8)}) == 1
    assert server.wait_for("sfumato_running_requests", SDAR, 0)
    assert server.wait_for("sfumato_waiting_requests", LLADA, 0)
