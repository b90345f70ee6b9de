"""Which settings are measured: algorithms, fixed parameters, and one parameter that runs over values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.core.spec import ParameterValue
from sfumato.errors import ConfigError
from sfumato.evaluation.backend import ModelCard

# What a file's name may hold without being quoted anywhere.
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Sweep:
    """The values of one parameter; algorithm None: of every algorithm that has no sweep of its own."""

    algorithm: str | None
    parameter: str
    values: tuple[ParameterValue, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """One point of a curve: parameters are what is sent, effective is what they come to."""

    algorithm: str
    parameters: dict[str, ParameterValue]
    effective: dict[str, ParameterValue]
    parameter: str | None
    value: ParameterValue
    is_default: bool

    @property
    def label(self) -> str:
        """Return a name for people."""
        return self.algorithm if self.parameter is None else f"{self.algorithm} {self.parameter}={self.shown}"

    @property
    def shown(self) -> str:
        """Return the swept value as it was given."""
        return self.value if isinstance(self.value, str) else json.dumps(self.value)

    @property
    def file_name(self) -> str:
        """Return where the answers of this setting are kept."""
        return f"answers-{_UNSAFE.sub('-', self.label)}.jsonl"


@dataclass(frozen=True, slots=True)
class Curve:
    """The settings of one algorithm, in the order of the sweep."""

    algorithm: str
    parameter: str | None
    settings: tuple[Setting, ...]


def parse_sweep(text: str) -> Sweep:
    """Read [ALGORITHM.]PARAMETER=VALUE,VALUE,...; a value that is not JSON is a word. Raises ConfigError."""
    name, equals, listed = text.partition("=")
    words = [word.strip() for word in listed.split(",")]
    if not equals or not name.strip() or not all(words):
        raise ConfigError(
            f"--sweep {text!r} is not like threshold=0.5,0.9 or sdar.confidence_threshold=0.5,0.9"
        )
    values = tuple(_value(word) for word in words)
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ConfigError(f"--sweep {text!r} has {words[index]} twice")
    algorithm, parameter = _qualified(name.strip())
    return Sweep(algorithm, parameter, values)


def _value(word: str) -> ParameterValue:
    try:
        value = json.loads(word)
    except ValueError:
        return word
    if isinstance(value, list | dict):
        raise ConfigError(f"--sweep value {word!r} is not a number, a word, true, false or null")
    parsed: ParameterValue = value
    return parsed


def _qualified(name: str) -> tuple[str | None, str]:
    algorithm, dot, parameter = name.rpartition(".")
    return (algorithm if dot else None), parameter


def plan_curves(
    card: ModelCard,
    algorithms: Sequence[str],
    sweeps: Sequence[Sweep],
    parameters: Mapping[str, ParameterValue],
) -> list[Curve]:
    """Return a curve per algorithm, by default the model's; parameters: fixed ones, perhaps qualified.

    Raises ConfigError for an algorithm or parameter that is not there, and for what is given twice.
    """
    chosen = list(algorithms) or [card.default_algorithm]
    for index, name in enumerate(chosen):
        if name in chosen[:index]:
            raise ConfigError(f"--algorithm {name} is given twice")
    named = [sweep.algorithm for sweep in sweeps] + [_qualified(name)[0] for name in parameters]
    for stranger in (name for name in named if name is not None and name not in chosen):
        raise ConfigError(f"--algorithm {stranger} is not evaluated; it is named in a sweep or a parameter")
    return [_curve(card, name, sweeps, parameters) for name in chosen]


def _curve(
    card: ModelCard, algorithm: str, sweeps: Sequence[Sweep], parameters: Mapping[str, ParameterValue]
) -> Curve:
    own = [sweep for sweep in sweeps if sweep.algorithm == algorithm]
    applying = own or [sweep for sweep in sweeps if sweep.algorithm is None]
    if len(applying) > 1:
        raise ConfigError(
            f"--sweep is given {len(applying)} times for {algorithm}; a curve has one parameter"
        )
    # A parameter that names its algorithm goes before one that is meant for all.
    named = [(*_qualified(name), value) for name, value in parameters.items()]
    fixed = {name: value for owner, name, value in named if owner is None}
    fixed |= {name: value for owner, name, value in named if owner == algorithm}
    if not applying:
        return Curve(algorithm, None, (_setting(card, algorithm, fixed, None, None),))
    parameter = applying[0].parameter
    if parameter in fixed:
        raise ConfigError(f"{parameter} is both in --sweep and in --algorithm-parameters")
    settings = tuple(
        _setting(card, algorithm, fixed | {parameter: value}, parameter, value)
        for value in applying[0].values
    )
    return Curve(algorithm, parameter, settings)


def _setting(
    card: ModelCard,
    algorithm: str,
    parameters: dict[str, ParameterValue],
    parameter: str | None,
    value: ParameterValue,
) -> Setting:
    known = _defaults(card, algorithm)
    for name in parameters:
        if name not in known:
            raise ConfigError(f"algorithm {algorithm!r} has no parameter {name!r}; it has {', '.join(known)}")
    effective = known | parameters
    is_default = algorithm == card.default_algorithm and effective == known
    return Setting(algorithm, parameters, effective, parameter, value, is_default)


def _defaults(card: ModelCard, algorithm: str) -> dict[str, Any]:
    """Return what an algorithm's parameters are where a request says nothing."""
    for each in card.algorithms:
        if each.name == algorithm:
            own = card.default_algorithm_parameters if algorithm == card.default_algorithm else {}
            return {parameter.name: parameter.default for parameter in each.parameters} | own
    names = ", ".join(each.name for each in card.algorithms)
    raise ConfigError(f"--algorithm {algorithm!r} is not one of {names}")
