"""What an algorithm keeps within a block, as bytes and back: plain values, tuples of them, and tensors."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from sfumato.errors import EngineError

_TENSOR = 1


class _Tensor(msgspec.Struct, frozen=True, array_like=True):
    """A tensor's dtype by name, its shape, its content."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


def encode_state(state: Any) -> bytes:
    """Return a state as msgpack. Raises EngineError for what is neither plain nor a tensor."""
    try:
        return msgspec.msgpack.encode(_marked(state), enc_hook=_encode)
    except (TypeError, NotImplementedError) as error:
        raise EngineError(f"a state of type {type(state).__name__} cannot leave its process") from error


def decode_state(content: bytes) -> Any:
    """Return what was encoded."""
    return _unmarked(msgspec.msgpack.decode(content, ext_hook=_decode))


def _marked(state: Any) -> Any:
    """Tell tuples from lists, which msgpack does not."""
    if isinstance(state, tuple):
        return {"tuple": [_marked(each) for each in state]}
    if isinstance(state, list):
        return [_marked(each) for each in state]
    if state is None or isinstance(state, bool | int | float | str | Tensor):
        return state
    raise NotImplementedError


def _unmarked(state: Any) -> Any:
    if isinstance(state, dict):
        return tuple(_unmarked(each) for each in state["tuple"])
    return [_unmarked(each) for each in state] if isinstance(state, list) else state


def _encode(value: Any) -> msgspec.msgpack.Ext:
    raw = value.detach().cpu().contiguous()
    content = raw.flatten().view(torch.uint8).numpy().tobytes()
    found = _Tensor(str(raw.dtype).removeprefix("torch."), tuple(raw.shape), content)
    return msgspec.msgpack.Ext(_TENSOR, msgspec.msgpack.encode(found))


def _decode(code: int, content: memoryview) -> Tensor:
    if code != _TENSOR:
        raise EngineError(f"a state with an unknown part of type {code}")
    found = msgspec.msgpack.decode(bytes(content), type=_Tensor)
    tensor = torch.empty(found.shape, dtype=getattr(torch, found.dtype))
    if found.content:
        raw = torch.from_numpy(np.frombuffer(found.content, dtype=np.uint8).copy())
        tensor.copy_(raw.view(tensor.dtype).view(found.shape))
    return tensor
