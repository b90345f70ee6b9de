"""Names of decoding algorithms, and how a request's parameters become a frozen value."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from typing import Any

from sfumato.core.spec import Decoding
from sfumato.errors import RequestError
from sfumato.text.decoding.protocol import Algorithm

ALGORITHMS: dict[str, str] = {
    "block_refinement": "sfumato.text.decoding.block_refinement:BlockRefinement",
    "d3llm": "sfumato.text.decoding.d3llm:D3LLM",
    "dinfer": "sfumato.text.decoding.dinfer:DInfer",
    "discrete_ddim": "sfumato.text.decoding.discrete_ddim:DiscreteDDIM",
    "dream": "sfumato.text.decoding.dream:Dream",
    "entropy_bound": "sfumato.text.decoding.entropy_bound:EntropyBound",
    "entropy_threshold": "sfumato.text.decoding.entropy_threshold:EntropyThreshold",
    "fast_dllm": "sfumato.text.decoding.fast_dllm:FastDLLM",
    "fast_dllm_dream": "sfumato.text.decoding.fast_dllm_dream:FastDLLMDream",
    "fast_dllm_v2": "sfumato.text.decoding.fast_dllm_v2:FastDLLMV2",
    "joint_threshold": "sfumato.text.decoding.joint_threshold:JointThreshold",
    "joint_threshold_indel": "sfumato.text.decoding.joint_threshold_indel:JointThresholdInDel",
    "llada": "sfumato.text.decoding.llada:LLaDA",
    "low_confidence": "sfumato.text.decoding.low_confidence:LowConfidence",
    "sdar": "sfumato.text.decoding.sdar:SDAR",
    "uniform_refinement": "sfumato.text.decoding.uniform_refinement:UniformRefinement",
}


def algorithm_class(name: str) -> Any:
    """Return the class behind a name. Raises RequestError listing the names."""
    if name not in ALGORITHMS:
        raise RequestError(
            f"algorithm {name!r} does not exist; choose one of {', '.join(sorted(ALGORITHMS))}",
            field="algorithm",
            value=name,
            limit=sorted(ALGORITHMS),
        )
    module, _, attribute = ALGORITHMS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def make_algorithm(decoding: Decoding) -> Algorithm:
    """Build an algorithm from its parameters. Raises RequestError naming the parameter and its range."""
    made = algorithm_class(decoding.algorithm)
    fields = {field.name: field for field in dataclasses.fields(made) if field.metadata.get("is_public")}
    for name, value in decoding.parameters.items():
        if name not in fields:
            raise RequestError(
                f"algorithm {decoding.algorithm!r} has no parameter {name!r}; it has {', '.join(fields)}",
                field=f"algorithm_parameters.{name}",
                value=value,
                limit=sorted(fields),
            )
        _check_value(name, value, fields[name])
    algorithm: Algorithm = made(**decoding.parameters)
    return algorithm


def describe(name: str) -> list[dict[str, Any]]:
    """Return the parameters of an algorithm with types, defaults, ranges and meaning."""
    described = []
    for field in dataclasses.fields(algorithm_class(name)):
        if field.metadata.get("is_public"):
            entry: dict[str, Any] = {"name": field.name, "type": str(field.type), "default": field.default}
            entry |= {key: field.metadata[key] for key in ("minimum", "maximum", "choices", "doc")}
            described.append(
                {key: value for key, value in entry.items() if value is not None or key == "default"}
            )
    return described


def _check_value(name: str, value: object, field: dataclasses.Field[Any]) -> None:
    allowed = str(field.type)
    metadata: Mapping[str, Any] = field.metadata
    path = f"algorithm_parameters.{name}"
    if value is None:
        if "None" not in allowed:
            raise RequestError(f"{path} may not be null", field=path, value=None, limit=allowed)
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = (
        ("bool" in allowed and isinstance(value, bool))
        or ("float" in allowed and is_number and math.isfinite(float(str(value))))
        or ("int" in allowed and isinstance(value, int) and not isinstance(value, bool))
        or ("str" in allowed and isinstance(value, str))
    )
    if not fits:
        raise RequestError(f"{path} is {value!r}, expected {allowed}", field=path, value=value, limit=allowed)
    choices, minimum, maximum = metadata["choices"], metadata["minimum"], metadata["maximum"]
    if choices is not None and value not in choices:
        raise RequestError(
            f"{path} is {value!r}, expected one of {', '.join(choices)}",
            field=path,
            value=value,
            limit=list(choices),
        )
    if is_number and minimum is not None and value < minimum:
        raise RequestError(
            f"{path} is {value!r}, at least {minimum} is needed", field=path, value=value, limit=minimum
        )
    if is_number and maximum is not None and value > maximum:
        raise RequestError(
            f"{path} is {value!r}, at most {maximum} is allowed", field=path, value=value, limit=maximum
        )
