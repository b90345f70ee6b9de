"""`sfumato deploy`: a deployment on the Ray cluster at hand, or on a local one that it starts."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sfumato.deploy.config import PROXIES, check_room, read_deployment, reserved
from sfumato.errors import ConfigError

if TYPE_CHECKING:
    from sfumato.deploy.config import Deployment

_OURS = "sfumato.errors."


def deploy(
    config: Annotated[Path, typer.Argument(help="YAML file: models, replicas, pools, resources, scaling.")],
    address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS",
            help="Head of a Ray cluster, or auto for that of this machine. Without it one is started here.",
        ),
    ] = None,
    detach: Annotated[
        bool, typer.Option(help="Return once everything is up; a local cluster ends with this command.")
    ] = False,
) -> None:
    """Run models on Ray, behind the same API as `sfumato serve`."""
    deployment = read_deployment(config)
    if detach and address is None:
        raise ConfigError("--detach needs --address: a cluster that is started here ends with this command")
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ConfigError("sfumato deploy needs Ray: pip install 'sfumato[ray]'") from error
    start(deployment, address)
    print(f"sfumato: serving {', '.join(deployment.each())} on {_url(deployment)}", flush=True)
    if not detach:
        _wait()
        stop(deployment, is_local=address is None)


def start(deployment: Deployment, address: str | None) -> None:
    """Start the application and wait until it serves. Raises ConfigError where Ray cannot."""
    import ray
    from ray import serve

    from sfumato.deploy.app import build

    try:
        if address is None:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
            # Nobody adds a node to a cluster of this command: what does not fit would be waited for in vain.
            check_room(reserved(deployment), ray.cluster_resources())
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        start_proxies(deployment)
        serve.run(build(deployment), name=deployment.name)
    except ConnectionError as error:
        raise ConfigError(f"--address {address}: {_last_line(str(error))}") from error
    except RuntimeError as error:
        raise ConfigError(f"Ray: {_reason(deployment.name) or _last_line(str(error))}") from error


def start_proxies(deployment: Deployment) -> None:
    """Let Ray Serve listen where the deployment says, unless it does so already."""
    from ray import serve

    http = deployment.http
    serve.start(proxy_location=PROXIES[http.proxies], http_options={"host": http.host, "port": http.port})


def stop(deployment: Deployment, *, is_local: bool) -> None:
    """End the application, and the cluster if it was started here; running requests get to finish."""
    import ray
    from ray import serve

    if is_local:
        serve.shutdown()
    else:
        serve.delete(deployment.name)
    ray.shutdown()


def _reason(name: str) -> str | None:
    """Return the error of ours that keeps an application from starting, if it is one."""
    from ray import serve

    application = serve.status().applications.get(name)
    for deployment in application.deployments.values() if application is not None else ():
        for line in deployment.message.splitlines():
            if line.strip().startswith(_OURS):
                return str(line).strip().removeprefix(_OURS)
    return None


def _last_line(text: str) -> str:
    return [line.strip() for line in text.splitlines() if line.strip()][-1]


def _url(deployment: Deployment) -> str:
    return f"http://{deployment.http.host}:{deployment.http.port}/v1"


def _wait() -> None:
    """Wait for Ctrl-C or SIGTERM."""
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    asked.wait()
