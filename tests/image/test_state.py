"""A paused request is plain data: pickled here, resumed in another process, exactly."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import torch

from sfumato.engine.build_image import LoadedPipeline
from sfumato.image.state import Generators, ImageState
from sfumato.image.work import ImageWork
from tests.image.drawing import pixels, run, spec_for, start

_RESUME = """
import hashlib, pickle, sys, warnings
import torch
torch.set_num_threads(int(sys.argv[3]))
from pathlib import Path
from sfumato.image.work import ImageWork
from tests.goldens.images import load_case_pipeline
from sfumato.engine.image_engine import ImageEngine
loaded = load_case_pipeline(Path(sys.argv[1]))
engine = ImageEngine.from_loaded(loaded)
state = pickle.loads(Path(sys.argv[2]).read_bytes())
engine.add_request(ImageWork(state, loaded.family))
outputs = []
while engine.has_work:
    outputs += [output for turn in engine.step() for output in turn.outputs]
print(hashlib.sha256(outputs[-1].pictures[0].pixels).hexdigest())
"""


def state_after(loaded: LoadedPipeline, spec, steps: int) -> ImageState:  # type: ignore[no-untyped-def]
    """Return the state of a request when so many denoise steps are done."""
    engine = start(loaded)
    request_id = engine.add_request(spec)
    while True:
        engine.step()
        work = engine.request(request_id).work  # type: ignore[union-attr]
        assert isinstance(work, ImageWork)
        if work.state.is_encoded and work.state.step == steps:
            return work.state


def test_a_pickled_request_goes_on_in_another_process(sd15: LoadedPipeline, tmp_path: Path) -> None:
    spec = spec_for(sd15, num_inference_steps=6, scheduler="EulerAncestralDiscreteScheduler")
    expected = pixels(run(start(sd15), [spec])[0])[0]
    paused = tmp_path / "paused.pickle"
    paused.write_bytes(pickle.dumps(state_after(sd15, spec, 3)))
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RESUME, sd15.path, str(paused), str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parent.parent.parent,
    )
    assert answer.stdout.strip() == hashlib.sha256(expected).hexdigest()


def test_generators_keep_their_place(sd15: LoadedPipeline) -> None:
    generators = Generators.seeded((7, 8))
    torch.randn(5, generator=generators.each[1])
    copied = pickle.loads(pickle.dumps(generators))
    for mine, theirs in zip(generators.each, copied.each, strict=True):
        assert torch.equal(torch.randn(3, generator=mine), torch.randn(3, generator=theirs))


def test_a_multistep_scheduler_keeps_its_history(sd15: LoadedPipeline) -> None:
    spec = spec_for(sd15, num_inference_steps=6, scheduler="DPMSolverMultistepScheduler")
    expected = pixels(run(start(sd15), [spec])[0])
    state = pickle.loads(pickle.dumps(state_after(sd15, spec, 3)))
    engine = start(sd15)
    engine.add_request(ImageWork(state, sd15.family))
    outputs = [
        output for _ in iter(lambda: engine.has_work, False) for t in engine.step() for output in t.outputs
    ]
    assert pixels(outputs) == expected


def test_images_of_one_request_have_streams_of_their_own(sd15: LoadedPipeline) -> None:
    both = spec_for(sd15, n=2, seed=5)
    single = [spec_for(sd15, seed=5), spec_for(sd15, seed=6)]
    together = pixels(run(start(sd15, deterministic_rows=4), [both])[0])
    apart = [pixels(outputs)[0] for outputs in run(start(sd15, deterministic_rows=4), single)]
    assert together == apart
    shared = pixels(
        run(start(sd15, deterministic_rows=4), [spec_for(sd15, n=2, seed=5, shares_seed=True)])[0]
    )
    # One stream: the second image's noise follows the first one's.
    assert shared[0] == apart[0]
    assert shared[1] not in apart
