"""The Ray Serve application of a deployment: `serve run sfumato.deploy.app:app config=deploy.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from ray import serve
from ray.serve import Application

from sfumato.deploy.config import (
    Deployment,
    Model,
    actor_resources,
    engine_config,
    parse_deployment,
    read_deployment,
)
from sfumato.deploy.front import Front
from sfumato.deploy.replica import EngineReplica
from sfumato.deploy.roll import Roll

_ROUTERS = {"prefix": "sfumato.deploy.router.PrefixRouter"}
# Everybody on the roll waits at it for the next change.
_MAX_ROLL_CALLS = 100_000
_ROLL_CPUS = 0.0
# The front logs every request; a line for each of its calls within the cluster says nothing more.
_QUIET = {"enable_access_log": False}


def app(args: dict[str, Any]) -> Application:
    """Return the application that a file describes (config=PATH), or the arguments themselves.

    Raises ConfigError.
    """
    if set(args) == {"config"}:
        return build(read_deployment(Path(str(args["config"]))))
    return build(parse_deployment(args))


def build(deployment: Deployment) -> Application:
    """Join the deployments: a roll, the engines of each model, and the front before them."""
    recovery = msgspec.json.encode(deployment.recovery)
    roll = (
        serve.deployment(Roll)
        .options(
            name="roll",
            num_replicas=1,
            max_ongoing_requests=_MAX_ROLL_CALLS,
            logging_config=_QUIET,
            ray_actor_options={"num_cpus": _ROLL_CPUS, "resources": dict(deployment.front.resources.custom)},
        )
        .bind()
    )
    engines = {}
    for checkpoint, model in deployment.each().items():
        served = model.name or Path(checkpoint).name
        name = served.replace("/", "--").replace("#", "-")
        engines[served] = name, _engines(deployment, name, checkpoint, model, recovery, roll)
    settings = deployment.front
    front = serve.deployment(Front).options(
        name="front",
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_ongoing_requests,
        graceful_shutdown_timeout_s=deployment.recovery.drain,
        health_check_period_s=deployment.recovery.health_period,
        health_check_timeout_s=deployment.recovery.health_timeout,
        ray_actor_options={
            "num_cpus": 1 if settings.resources.cpu is None else settings.resources.cpu,
            "resources": dict(settings.resources.custom),
        },
    )
    return front.bind(msgspec.json.encode(settings), recovery, roll, engines)


def _engines(
    deployment: Deployment, name: str, checkpoint: str, model: Model, recovery: bytes, roll: Application
) -> Application:
    config = engine_config(checkpoint, model)
    actor = actor_resources(model.resources, config)
    actor["runtime_env"] = {"env_vars": dict(model.environment)}
    options: dict[str, Any] = {
        "name": name,
        "max_ongoing_requests": model.max_ongoing_requests,
        "graceful_shutdown_timeout_s": deployment.recovery.drain,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": deployment.recovery.health_period,
        "health_check_timeout_s": deployment.recovery.health_timeout,
        "ray_actor_options": actor,
        "logging_config": _QUIET,
    }
    if deployment.routing in _ROUTERS:
        options["request_router_config"] = {"request_router_class": _ROUTERS[deployment.routing]}
    if model.autoscaling is None:
        options["num_replicas"] = model.replicas
    encoded = msgspec.json.encode(config)
    bound = serve.deployment(EngineReplica).options(**options)
    return bound.bind(encoded, name, recovery, roll, ())
