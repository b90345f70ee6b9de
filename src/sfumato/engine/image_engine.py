"""An image pipeline in this process: draw, stream, or drive it step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sfumato.config import EngineConfig
from sfumato.core.messages import FinishReason, Output, Picture, Submit, Usage
from sfumato.core.recording import UNRECORDED, Recorder
from sfumato.core.spec import ImageSpec
from sfumato.core.traits import ImageTraits
from sfumato.engine.build import resolve_device
from sfumato.engine.build_image import LoadedPipeline, build_image_loop, load_pipeline
from sfumato.engine.direct import DirectInbox, DirectOutbox, SteppedEngine
from sfumato.engine.image_params import ImageParams, make_image_spec
from sfumato.engine.image_peers import MakeImageEndpoint
from sfumato.engine.loop import EngineLoop
from sfumato.errors import CheckpointError, RequestError
from sfumato.image.door import ImageDoor
from sfumato.image.folder import find_pipeline
from sfumato.image.work import ImageWork


@dataclass(slots=True)
class Drawing:
    """One finished request: its pictures by index, why it ended and what it cost; the seeds repeat it."""

    pictures: list[Picture] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    usage: Usage = Usage()
    seeds: tuple[int, ...] = ()


class ImageEngine(SteppedEngine):
    """Holds one pipeline and its loop; not thread-safe.

    >>> engine = ImageEngine.load("sfumato-tiny-image")
    >>> engine.draw("a red circle above a green square")[0].pictures
    """

    def __init__(
        self,
        loaded: LoadedPipeline,
        loop: EngineLoop,
        door: ImageDoor,
        inbox: DirectInbox,
        outbox: DirectOutbox,
    ) -> None:
        super().__init__(loop, inbox, outbox)
        self._loaded = loaded
        self._door = door

    @classmethod
    def load(cls, model: str | EngineConfig, **options: Any) -> ImageEngine:
        """Load a pipeline by embedded name, folder or hub id; options are `EngineConfig`'s fields."""
        config = model if isinstance(model, EngineConfig) else EngineConfig(model=model, **options)
        config.check()
        path = find_pipeline(config.model)
        if path is None:
            raise CheckpointError(f"{config.model} is no pipeline of components: model_index.json is missing")
        return cls.from_loaded(load_pipeline(config, path, resolve_device(config.device, config.replica)))

    @classmethod
    def from_loaded(
        cls,
        loaded: LoadedPipeline,
        *,
        make_endpoint: MakeImageEndpoint | None = None,
        recorder: Recorder = UNRECORDED,
    ) -> ImageEngine:
        """Start an engine on a pipeline in memory.

        make_endpoint: links to engines of this process. recorder: told what each step does.
        """
        inbox, outbox = DirectInbox(), DirectOutbox()
        loop, door = build_image_loop(loaded, inbox, outbox, make_endpoint=make_endpoint, recorder=recorder)
        return cls(loaded, loop, door, inbox, outbox)

    @property
    def traits(self) -> ImageTraits:
        """Return what the pipeline declares."""
        return self._loaded.traits

    @property
    def name(self) -> str:
        """Return what the pipeline is called to others: no folder of this machine."""
        return self._loaded.name

    def add_request(
        self,
        asked: ImageParams | ImageSpec | ImageWork,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> str:
        """Queue one request for the next step and return its id.

        asked: parameters, a finished spec, or the work of a request that was paused elsewhere. Raises
        RequestError, also for an id that is active.
        """
        request_id = self.claim(request_id)
        if isinstance(asked, ImageWork):
            self._door.works[request_id] = asked
            spec = asked.state.spec
        else:
            spec = asked if isinstance(asked, ImageSpec) else make_image_spec(asked, self.traits)
            self._door.check(spec)
        return self.submit(Submit(request_id=request_id, spec=spec, priority=priority, timeout=timeout))

    def draw(
        self, prompts: str | Sequence[str], params: ImageParams | None = None, **options: Any
    ) -> list[Drawing]:
        """Draw prompts together, each as a request of its own; options are `ImageParams`' fields.

        Raises RequestError for the first one that is refused.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        drawings: dict[str, Drawing] = {}
        for text in texts:
            given = ImageParams(prompt=text, **options) if params is None else params.replaced(prompt=text)
            spec = make_image_spec(given, self.traits)
            drawings[self.add_request(spec)] = Drawing(seeds=spec.seeds)
        for output in self._outputs(set(drawings)):
            drawing = drawings[output.request_id]
            drawing.pictures += [picture for picture in output.pictures if not picture.is_preview]
            drawing.usage, drawing.error = output.usage, output.error
            drawing.finish_reason = output.finish_reason
        return list(drawings.values())

    def stream(self, params: ImageParams) -> Iterator[Output]:
        """Yield progress, previews and the pictures of one request; closing the generator aborts it."""
        yield from self._outputs({self.add_request(params)})

    def _outputs(self, open_ids: set[str]) -> Iterator[Output]:
        try:
            while open_ids:
                for turn in self.step():
                    for refusal in turn.refusals:
                        raise RequestError(refusal.message, field=refusal.field or "request")
                    for output in turn.outputs:
                        if output.request_id in open_ids:
                            if output.finish_reason is not None:
                                open_ids.discard(output.request_id)
                            yield output
        finally:
            for request_id in open_ids:
                self.abort(request_id)
