"""Own a student's lesson: partial states of its teacher's trajectories under growing noise and windows.

After d3LLM's pseudo-trajectory distillation (arXiv:2601.07568). Deviations: a state's noise is drawn between
half of the curriculum's noise and all of it, and ends at 1, because a block is decoded from masks alone.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from recipes.batches import CANVAS_LENGTHS, CANVAS_SHARES, IGNORED, TAIL_WEIGHT, Batch, Row, gather
from recipes.export import load_exported
from recipes.model import CLEAN_COPY, TinyModel
from recipes.plan import PLANS, Distillation, Plan
from recipes.tokenizer import END_ID, MASK_ID
from recipes.train import Lesson, State
from recipes.trajectories import Trajectories, collect


@dataclass(frozen=True)
class Difficulty:
    """A moment of the curriculum: window in positions, noise as the largest masked share of a window."""

    window: int
    noise: float

    @classmethod
    def at(cls, progress: float, distillation: Distillation) -> "Difficulty":
        """Return the difficulty after a share of the training tokens."""
        d, ramp = distillation, min(1.0, progress / distillation.ramp_share)
        return cls(
            window=round(d.first_window + ramp * (d.last_window - d.first_window)),
            noise=d.first_noise + ramp * (d.last_noise - d.first_noise),
        )


def masked_in_window(
    steps: list[int], answer_len: int, difficulty: Difficulty, random_source: random.Random
) -> tuple[int, set[int]]:
    """Draw a window that meets the answer; return its end and the positions in it that are decided last.

    steps: the step that decided each position; of equal ones any may be the last.
    """
    window = min(difficulty.window, len(steps))
    start = random_source.randint(0, min(len(steps) - window, answer_len))
    noise = difficulty.noise * random_source.uniform(0.5, 1.0)
    latest_first = sorted(range(start, start + window), key=lambda p: (-steps[p], random_source.random()))
    return start + window, set(latest_first[: max(1, round(noise * window))])


def student_row(
    prompt: list[int],
    answer: list[int],
    steps: list[int],
    difficulty: Difficulty,
    random_source: random.Random,
) -> Row:
    """Show what the teacher had decided in the window and before it; mask the rest, also what follows."""
    row = Row()
    for position, token_id in enumerate(prompt):
        row.append(token_id, position, CLEAN_COPY, 0, IGNORED, 0.0)
    answer_len = answer.index(END_ID) if END_ID in answer else len(answer)
    end, masked = masked_in_window(steps, answer_len, difficulty, random_source)
    canvas_length = random_source.choices(CANVAS_LENGTHS, weights=CANVAS_SHARES)[0]
    for i in range(max(canvas_length, len(answer))):
        position = len(prompt) + i
        if i in masked:
            weight = 1.0 if i <= answer_len else TAIL_WEIGHT
            row.append(MASK_ID, position, CLEAN_COPY, 0, answer[i], weight)
        else:
            row.append(answer[i] if i < end else MASK_ID, position, CLEAN_COPY, 0, IGNORED, 0.0)
    return row


def student_loss(model: TinyModel, batch: Batch, entropy_weight: float) -> Tensor:
    """Return the weighted mean cross-entropy, plus the entropy at those positions that are right already."""
    hidden = model.hidden(batch.token_ids, batch.positions, batch.copies, batch.blocks)
    predicted = batch.targets != IGNORED
    targets, weights = batch.targets[predicted], batch.weights[predicted]
    log_shares = functional.log_softmax(model.head(hidden[predicted]).float(), dim=-1)
    losses = functional.nll_loss(log_shares, targets, reduction="none")
    entropies = -(log_shares.exp() * log_shares).sum(-1)
    is_right = log_shares.argmax(-1) == targets
    return ((losses + entropy_weight * entropies * is_right) * weights).sum() / weights.sum()


def student_lesson(plan: Plan) -> Lesson:
    """Return the lesson of a student, whose trajectories are recorded first where they are missing."""
    distillation = plan.distillation
    assert distillation is not None
    trajectories = collect(plan)
    return Lesson(
        begin=lambda: begin_as_teacher(plan),
        draw=lambda state: draw_states(trajectories, plan, state),
        loss=lambda model, batch: student_loss(model, batch, distillation.entropy_weight),
    )


def begin_as_teacher(plan: Plan) -> State:
    """Return a state with the teacher's exported weights."""
    assert plan.distillation is not None
    teacher = load_exported(PLANS[plan.distillation.teacher].zoo_folder, plan).float()
    masters = {name: weight.detach().clone() for name, weight in teacher.named_parameters()}
    return State(masters=masters, average={name: weight.clone() for name, weight in masters.items()})


def draw_states(trajectories: Trajectories, plan: Plan, state: State) -> Iterator[tuple[int, Batch]]:
    """Yield (pool number, batch) forever; the state tells how far the curriculum is when a pool is drawn."""
    distillation = plan.distillation
    assert distillation is not None

    def draw(random_source: random.Random) -> Row:
        difficulty = Difficulty.at(state.tokens / plan.token_budget, distillation)
        i = random_source.randrange(len(trajectories.prompts))
        answer, steps = trajectories.answers[i].tolist(), trajectories.steps[i].tolist()
        return student_row(trajectories.prompts[i], answer, steps, difficulty, random_source)

    return gather(plan, state.pool, draw)
