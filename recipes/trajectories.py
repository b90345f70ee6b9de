"""Own the teacher's trajectories: its answers to training prompts and the step that decided each token.

Letters: N prompts, C positions of the canvas.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recipes.data import draw_dialogue
from recipes.plan import PLANS, Distillation, Plan
from sfumato import Engine, Limits, SamplingParams

PROMPTS_PER_FILE = 1024
ROWS_PER_FORWARD = 64


@dataclass(frozen=True)
class Trajectories:
    """answers: u16[N, C], the teacher's whole canvas; steps: u8[N, C], the step that decided it, from 1."""

    prompts: list[list[int]]
    answers: NDArray[np.uint16]
    steps: NDArray[np.uint8]

    def save(self, path: Path) -> None:
        """Write by rename, so that an interrupted run leaves whole files only."""
        beside = path.with_suffix(".partial")
        flat = np.concatenate([np.asarray(prompt, dtype=np.uint16) for prompt in self.prompts])
        ends = np.cumsum([len(prompt) for prompt in self.prompts])
        with beside.open("wb") as file:
            np.savez_compressed(file, prompts=flat, ends=ends, answers=self.answers, steps=self.steps)
        beside.rename(path)

    @classmethod
    def load(cls, path: Path) -> "Trajectories":
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            prompts = [part.tolist() for part in np.split(arrays["prompts"], arrays["ends"][:-1])]
            return cls(prompts, arrays["answers"], arrays["steps"])


def record(engine: Engine, prompts: list[list[int]], distillation: Distillation) -> Trajectories:
    """Let the teacher fill a canvas behind every prompt, and note when each position was decided."""
    params = SamplingParams(
        max_tokens=distillation.canvas_length,
        ignore_eos=True,
        algorithm="llada",
        algorithm_parameters={"steps": distillation.steps_per_canvas},
        include_canvas=True,
    )
    shape = len(prompts), distillation.canvas_length
    answers, steps = np.zeros(shape, dtype=np.uint16), np.zeros(shape, dtype=np.uint8)
    index = {engine.add_request(prompt, params): i for i, prompt in enumerate(prompts)}
    while engine.has_work:
        for output in (output for turn in engine.step() for output in turn.outputs):
            if output.canvas is None:
                continue
            view, i = output.canvas, index[output.request_id]
            positions = view.start + np.flatnonzero(~np.asarray(view.undecided))
            new = positions[steps[i, positions] == 0]
            steps[i, new] = view.step
            answers[i, new] = np.asarray(view.token_ids)[new - view.start]
    assert steps.all()
    return Trajectories(prompts, answers, steps)


def collect(plan: Plan) -> Trajectories:
    """Return the plan's trajectories, recording those that are not on disk yet.

    Prompts are drawn as for training; a file's depend on the seed and its number alone.
    """
    distillation = plan.distillation
    assert distillation is not None
    plan.trajectory_folder.mkdir(parents=True, exist_ok=True)
    engine, parts = None, []
    for number in range(-(-distillation.num_prompts // PROMPTS_PER_FILE)):
        path = plan.trajectory_folder / f"{number:03d}.npz"
        if not path.exists():
            teacher = PLANS[distillation.teacher].model_name
            limits = Limits(max_running_requests=ROWS_PER_FORWARD)
            engine = engine or Engine.load(teacher, device="cpu", limits=limits)
            _record_file(engine, plan, number).save(path)
            print(f"recorded {path}", flush=True)
        parts.append(Trajectories.load(path))
    return Trajectories(
        prompts=[prompt for part in parts for prompt in part.prompts],
        answers=np.concatenate([part.answers for part in parts]),
        steps=np.concatenate([part.steps for part in parts]),
    )


def _record_file(engine: Engine, plan: Plan, number: int) -> Trajectories:
    assert plan.distillation is not None
    random_source = random.Random(f"trajectories {plan.name} {plan.seed} {number}")
    chats = [draw_dialogue(random_source)[0] for _ in range(PROMPTS_PER_FILE)]
    return record(engine, [engine.encode(chat) for chat in chats], plan.distillation)
