"""The file that describes a deployment: what it says, and what is refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sfumato.deploy.config import (
    actor_resources,
    check_room,
    engine_config,
    parse_deployment,
    read_deployment,
    reserved,
)
from sfumato.errors import ConfigError

MODEL = "sfumato-tiny-sdar"


def test_a_file_says_models_pools_resources_and_scaling(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(
        """
models:
  sfumato-tiny-sdar:
    name: tiny
    kv-memory: 16M
    algorithm: sdar
    algorithm-parameters: {remasking_strategy: sequential}
    prefill: {replicas: 2, resources: {cpu: 2}}
    autoscaling: {min-replicas: 2, max-replicas: 8, target-step-seconds: 0.05}
    resources: {cpu: 0.5, memory: 1G, custom: {node-kind: 1}}
    environment: {OMP_NUM_THREADS: "1"}
  owner/other-model:
front: {replicas: 2, api-keys: [secret]}
recovery: {silence: 2.5}
""",
        encoding="utf-8",
    )
    deployment = read_deployment(path)
    model = deployment.each()[MODEL]
    assert model.name == "tiny"
    assert model.min_replicas == 2
    assert list(model.pools) == ["prefill"]
    config = engine_config(MODEL, model)
    assert config.kv_memory == 16 << 20
    assert config.parameters == {"remasking_strategy": "sequential"}
    assert actor_resources(model.resources, config) == {
        "num_cpus": 0.5,
        "num_gpus": 0,
        "memory": 1 << 30,
        "resources": {"node-kind": 1},
    }
    assert "owner/other-model" in deployment.each()
    assert deployment.front.api_keys == ("secret",)
    assert deployment.recovery.silence == 2.5


def test_ranks_get_a_gpu_each() -> None:
    deployment = parse_deployment({"models": {MODEL: {"device": "cuda", "tensor-parallel": 4}}})
    model = deployment.each()[MODEL]
    assert actor_resources(model.resources, engine_config(MODEL, model))["num_gpus"] == 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "required field `models`"),
        ({"models": {}}, "'models' names no model"),
        ({"models": {MODEL: {"replica": 2}}}, "unknown field `replica`"),
        ({"models": {MODEL: {"replicas": 0}}}, f"models.{MODEL}.replicas 0 must be at least 1"),
        ({"models": {MODEL: {"replicas": "two"}}}, r"Expected `int`, got `str` - at `\$.models"),
        ({"models": {MODEL: {"data-parallel": 2}}}, "data-parallel 2 is for one machine; say replicas"),
        ({"models": {MODEL: {"data-parallel-attention": True}}}, "is for engines of one machine"),
        ({"models": {MODEL: {"overlap": "maybe"}}}, "--overlap 'maybe'"),
        ({"models": {MODEL: {"peer-transport": "pigeon"}}}, "peer-transport 'pigeon' is not one of"),
        (
            {"models": {MODEL: {"tensor-parallel": 2, "prefill": {}}}},
            "tensor-parallel 2 does not go with prefill",
        ),
        ({"models": {MODEL: {"prefill": {}, "decode": {}}}}, "prefill is of language models"),
        ({"models": {MODEL: {"prefill": {"replicas": 0}}}}, "prefill.replicas 0 must be at least 1"),
        (
            {"models": {MODEL: {"replicas": 2, "autoscaling": {}}}},
            "replicas 2 does not go with autoscaling",
        ),
        (
            {"models": {MODEL: {"autoscaling": {"min-replicas": 3, "max-replicas": 2}}}},
            "max-replicas 2 must be at least 3",
        ),
        ({"models": {MODEL: {"autoscaling": {"target-requests": 0}}}}, "target-requests 0 must be above 0"),
        ({"models": {MODEL: None, "other": {"name": MODEL}}}, "two models are called"),
        ({"models": {MODEL: None}, "routing": "luck"}, "routing 'luck' is not one of prefix, ray"),
        ({"models": {MODEL: None}, "recovery": {"silence": 0}}, "recovery.silence 0 must be above 0"),
        ({"models": {MODEL: None}, "front": {"replicas": 0}}, "front.replicas 0 must be at least 1"),
    ],
)
def test_what_cannot_be_met_is_named(content: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_deployment(content)


def test_a_file_that_is_not_there_or_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_deployment(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("models: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_deployment(broken)


def test_the_command_line_does_without_ray() -> None:
    code = (
        "import sys, sfumato.serve.commands.program as p; p.build_program(); assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_machine_that_is_too_small_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(
        """
models:
  sfumato-tiny-sdar:
    replicas: 2
    threads: 3
    prefill: {replicas: 3, resources: {cpu: 0.5, custom: {fast: 1}}}
front: {resources: {cpu: 0.25}}
""",
        encoding="utf-8",
    )
    needed = reserved(read_deployment(path))
    assert needed == {"CPU": 0.25 + 2 * 3 + 3 * 0.5, "fast": 3.0}
    check_room(needed, {"CPU": 8.0, "fast": 3.0})
    with pytest.raises(ConfigError, match=r"reserves 7\.75 CPU, this machine has 2; say less"):
        check_room(needed, {"CPU": 2.0, "fast": 3.0})
    with pytest.raises(ConfigError, match="reserves 3 fast, this machine has 0"):
        check_room(needed, {"CPU": 8.0})
