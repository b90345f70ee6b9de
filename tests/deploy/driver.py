"""Holds a Ray cluster for the tests, in a process of its own: FOLDER, and kinds of worker nodes by name."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from typing import Any

import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster

from sfumato.deploy.app import build
from sfumato.deploy.command import start_proxies
from sfumato.deploy.config import parse_deployment

# Ray's smallest; nothing of ours is in it.
_STORE_BYTES = 80 << 20
# What a node says that it has; all of them share this machine.
_CPUS = 8


class Driver:
    """The cluster, its nodes by name, and what is deployed on it."""

    def __init__(self, folder: str, workers: dict[str, str]) -> None:
        started = time.monotonic()
        self.folder = folder
        # Nodes share this folder: all of it goes with it.
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": _CPUS,
                "resources": {"head": 100},
                "object_store_memory": _STORE_BYTES,
                "temp_dir": f"{folder}/ray",
                "include_dashboard": False,
                "include_log_monitor": False,
            },
        )
        self.nodes: dict[str, Any] = {}
        for name, kind in workers.items():
            self.add(name, kind)
        ray.init(address=self.cluster.address, log_to_driver=False)
        self.seconds = {"cluster": time.monotonic() - started}
        self.application = ""

    def add(self, name: str, kind: str = "worker") -> None:
        """Let a worker node join."""
        self.nodes[name] = self.cluster.add_node(
            num_cpus=_CPUS,
            resources={kind: 100},
            object_store_memory=_STORE_BYTES,
            include_log_monitor=False,
            wait=False,
        )

    def lose(self, name: str) -> None:
        """Kill a node with all that runs on it, at once."""
        node = self.nodes.pop(name)
        (raylet,) = node.all_processes["raylet"]
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [psutil.Process(raylet.process.pid), *_below(raylet.process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.cluster.remove_node(node, allow_graceful=False)

    def deploy(self, deployment: dict[str, Any]) -> dict[str, float]:
        """Start an application, or bring it up to date."""
        started = time.monotonic()
        described = parse_deployment(deployment)
        start_proxies(described)
        serve.run(build(described), name=described.name)
        self.application = described.name
        self.seconds["deploy"] = time.monotonic() - started
        return self.seconds

    def figures(self) -> dict[str, float]:
        """Return how many seconds the cluster and the application took to start."""
        return self.seconds

    def begin(self, deployment: dict[str, Any]) -> None:
        """Bring the application up to date, and do not wait for it."""
        described = parse_deployment(deployment)
        serve._run(build(described), name=described.name, _blocking=False)

    def status(self) -> dict[str, dict[str, int]]:
        """Return how many replicas of each deployment are in which state."""
        found = serve.status().applications[self.application].deployments
        return {name: dict(each.replica_states) for name, each in found.items()}

    def bundles(self) -> list[dict[str, float]]:
        """Return what the placement groups that are there have reserved, one bundle each."""
        groups = ray.util.placement_group_table().values()
        there = [group for group in groups if group["state"] == "CREATED"]
        return [dict(bundle) for group in there for bundle in group["bundles"].values()]

    def memory(self) -> dict[str, float]:
        """Return the proportional memory of this cluster's processes in MiB, by what they are."""
        found: dict[str, float] = {}
        for process in psutil.process_iter():
            try:
                if self.folder not in str(process.environ()) + " ".join(process.cmdline()):
                    continue
                name = _called(process.cmdline())
                found[name] = found.get(name, 0.0) + process.memory_full_info().pss / (1 << 20)
            except psutil.Error:
                continue
        return found

    def stop(self) -> None:
        """End everything."""
        serve.shutdown()
        ray.shutdown()
        self.cluster.shutdown()


def _below(pid: int) -> list[psutil.Process]:
    return list(psutil.Process(pid).children(recursive=True))


def _called(command: list[str]) -> str:
    text = " ".join(command)
    for name in ("sfumato.engine.process", "gcs_server", "raylet", "DashboardAgent", "RuntimeEnvAgent"):
        if name in text:
            return name
    for name in ("ServeController", "ProxyActor"):
        if name in text:
            return name
    if "ServeReplica" in text:
        return "ServeReplica " + text.split(":")[-1].split(".")[0].strip()
    return "other"


def main() -> None:
    """Take commands until the pipe ends."""
    folder, workers = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    driver = Driver(folder, json.loads(workers))
    for line in sys.stdin:
        given = json.loads(line)
        answer = getattr(driver, given.pop("command"))(**given)
        print("answer " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)
