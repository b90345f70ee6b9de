"""A request's own timestep scheduler: cloned from the pipeline's, with the request's steps planned."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

from sfumato.core.spec import ImageSpec
from sfumato.errors import NotSupported, RequestError

# Which of diffusers' schedulers predict along a flow; the others add noise by a variance schedule.
FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
NOISE_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
# What the two multistep solvers are told so that they follow a flow.
_FLOW_OPTIONS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_FLOW_NATIVE = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_NEED_SCIPY = {"LMSDiscreteScheduler"}
_MAX_STEPS = 1000


def is_flow(template: Any) -> bool:
    """Whether a pipeline's scheduler follows a flow."""
    return type(template).__name__ in _FLOW_NATIVE or bool(template.config.get("use_flow_sigmas"))


def allowed_schedulers(template: Any) -> tuple[str, ...]:
    """Return the names of the timestep schedulers that a request may choose instead of the pipeline's."""
    names = set(FLOW_SCHEDULERS if is_flow(template) else NOISE_SCHEDULERS)
    if find_spec("scipy") is None:
        names -= _NEED_SCIPY
    return tuple(sorted({*names, type(template).__name__}))


def clone(template: Any, spec: ImageSpec) -> Any:
    """Return a timestep scheduler of the request's own: a copy of the unstepped template, or its choice."""
    asked = spec.timestep_scheduler
    if asked is None:
        return copy.deepcopy(template)
    names = allowed_schedulers(template)
    if asked.name not in names:
        raise NotSupported(
            f"scheduler {asked.name!r} is not one of {', '.join(names)}",
            field="scheduler",
            value=asked.name,
            limit=names,
        )
    import diffusers

    scheduler_class = getattr(diffusers, asked.name)
    known = inspect.signature(scheduler_class.__init__).parameters
    for name in asked.options:
        if name not in known or name == "self":
            choices = ", ".join(sorted(set(known) - {"self"}))
            raise NotSupported(
                f"{asked.name} has no option {name!r}; it has {choices}", field="scheduler", value=name
            )
    options: dict[str, Any] = dict(asked.options)
    if is_flow(template) and asked.name not in _FLOW_NATIVE:
        options = {**_FLOW_OPTIONS, **options}
    try:
        return scheduler_class.from_config(template.config, **options)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RequestError(
            f"{asked.name} refuses its options: {error}", field="scheduler", value=asked.options
        ) from None


def check_eta(scheduler: Any, spec: ImageSpec) -> None:
    """Raise NotSupported for a share of noise that this class's steps do not take."""
    if spec.eta and "eta" not in _parameters(type(scheduler).step):
        raise NotSupported(
            f"eta is not known to {type(scheduler).__name__}; DDIMScheduler, for instance, takes it",
            field="eta",
            value=spec.eta,
        )


def plan(scheduler: Any, spec: ImageSpec, *, sigmas: Any = None, mu: float | None = None) -> None:
    """Give a clone the request's timesteps, sigmas, or number of steps.

    sigmas, mu: the family's own sigmas for a plain number of steps, and its shift. Raises RequestError where
    the scheduler's class does not take what was asked for.
    """
    known = inspect.signature(scheduler.set_timesteps).parameters
    given: dict[str, Any] = {}
    if spec.timesteps and spec.sigmas:
        raise RequestError("timesteps and sigmas exclude each other", field="sigmas", value=spec.sigmas)
    if spec.timesteps or spec.sigmas:
        field = "timesteps" if spec.timesteps else "sigmas"
        given[field] = list(spec.timesteps or spec.sigmas)
        if field not in known:
            raise NotSupported(
                f"{type(scheduler).__name__} takes no {field}; choose another one, or a number of steps",
                field=field,
                value=given[field],
            )
    elif sigmas is not None and "sigmas" in known and not scheduler.config.get("use_flow_sigmas"):
        given["sigmas"] = sigmas
    else:
        given["num_inference_steps"] = spec.num_inference_steps
    if mu is not None and "mu" in known and scheduler.config.get("use_dynamic_shifting"):
        given["mu"] = mu
    try:
        scheduler.set_timesteps(**given)
    except (ValueError, TypeError, IndexError, AssertionError) as error:
        raise RequestError(
            f"{type(scheduler).__name__} refuses this schedule: {error or type(error).__name__}",
            field="num_inference_steps",
            value=spec.num_inference_steps,
        ) from None
    if len(scheduler.timesteps) > _MAX_STEPS:
        raise RequestError(
            f"{len(scheduler.timesteps)} steps are more than {_MAX_STEPS}",
            field="num_inference_steps",
            value=len(scheduler.timesteps),
            limit=_MAX_STEPS,
        )


def start_at(scheduler: Any, spec: ImageSpec) -> Any:
    """Return the timesteps that an image to image request runs: the last `strength` of them."""
    num_steps = len(spec.timesteps or spec.sigmas or ()) or spec.num_inference_steps
    first = num_steps - min(int(num_steps * spec.strength), num_steps)
    if first >= num_steps:
        raise RequestError(
            f"strength {spec.strength} of {num_steps} steps leaves no step to run",
            field="strength",
            value=spec.strength,
            limit=1 / num_steps,
        )
    begin = first * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return scheduler.timesteps[begin:]


def step_arguments(scheduler: Any, *, eta: float, generator: Any) -> dict[str, Any]:
    """Return what this class's `step` takes beyond the sample: whatever draws, draws from the request."""
    known = _parameters(type(scheduler).step)
    given = {"eta": eta, "generator": generator}
    return {name: value for name, value in given.items() if name in known}


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Return what a class's function takes; to read that takes a good part of a tiny pipeline's step."""
    return frozenset(inspect.signature(function).parameters)
