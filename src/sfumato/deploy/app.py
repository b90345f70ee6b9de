"""The Ray Serve application of a deployment: `serve run sfumato.deploy.app:app config=deploy.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace
from ray import serve
from ray.serve import Application

from sfumato.config import EngineConfig
from sfumato.deploy.config import (
    Deployment,
    Model,
    Resources,
    actor_resources,
    engine_config,
    parse_deployment,
    read_deployment,
)
from sfumato.deploy.front import Front
from sfumato.deploy.replica import EngineReplica, HelperReplica
from sfumato.deploy.roll import Roll
from sfumato.deploy.scaling import autoscaling_options
from sfumato.engine.peer_config import PeerConfig

_ROUTERS = {"prefix": "sfumato.deploy.router.PrefixRouter"}
# Everybody on the roll waits at it for the next change.
_MAX_ROLL_CALLS = 100_000
_ROLL_CPUS = 0.0
# What keeps an engine from starting is mostly the same the next time.
_MAX_STARTS = 3
# A replica that is to go looks so often whether its last request has ended.
_LOOK_SECONDS = 0.2
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
        bound, helpers = _engines(deployment, name, checkpoint, model, recovery, roll)
        # A front asks nothing of helpers; that it has their handles makes them part of the application.
        engines[served] = name, bound, helpers
    settings = deployment.front
    front = serve.deployment(Front).options(
        name="front",
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_ongoing_requests,
        graceful_shutdown_timeout_s=settings.drain,
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
) -> tuple[Application, list[Application]]:
    """Return the replicas that answer requests to a model, and those that work for them."""
    config = engine_config(checkpoint, model)
    options = {
        **_common(deployment, config, model, model.resources),
        "max_ongoing_requests": model.max_ongoing_requests,
    }
    if deployment.routing in _ROUTERS:
        options["request_router_config"] = {"request_router_class": _ROUTERS[deployment.routing]}
    if model.autoscaling is None:
        options["num_replicas"] = model.replicas
    else:
        options["autoscaling_config"] = autoscaling_options(model.autoscaling)
    helpers = [
        serve.deployment(HelperReplica)
        .options(
            name=f"{name}--{role}",
            num_replicas=pool.replicas,
            **_common(deployment, config, model, pool.resources),
        )
        .bind(_encoded(config, model, role=role), name, recovery, roll)
        for role, pool in model.pools.items()
    ]
    encoded = (
        _encoded(config, model, role="denoise", is_told=True) if helpers else msgspec.json.encode(config)
    )
    roles = tuple(model.pools)
    engines = serve.deployment(EngineReplica).options(name=name, **options)
    return engines.bind(encoded, name, recovery, roll, roles), helpers


def _encoded(config: EngineConfig, model: Model, **peering: Any) -> bytes:
    part = PeerConfig(transport=model.peer_transport, **peering)
    return msgspec.json.encode(replace(config, peering=part))


def _common(
    deployment: Deployment, config: EngineConfig, model: Model, resources: Resources
) -> dict[str, Any]:
    """Return the options of every deployment that owns engines."""
    actor = actor_resources(resources, config)
    options: dict[str, Any] = {
        "graceful_shutdown_timeout_s": deployment.recovery.drain,
        "graceful_shutdown_wait_loop_s": _LOOK_SECONDS,
        "health_check_period_s": deployment.recovery.health_period,
        "health_check_timeout_s": deployment.recovery.health_timeout,
        "logging_config": _QUIET,
        "max_constructor_retry_count": _MAX_STARTS,
        "ray_actor_options": {**actor, "runtime_env": {"env_vars": dict(model.environment)}},
    }
    if config.tensor_parallel > 1:
        # All ranks on one node: the engine starts them, and they are its children.
        bundle = {"CPU": actor["num_cpus"], "GPU": actor["num_gpus"], **actor["resources"]}
        options["placement_group_bundles"] = [{key: value for key, value in bundle.items() if value}]
        options["placement_group_strategy"] = "STRICT_PACK"
    return options
