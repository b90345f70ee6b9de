"""The one description of a deployment: models, pools, resources, scaling; read from YAML and checked once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from sfumato.config import EngineConfig
from sfumato.engine.peer_config import TRANSPORTS
from sfumato.errors import ConfigError
from sfumato.serve.settings_file import ModelSettings, parse_bytes

# Keys under which names are an operator's own and keep their dashes.
_FREE = ("models", "algorithm_parameters", "custom", "environment")
POOLS = ("prefill", "encode", "decode")
# Our words for Ray's.
PROXIES = {"every-node": "EveryNode", "head": "HeadOnly", "none": "Disabled"}


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file; a field that it does not know is refused by name."""


class Resources(_Section, frozen=True, kw_only=True):
    """What Ray reserves for one replica; None: what its engine's options ask for.

    custom: resources of an operator's own, as `ray start --resources` gives them to nodes.
    """

    cpu: float | None = None
    gpu: float | None = None
    memory: int | str | None = None
    custom: dict[str, float] = {}


class Autoscaling(_Section, frozen=True, kw_only=True):
    """How many replicas there are: enough for the requests, and more where steps take longer than they may.

    target_requests: per replica, running and waiting. target_step_seconds: None does not ask.
    look_back_seconds: both are means over so long.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    target_requests: float = 16.0
    target_step_seconds: float | None = None
    look_back_seconds: float = 15.0
    upscale_delay_seconds: float = 10.0
    downscale_delay_seconds: float = 120.0


class Pool(_Section, frozen=True, kw_only=True):
    """Engines that work for those that denoise."""

    replicas: int = 1
    resources: Resources = Resources()


class Model(ModelSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model: the settings of `sfumato serve --config`, and how it is spread.

    prefill: a pool of a language model's; encode, decode: those of an image model's. peer_transport: how keys
    and values travel between pools. max_ongoing_requests: that one replica holds, running and waiting.
    environment: variables of its processes.
    """

    replicas: int = 1
    autoscaling: Autoscaling | None = None
    resources: Resources = Resources()
    prefill: Pool | None = None
    encode: Pool | None = None
    decode: Pool | None = None
    peer_transport: str = "sockets"
    max_ongoing_requests: int = 256
    environment: dict[str, str] = msgspec.field(default_factory=dict)

    @property
    def pools(self) -> dict[str, Pool]:
        """Return the pools of engines that work for others, by role."""
        return {role: pool for role in POOLS if (pool := getattr(self, role)) is not None}

    @property
    def min_replicas(self) -> int:
        """Return how many replicas there are at least."""
        return self.replicas if self.autoscaling is None else self.autoscaling.min_replicas


class FrontSettings(_Section, frozen=True, kw_only=True):
    """The door: how many processes answer HTTP, what opens it, and where Ray puts it.

    drain: seconds that a front which is to go waits for its answers to end: a connection cannot be moved.
    """

    replicas: int = 1
    resources: Resources = Resources()
    api_keys: tuple[str, ...] = ()
    max_ongoing_requests: int = 4096
    max_body_bytes: int | str = 50 << 20
    health_timeout: float = 5.0
    drain: float = 600.0


class Recovery(_Section, frozen=True, kw_only=True):
    """When something counts as lost, in seconds.

    silence: of a replica, after which its requests run elsewhere. stall: an engine whose loop makes no turn
    for so long is ended. health_period, health_timeout: of Ray's own checks, which replace a replica.
    wait: that a request without a replica waits for one. drain: that a replica's requests get to finish when
    it is to go; what has not finished then goes on elsewhere.
    """

    silence: float = 5.0
    stall: float = 60.0
    health_period: float = 2.0
    health_timeout: float = 10.0
    wait: float = 120.0
    drain: float = 120.0


class Http(_Section, frozen=True, kw_only=True):
    """Where Ray Serve's proxies listen, if `sfumato deploy` starts them; proxies: which nodes have one."""

    host: str = "127.0.0.1"
    port: int = 8000
    proxies: str = "every-node"


class Deployment(_Section, frozen=True, kw_only=True):
    """The whole file. name: of the Ray Serve application."""

    models: dict[str, Model | None]
    name: str = "sfumato"
    front: FrontSettings = FrontSettings()
    recovery: Recovery = Recovery()
    http: Http = Http()
    routing: str = "prefix"

    def each(self) -> dict[str, Model]:
        """Return the models under their checkpoints' names."""
        return {name: model or Model() for name, model in self.models.items()}

    def check(self) -> None:
        """Raise ConfigError naming the field, its value and the limit."""
        if not self.models:
            raise ConfigError("'models' names no model")
        if self.routing not in ("prefix", "ray"):
            raise ConfigError(f"routing {self.routing!r} is not one of prefix, ray")
        if self.http.proxies not in PROXIES:
            raise ConfigError(f"http.proxies {self.http.proxies!r} is not one of {', '.join(PROXIES)}")
        _at_least("front.replicas", self.front.replicas, 1)
        for name in ("silence", "stall", "health_period", "health_timeout", "wait"):
            seconds = getattr(self.recovery, name)
            if not seconds > 0:
                raise ConfigError(f"recovery.{name} {seconds:g} must be above 0 seconds")
        names = [model.name or checkpoint for checkpoint, model in self.each().items()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"two models are called {twice!r}; tell them apart with 'name'")
        for checkpoint, model in self.each().items():
            _check_model(checkpoint, model)


def read_deployment(path: Path) -> Deployment:
    """Read a file. Raises ConfigError naming it and the field."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return parse_deployment(content)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_deployment(content: object) -> Deployment:
    """Return the deployment that a file's content, or the arguments of an application, describe.

    Raises ConfigError.
    """
    try:
        deployment = msgspec.convert(_underscored(content), type=Deployment)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from error
    deployment.check()
    return deployment


def _underscored(content: object, *, is_free: bool = False) -> object:
    """Let fields be written as options are, with dashes."""
    if not isinstance(content, Mapping):
        return content
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key) if is_free else str(key).replace("-", "_")
        # Names of models are an operator's; what stands below each of them is ours again.
        found[name] = _underscored(value, is_free=not is_free and name in _FREE)
    return found


def engine_config(checkpoint: str, model: Model) -> EngineConfig:
    """Return what the engines of a model are started with, roles and addresses aside. Raises ConfigError."""
    planned = model.planned(checkpoint)
    if planned.shares_weights:
        raise ConfigError(
            f"models.{checkpoint}: data-parallel-attention is for engines of one machine (sfumato serve)"
        )
    if planned.config.num_replicas != 1:
        raise ConfigError(
            f"models.{checkpoint}: data-parallel {planned.config.num_replicas} is for one machine; "
            "say replicas"
        )
    return planned.config


def actor_resources(resources: Resources, config: EngineConfig) -> dict[str, Any]:
    """Return what Ray reserves for one replica, in the words of its actors' options."""
    gpus = config.tensor_parallel if config.device.startswith("cuda") else 0
    cpus = config.num_threads or 1
    options: dict[str, Any] = {
        "num_cpus": cpus if resources.cpu is None else resources.cpu,
        "num_gpus": gpus if resources.gpu is None else resources.gpu,
        "resources": dict(resources.custom),
    }
    if resources.memory is not None:
        options["memory"] = parse_bytes(resources.memory, "resources.memory")
    return options


def reserved(deployment: Deployment) -> dict[str, float]:
    """Return what the whole deployment asks Ray for at least, in Ray's names of resources."""
    total: dict[str, float] = {}

    def add(options: dict[str, Any], count: int) -> None:
        amounts = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], **options["resources"]}
        for name, amount in amounts.items():
            total[name] = total.get(name, 0.0) + count * amount

    front = deployment.front
    cpus = 1 if front.resources.cpu is None else front.resources.cpu
    add({"num_cpus": cpus, "num_gpus": 0, "resources": front.resources.custom}, front.replicas)
    for checkpoint, model in deployment.each().items():
        config = engine_config(checkpoint, model)
        add(actor_resources(model.resources, config), model.min_replicas)
        for pool in model.pools.values():
            add(actor_resources(pool.resources, config), pool.replicas)
    return {name: amount for name, amount in total.items() if amount}


def check_room(needed: dict[str, float], there: dict[str, float]) -> None:
    """Raise ConfigError where a cluster that does not grow has less than a deployment reserves."""
    for name, amount in needed.items():
        if amount > there.get(name, 0.0):
            raise ConfigError(
                f"the deployment reserves {amount:g} {name}, this machine has {there.get(name, 0.0):g}; "
                "say less under 'resources' of the models and the front, or have fewer replicas"
            )


def _check_model(checkpoint: str, model: Model) -> None:
    where = f"models.{checkpoint}"
    engine_config(checkpoint, model).check()
    _at_least(f"{where}.replicas", model.replicas, 1)
    _at_least(f"{where}.max-ongoing-requests", model.max_ongoing_requests, 1)
    if model.peer_transport not in TRANSPORTS:
        raise ConfigError(
            f"{where}.peer-transport {model.peer_transport!r} is not one of {', '.join(TRANSPORTS)}"
        )
    if model.pools and (model.tensor_parallel or 1) > 1:
        raise ConfigError(
            f"{where}: tensor-parallel {model.tensor_parallel} does not go with {', '.join(model.pools)}: "
            "each rank would hand over its own part of keys and values"
        )
    if model.prefill is not None and (model.encode or model.decode) is not None:
        raise ConfigError(f"{where}: prefill is of language models, encode and decode of image models")
    for role, pool in model.pools.items():
        _at_least(f"{where}.{role}.replicas", pool.replicas, 1)
    scaling = model.autoscaling
    if scaling is None:
        return
    if model.replicas != 1:
        raise ConfigError(
            f"{where}: replicas {model.replicas} does not go with autoscaling, which has its own"
        )
    _at_least(f"{where}.autoscaling.min-replicas", scaling.min_replicas, 1)
    _at_least(f"{where}.autoscaling.max-replicas", scaling.max_replicas, scaling.min_replicas)
    for name, value in (
        ("target-requests", scaling.target_requests),
        ("target-step-seconds", scaling.target_step_seconds),
        ("look-back-seconds", scaling.look_back_seconds),
    ):
        if value is not None and not value > 0:
            raise ConfigError(f"{where}.autoscaling.{name} {value:g} must be above 0")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} {value} must be at least {least}")
