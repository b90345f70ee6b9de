"""Own the training loop and its saved state: bf16 weights to compute with, float32 masters to learn with."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from recipes.batches import IGNORED, Batch, draw_batches
from recipes.evaluate import score_groups
from recipes.model import TinyModel
from recipes.plan import LOGS, PLANS, Plan
from recipes.tokenizer import load_tokenizer
from recipes.warm_start import fold_head_norms

CURVE_QUESTIONS = 60
BETAS = (0.9, 0.98)
STEPS_PER_LINE = 100


@dataclass
class State:
    """Everything that training continues from; `masters` and `average` map parameter names to f32 tensors."""

    masters: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict = field(default_factory=dict)
    steps: int = 0
    tokens: int = 0
    pool: int = 0
    evaluated_tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def fresh(cls, plan: Plan, tokenizer: Tokenizer) -> "State":
        """Initialise from the plan's seed, or from the snapshot that it starts from."""
        if plan.starts_from is None:
            torch.manual_seed(plan.seed)
            masters = {name: weight.detach().clone() for name, weight in TinyModel(plan).named_parameters()}
        else:
            earlier = PLANS[plan.starts_from]
            if not earlier.snapshot_path.exists():
                raise FileNotFoundError(
                    f"{earlier.snapshot_path}: run `python -m recipes {earlier.name}` first"
                )
            masters = fold_head_norms(cls.load(earlier.snapshot_path).average, earlier, tokenizer)
        return cls(masters=masters, average={name: weight.clone() for name, weight in masters.items()})

    @classmethod
    def load(cls, path: Path) -> "State":
        """Read what `save` wrote."""
        return cls(**torch.load(path, weights_only=True))

    def save(self, path: Path) -> None:
        """Write by rename, so that a reader never sees half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".partial")
        torch.save(self.__dict__, beside)
        beside.rename(path)


@dataclass(frozen=True)
class Lesson:
    """What a model learns from: the state it begins with, its batches and its loss."""

    begin: Callable[[], State]
    draw: Callable[[State], Iterator[tuple[int, Batch]]]
    loss: Callable[[TinyModel, Batch], Tensor]


def data_lesson(plan: Plan) -> Lesson:
    """Return the lesson of the models that learn from the data itself."""
    tokenizer = load_tokenizer(plan.tokenizer_path)
    return Lesson(
        begin=lambda: State.fresh(plan, tokenizer),
        draw=lambda state: draw_batches(tokenizer, plan, state.pool),
        loss=batch_loss,
    )


def averaged_model(state: State, plan: Plan) -> TinyModel:
    """Return an uncompiled bf16 model with the averaged weights, as they are exported."""
    model = TinyModel(plan)
    model.load_state_dict(state.average)
    return model.to(torch.bfloat16).eval()


def learning_rate(state: State, plan: Plan) -> float:
    """Return the rate after warm-up, a constant part and a linear fall at the end of the token budget."""
    warm = min(1.0, (state.steps + 1) / plan.warmup_steps)
    left = max(0.0, plan.token_budget - state.tokens) / (plan.decay_share * plan.token_budget)
    fall = plan.final_learning_rate + (plan.learning_rate - plan.final_learning_rate) * min(1.0, left)
    return warm * fall


def batch_loss(model: TinyModel, batch: Batch) -> Tensor:
    """Return the weighted mean cross-entropy over the masked positions."""
    hidden = model.hidden(batch.token_ids, batch.positions, batch.copies, batch.blocks)
    predicted = batch.targets != IGNORED
    logits = model.head(hidden[predicted]).float()
    losses = functional.cross_entropy(logits, batch.targets[predicted], reduction="none")
    weights = batch.weights[predicted]
    return (losses * weights).sum() / weights.sum()


def train(plan: Plan, lesson: Lesson) -> State:
    """Train or resume until the plan's token budget is spent; append the curve to recipes/logs."""
    state = State.load(plan.state_path) if plan.state_path.exists() else lesson.begin()
    model = TinyModel(plan)
    model.load_state_dict(state.masters)
    model.to(torch.bfloat16)
    model.compile_blocks()
    decayed = [w for w in state.masters.values() if w.dim() == 2]
    kept = [w for w in state.masters.values() if w.dim() == 1]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=BETAS, foreach=True)
    if state.optimizer:
        optimizer.load_state_dict(state.optimizer)
    saved_at = started_at = time.monotonic()
    spent_before, losses = state.seconds, []

    def keep() -> None:
        state.optimizer = optimizer.state_dict()
        state.save(plan.state_path)

    for pool, batch in lesson.draw(state):
        if state.tokens >= plan.token_budget:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state, plan)
        loss = lesson.loss(model, batch)
        model.zero_grad(set_to_none=True)
        loss.backward()
        _update(model, state, optimizer, plan)
        losses.append(float(loss.detach()))
        state.steps += 1
        # The pool in progress is not finished, so a resumed run starts after it.
        state.tokens, state.pool = state.tokens + batch.token_ids.numel(), pool + 1
        state.seconds = spent_before + time.monotonic() - started_at
        if state.steps % STEPS_PER_LINE == 0:
            mean_loss = sum(losses) / len(losses)
            print(
                f"{state.tokens / 1e6:.2f}M tokens, loss {mean_loss:.4f}, {state.seconds:.0f} s", flush=True
            )
            losses = []
        if plan.snapshot_tokens and state.tokens >= plan.snapshot_tokens and not plan.snapshot_path.exists():
            state.save(plan.snapshot_path)
        if time.monotonic() - saved_at > plan.seconds_per_save:
            keep()
            saved_at = time.monotonic()
        if state.tokens - state.evaluated_tokens >= plan.tokens_per_evaluation:
            log_scores(state, plan)
            keep()
    if state.evaluated_tokens < state.tokens:
        log_scores(state, plan)
    keep()
    return state


def _update(model: TinyModel, state: State, optimizer: torch.optim.AdamW, plan: Plan) -> None:
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        state.masters[name].grad = weight.grad.float()
    torch.nn.utils.clip_grad_norm_(state.masters.values(), 1.0)
    optimizer.step()
    ema_decay = min(plan.ema_decay, (1 + state.steps) / (10 + state.steps))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            master = state.masters[name]
            master.grad = None
            weight.copy_(master)
            state.average[name].lerp_(master, 1 - ema_decay)


def log_scores(state: State, plan: Plan) -> None:
    """Score the averaged weights on a few held-out questions and append one line to the model's log."""
    scores = score_groups(
        averaged_model(state, plan), load_tokenizer(plan.tokenizer_path), CURVE_QUESTIONS, seed=1
    )
    as_dicts = {rule: {group: asdict(score) for group, score in by.items()} for rule, by in scores.items()}
    line = {
        "tokens": state.tokens,
        "steps": state.steps,
        "seconds": round(state.seconds),
        "learning_rate": round(learning_rate(state, plan), 7),
        "scores": as_dicts,
    }
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"{plan.name}.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    summary = {r: {g: (s.correct, s.tokens_per_forward) for g, s in by.items()} for r, by in scores.items()}
    print(summary, flush=True)
    state.evaluated_tokens = state.tokens
