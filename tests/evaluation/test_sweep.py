"""Which settings are measured."""

from __future__ import annotations

import pytest

from sfumato.errors import ConfigError
from sfumato.evaluation.sweep import Sweep, parse_sweep, plan_curves
from tests.evaluation.scripted import CARD


def test_sweeps_are_read() -> None:
    assert parse_sweep("threshold=0.5, 1,null") == Sweep(None, "threshold", (0.5, 1, None))
    assert parse_sweep("fast.mode=a,low,true") == Sweep("fast", "mode", ("a", "low", True))


@pytest.mark.parametrize(
    "text", ["threshold", "=1", "threshold=", "threshold=1,,2", "threshold=1,1", "a=[1]"]
)
def test_bad_sweeps_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--sweep"):
        parse_sweep(text)


def test_without_options_the_default_is_measured() -> None:
    (curve,) = plan_curves(CARD, [], [], {})
    (setting,) = curve.settings
    assert (setting.algorithm, setting.parameters, setting.is_default) == ("fast", {}, True)
    assert setting.effective == {"threshold": 0.8, "mode": "a"}
    assert setting.file_name == "answers-fast.jsonl"


def test_each_algorithm_has_its_curve() -> None:
    sweeps = [parse_sweep("threshold=0.5,0.8"), parse_sweep("slow.steps=2,4")]
    fast, slow = plan_curves(CARD, ["fast", "slow"], sweeps, {"fast.mode": "b"})
    assert [setting.effective for setting in fast.settings] == [
        {"threshold": 0.5, "mode": "b"},
        {"threshold": 0.8, "mode": "b"},
    ]
    assert [setting.parameters for setting in slow.settings] == [{"steps": 2}, {"steps": 4}]
    assert not any(setting.is_default for setting in (*fast.settings, *slow.settings))
    assert [setting.label for setting in slow.settings] == ["slow steps=2", "slow steps=4"]
    assert fast.settings[0].file_name == "answers-fast-threshold-0.5.jsonl"
    (curve,) = plan_curves(CARD, [], [parse_sweep("threshold=0.5,0.8")], {})
    assert [setting.is_default for setting in curve.settings] == [False, True]


@pytest.mark.parametrize(
    ("algorithms", "sweeps", "parameters", "reason"),
    [
        (["best"], [], {}, "'best' is not one of fast, slow"),
        (["fast", "fast"], [], {}, "fast is given twice"),
        (["slow"], ["threshold=1"], {}, "'slow' has no parameter 'threshold'; it has steps"),
        ([], [], {"speed": 1}, "has no parameter 'speed'"),
        ([], ["slow.steps=1"], {}, "slow is not evaluated"),
        ([], [], {"slow.steps": 1}, "slow is not evaluated"),
        ([], ["threshold=1", "mode=a"], {}, "2 times for fast"),
        ([], ["threshold=1"], {"threshold": 2}, "both in --sweep and in --algorithm-parameters"),
    ],
)
def test_what_does_not_fit_is_named(
    algorithms: list[str], sweeps: list[str], parameters: dict[str, int], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan_curves(CARD, algorithms, [parse_sweep(sweep) for sweep in sweeps], parameters)
