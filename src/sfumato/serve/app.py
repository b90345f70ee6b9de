"""The HTTP application: routes, keys and errors around a registry of models."""

from __future__ import annotations

from fastapi import Depends, FastAPI

import sfumato
from sfumato.core.messages import Turn
from sfumato.serve import (
    chat,
    completions,
    errors,
    health,
    images,
    infill,
    metrics,
    models,
    profiles,
    scoring,
    steps,
    tokens,
    videos,
)
from sfumato.serve.auth import check_key
from sfumato.serve.image_files import ImageFiles
from sfumato.serve.metrics import Metrics
from sfumato.serve.playground import pages
from sfumato.serve.registry import Registry, ServedModel
from sfumato.serve.settings import ServerSettings
from sfumato.serve.steps import StepFeed
from sfumato.serve.uploads import BodyLimit
from sfumato.serve.video_jobs import VideoJobs


def create_app(registry: Registry, settings: ServerSettings) -> FastAPI:
    """Join the APIs into one application over engines that are running."""
    app = FastAPI(title="Sfumato", version=sfumato.__version__, docs_url=None, redoc_url=None)
    app.state.registry = registry
    app.state.settings = settings
    app.state.metrics = Metrics()
    app.state.join_pages = metrics.alone
    app.state.image_files = ImageFiles()
    app.state.video_jobs = VideoJobs()
    app.state.step_feeds = {name: StepFeed(model) for name, model in registry.models.items()}
    for model in registry.models.values():
        _watch(model, app.state.metrics, app.state.step_feeds[model.name])
    locked = [Depends(check_key)]
    for family in (models, chat, completions, infill, scoring, tokens, images, videos, steps):
        app.include_router(family.router, dependencies=locked)
    if settings.has_profile:
        app.include_router(profiles.router, dependencies=locked)
    for router in (health.router, metrics.router, images.open_router, pages.router):
        app.include_router(router)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    errors.install(app)
    return app


def _watch(model: ServedModel, counted: Metrics, feed: StepFeed) -> None:
    """Count every turn of a model's engine, and show it to whoever watches."""

    def on_turn(turn: Turn) -> None:
        counted.observe_turn(model.name, turn)
        feed.push(turn)

    model.client.on_turn = on_turn
