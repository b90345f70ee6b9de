"""What lies in `deploy/`: the manifest fits what it uses of KubeRay's schema, Ray's own, and ours."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from sfumato.deploy.config import parse_deployment
from sfumato.serve.metrics import Metrics

FOLDER = Path(__file__).resolve().parents[2] / "deploy"

# The parts of the RayService resource (ray.io/v1) that an example needs, written down from its definition;
# a pod's template has more fields than are listed here, and only those are allowed.
_TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}
_QUANTITIES: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?([KMGT]i|m)?$"},
}


def table(required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


_CONTAINER = table(
    ["name", "image"],
    name={"type": "string"},
    image={"type": "string"},
    env={
        "type": "array",
        "items": table(["name"], name={"type": "string"}, value={"type": "string"}),
    },
    ports={
        "type": "array",
        "items": table(["containerPort"], containerPort={"type": "integer"}, name={"type": "string"}),
    },
    resources=table([], limits=_QUANTITIES, requests=_QUANTITIES),
)
_TEMPLATE = table(
    ["spec"],
    spec=table(
        ["containers"],
        containers={"type": "array", "items": _CONTAINER, "minItems": 1},
        terminationGracePeriodSeconds={"type": "integer"},
    ),
)
_COUNT = {"type": "integer", "minimum": 0}
_RAY_SERVICE = table(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=table(["name"], name={"type": "string"}),
    spec=table(
        ["serveConfigV2", "rayClusterConfig"],
        serviceUnhealthySecondThreshold={"type": "integer"},
        deploymentUnhealthySecondThreshold={"type": "integer"},
        serveConfigV2={"type": "string"},
        rayClusterConfig=table(
            ["headGroupSpec"],
            rayVersion={"type": "string"},
            enableInTreeAutoscaling={"type": "boolean"},
            headGroupSpec=table(["template"], rayStartParams=_TEXTS, template=_TEMPLATE),
            workerGroupSpecs={
                "type": "array",
                "items": table(
                    ["groupName", "maxReplicas", "minReplicas", "template"],
                    groupName={"type": "string"},
                    replicas=_COUNT,
                    minReplicas=_COUNT,
                    maxReplicas=_COUNT,
                    rayStartParams=_TEXTS,
                    template=_TEMPLATE,
                ),
            },
        ),
    ),
)


def manifest() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / "rayservice.yaml").read_text(encoding="utf-8"))
    return content


def test_the_manifest_fits_the_resource() -> None:
    jsonschema.validate(manifest(), _RAY_SERVICE)
    broken = manifest()
    broken["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxreplicas"] = 8
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, _RAY_SERVICE)


def test_its_application_is_one_of_ours() -> None:
    with warnings.catch_warnings():
        # Ray describes its fields to pydantic in a way that is to go.
        warnings.simplefilter("ignore")
        from ray.serve.schema import ServeDeploySchema
    served = yaml.safe_load(manifest()["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(served).applications
    assert application.import_path == "sfumato.deploy.app:app"
    deployment = parse_deployment(application.args)
    assert deployment.front.resources.custom == {"front": 1}


def test_resources_of_the_application_are_those_of_the_nodes() -> None:
    cluster = manifest()["spec"]["rayClusterConfig"]
    given = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    names = {name for each in given for name in json.loads(json.loads(each["rayStartParams"]["resources"]))}
    assert names == {"front", "engine"}


def test_the_dashboard_shows_series_that_there_are() -> None:
    dashboard = json.loads((FOLDER / "grafana.json").read_text(encoding="utf-8"))
    shown = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"sfumato_\w+", target["expr"])
    }
    known: set[str] = set()
    for family in Metrics().registry.collect():
        known |= {family.name + suffix for suffix in ("", "_total", "_bucket", "_sum", "_count")}
    assert shown <= known
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
