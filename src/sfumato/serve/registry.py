"""The served models by name: each has an engine, perhaps a tokenizer, and what the APIs say of it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec

import sfumato
from sfumato.core.traits import ImageTraits, ModelTraits
from sfumato.engine.engines import Engines
from sfumato.errors import RequestError
from sfumato.serve.errors import ApiError
from sfumato.text.tokenizer import Tokenizer

_Result = TypeVar("_Result")

# What each kind of model does, and where it is asked.
_ENDPOINTS = {
    "text": ("writes text", "/v1/chat/completions"),
    "image": ("draws images", "/v1/images/generations"),
    "video": ("makes videos", "/v1/videos"),
}


class ServedModel:
    """One model under its served name.

    Texts are tokenised in a thread of the model's own, one after the other: the event loop goes on, and the
    tokenizer, which is not safe to share while it encodes, is never entered twice.
    """

    def __init__(self, name: str, client: Engines) -> None:
        info = client.info
        self.name = name
        self.client = client
        self.tokenizer = Tokenizer(Path(info.path)) if info.has_tokenizer else None
        self.created = int(time.time())
        self.fingerprint = f"sfumato-{sfumato.__version__}-{_digest(client)}"
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self._pieces: dict[int, str] = {}

    @property
    def makes(self) -> str:
        """Return what comes out of it: "text", "image" or "video"."""
        traits = self.client.info.traits
        if isinstance(traits, ModelTraits):
            return "text"
        return "video" if traits.is_video else "image"

    @property
    def traits(self) -> ModelTraits:
        """Return what a language model declares. Raises ApiError for another one."""
        traits = self.client.info.traits
        if isinstance(traits, ModelTraits):
            return traits
        raise self.wrong_endpoint()

    @property
    def image_traits(self) -> ImageTraits:
        """Return what an image or video model declares. Raises ApiError for a language model."""
        traits = self.client.info.traits
        if isinstance(traits, ImageTraits):
            return traits
        raise self.wrong_endpoint()

    def wrong_endpoint(self) -> ApiError:
        """Return the error for a request that this kind of model cannot answer: says who can be asked."""
        does, endpoint = _ENDPOINTS[self.makes]
        return ApiError(
            400,
            f"The model {self.name!r} {does}; ask {endpoint}",
            kind="invalid_request_error",
            param="model",
            code="model_not_supported",
        )

    def need_tokenizer(self, field: str) -> Tokenizer:
        """Return the tokenizer. Raises RequestError naming the field, ApiError for an image model."""
        if self.makes != "text":
            raise self.wrong_endpoint()
        if self.tokenizer is None:
            raise RequestError(
                f"model {self.name!r} has no tokenizer; send token ids to /v1/completions", field=field
            )
        return self.tokenizer

    async def encode(self, prompt: str | list[int], *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of one prompt."""
        if not isinstance(prompt, str):
            return prompt
        tokenizer = self.need_tokenizer("prompt")
        return await self._in_thread(lambda: tokenizer.encode(prompt, add_special_tokens=add_special_tokens))

    async def encode_chat(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Return the prompt of a conversation through the chat template."""
        tokenizer = self.need_tokenizer("messages")
        return await self._in_thread(lambda: tokenizer.apply_chat_template(messages, tools))

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        self.check_ids("tokens", token_ids)
        tokenizer = self.need_tokenizer("tokens")
        return await self._in_thread(lambda: tokenizer.decode(token_ids, skip_special_tokens=False))

    def check_ids(self, field: str, token_ids: Sequence[int]) -> None:
        """Raise RequestError for ids outside the vocabulary."""
        vocab_size = self.traits.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"{field} has token id {token_id}, outside the vocabulary of {vocab_size}", field=field
                )

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def piece(self, token_id: int) -> str:
        """Return the text of one token; without a tokenizer its number."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = f"token_id:{token_id}" if self.tokenizer is None else self.tokenizer.piece(token_id)
            self._pieces[token_id] = piece
        return piece

    async def close(self) -> None:
        """End the engine and the tokenizer's thread."""
        self._worker.shutdown(wait=False)
        await self.client.close()


class Registry:
    """All served models, and whether the server still takes requests."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self.models = {model.name: model for model in models}
        self.is_draining = False

    def find(self, name: str) -> ServedModel:
        """Return a model by its served name. Raises ApiError 404."""
        model = self.models.get(name)
        if model is None:
            served = ", ".join(self.models)
            raise ApiError(
                404,
                f"The model {name!r} does not exist here (served: {served})",
                kind="invalid_request_error",
                param="model",
                code="model_not_found",
            )
        return model

    def find_maker(self, name: str | None, makes: str) -> ServedModel:
        """Return a model that makes images or videos: by name, or the first. Raises ApiError."""
        able = [model for model in self.models.values() if model.makes == makes]
        if name is not None:
            model = self.find(name)
            if model not in able:
                raise model.wrong_endpoint()
            return model
        if not able:
            raise ApiError(
                404,
                f"no model for {makes}s is served here (served: {', '.join(self.models)})",
                kind="invalid_request_error",
                param="model",
                code="model_not_found",
            )
        return able[0]

    def find_or_first(self, name: str | None) -> ServedModel:
        """Return a model by name, or the first where none is named."""
        return next(iter(self.models.values())) if name is None else self.find(name)


def _digest(client: Engines) -> str:
    """Return a short stable name for what decides this model's answers."""
    info = client.info
    content = msgspec.json.encode([info.name, info.traits, info.num_parameters, info.dtype, info.device])
    return hashlib.sha256(content).hexdigest()[:10]
