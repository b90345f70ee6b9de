"""Which models can fill gaps, and what is pinned around them."""

from __future__ import annotations

import msgspec

from sfumato.core.traits import ModelTraits
from sfumato.engine.frontend import SamplingParams
from sfumato.errors import NotSupported, RequestError

# What OpenAI makes behind a prompt that says nothing of its length.
DEFAULT_GAP = 16
# The strongest bias that a request may give.
_NEVER = -100.0


def why_no_infill(traits: ModelTraits) -> str | None:
    """Return why a model cannot fill gaps, or None if it can."""
    if traits.has_exact_cache:
        return (
            f"its attention is {traits.visibility.value}: a block sees what stands before it, and nothing of "
            "what follows, so a gap could not be fitted to the text behind it"
        )
    if not traits.has_mask_token:
        return "it has no mask token that a gap could be made of"
    return None


def check_infill(name: str, traits: ModelTraits, field: str) -> None:
    """Raise NotSupported, naming the field that asks for it, for a model that cannot fill gaps."""
    reason = why_no_infill(traits)
    if reason is not None:
        raise NotSupported(f"model {name!r} cannot fill gaps: {reason}", field=field)


def check_room(name: str, traits: ModelTraits, num_tokens: int, field: str) -> None:
    """Raise RequestError where what is given and the longest gaps are more than the context."""
    if num_tokens > traits.context_length:
        raise RequestError(
            f"what is given and the gaps have {num_tokens} tokens, the context of {name!r} "
            f"{traits.context_length}",
            field=field,
            value=num_tokens,
            limit=traits.context_length,
        )


def without_ends(params: SamplingParams, traits: ModelTraits) -> SamplingParams:
    """Return parameters under which a gap is filled to its last token: end tokens are never chosen."""
    biases = dict.fromkeys(traits.eos_token_ids, _NEVER) | params.logit_bias
    return msgspec.structs.replace(params, ignore_eos=True, logit_bias=biases)
