"""A load of mixed requests against a deployment, and what each of them must answer."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from sfumato.config import EngineConfig
from sfumato.engine.engine import Engine
from sfumato.engine.frontend import SamplingParams

TEXT_MODELS = ("sfumato-tiny-sdar", "sfumato-tiny-llada", "sfumato-tiny-llada-fast")
IMAGE_MODEL = "sfumato-tiny-image"
NUM_PROMPTS, MAX_TOKENS = 12, 96


@dataclass(frozen=True, slots=True)
class Ask:
    """One request; key: which answer it must have."""

    key: tuple[str, int]
    path: str
    body: dict[str, Any]
    is_stream: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got: tokens, text and reason, or the picture; and how long it took."""

    content: tuple[Any, ...]
    seconds: float
    longest_pause: float


def prompt(model: str, number: int) -> list[int]:
    """Return a prompt of token ids; those of one third share a long beginning."""
    shared = [5 + (number % 3 * 13 + place * 7) % 190 for place in range(64)] if number % 2 else []
    return [*shared, *(5 + (number * 31 + place * 11 + len(model)) % 190 for place in range(9 + number))]


def text_params(number: int) -> dict[str, Any]:
    """Return what a text request asks for."""
    return {
        "max_tokens": MAX_TOKENS - 8 * (number % 4),
        "seed": number,
        "temperature": 0.8 if number % 3 == 2 else 0.0,
        "ignore_eos": True,
    }


def ask(model: str, number: int, *, is_stream: bool) -> Ask:
    """Return one request."""
    if model == IMAGE_MODEL:
        body: dict[str, Any] = {"model": model, "prompt": f"a red circle {number}", "seed": number}
        return Ask((model, number), "/v1/images/generations", {**body, "response_format": "b64_json"}, False)
    body = {"model": model, "prompt": prompt(model, number), "return_token_ids": True, **text_params(number)}
    if is_stream:
        body["stream"] = True
    return Ask((model, number), "/v1/completions", body, is_stream)


def mixed(num_streams: int, num_plain: int, *, num_images: int = 0, seed: int = 0) -> list[Ask]:
    """Return streaming and plain requests in a random order; of the plain ones some are pictures."""
    rng = random.Random(seed)
    texts = lambda is_stream, count: [
        ask(rng.choice(TEXT_MODELS), rng.randrange(NUM_PROMPTS), is_stream=is_stream) for _ in range(count)
    ]
    pictures = [ask(IMAGE_MODEL, rng.randrange(4), is_stream=False) for _ in range(num_images)]
    found = texts(True, num_streams) + texts(False, num_plain - num_images) + pictures
    rng.shuffle(found)
    return found


def expected_texts(model: str) -> dict[tuple[str, int], tuple[Any, ...]]:
    """Return the answers of one engine in this process, to every prompt of a model."""
    config = EngineConfig(model=model, dtype="float32", num_threads=1, kv_memory=64 << 20)
    engine = Engine.load(config)
    found: dict[tuple[str, int], tuple[Any, ...]] = {}
    for number in range(NUM_PROMPTS):
        choice = engine.generate([prompt(model, number)], SamplingParams(**text_params(number)))[0]
        found[model, number] = (tuple(choice.token_ids), choice.text, str(choice.finish_reason))
    return found


def settings(model: str, **others: Any) -> dict[str, Any]:
    """Return how a model is deployed for these requests."""
    common = {"dtype": "float32", "threads": 1, **others}
    return common | ({"deterministic-rows": 4} if model == IMAGE_MODEL else {"kv-memory": "64M"})


async def send_all(
    url: str,
    asks: Sequence[Ask],
    *,
    concurrency: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Answer | str]:
    """Send all requests, so many at a time; return answers in their order, or what went wrong."""
    room = asyncio.Semaphore(concurrency)
    done = 0
    limits = httpx.Limits(max_connections=concurrency)

    async def one(http: httpx.AsyncClient, each: Ask) -> Answer | str:
        nonlocal done
        async with room:
            try:
                found: Answer | str = await (_stream if each.is_stream else _plain)(http, each)
            except (httpx.HTTPError, AssertionError, KeyError, ValueError) as error:
                found = f"{each.key} stream={each.is_stream}: {type(error).__name__}: {error}"
            done += 1
            on_progress(done)
            return found

    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        return list(await asyncio.gather(*(one(http, each) for each in asks)))


async def _plain(http: httpx.AsyncClient, each: Ask) -> Answer:
    loop = asyncio.get_running_loop()
    started = loop.time()
    answer = await http.post(each.path, json=each.body)
    assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
    seconds = loop.time() - started
    content = answer.json()
    if each.key[0] == IMAGE_MODEL:
        picture = base64.b64decode(content["data"][0]["b64_json"])
        return Answer((_pixels(picture),), seconds, seconds)
    choice = content["choices"][0]
    return Answer((tuple(choice["token_ids"]), choice["text"], choice["finish_reason"]), seconds, seconds)


async def _stream(http: httpx.AsyncClient, each: Ask) -> Answer:
    loop = asyncio.get_running_loop()
    started = last = loop.time()
    tokens: list[int] = []
    text, reason, pause = "", None, 0.0
    async with http.stream("POST", each.path, json=each.body) as answer:
        assert answer.status_code == 200, f"{answer.status_code} {await answer.aread()!r}"
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            now = loop.time()
            pause, last = max(pause, now - last), now
            for choice in event["choices"]:
                assert reason is None, "something came behind the end"
                tokens += choice["token_ids"]
                text += choice["text"]
                reason = choice["finish_reason"]
    return Answer((tuple(tokens), text, reason), loop.time() - started, pause)


def _pixels(picture: bytes) -> bytes:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(picture)).tobytes()


def wrong(
    asks: Sequence[Ask], answers: Sequence[Answer | str], right: dict[Any, tuple[Any, ...]]
) -> list[str]:
    """Return what is lost, doubled or different."""
    found = []
    for each, answer in zip(asks, answers, strict=True):
        if isinstance(answer, str):
            found.append(answer)
        elif answer.content != right[each.key]:
            found.append(
                f"{each.key} stream={each.is_stream}: {answer.content!r:.200} is not {right[each.key]!r:.200}"
            )
    return found
