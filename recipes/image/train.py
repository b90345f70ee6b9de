"""Own the training loop and its saved state."""

import copy
import json
import time
from dataclasses import dataclass, field

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional

from recipes.image.batches import Batch, draw_batch
from recipes.image.model import Painter
from recipes.image.muon import Muon
from recipes.image.plan import LOG, ImagePlan
from recipes.image.score import score_groups
from recipes.image.tokenizer import PromptTokens

BETAS = (0.9, 0.98)
STEPS_PER_LINE = 100
CURVE_PROMPTS = 100


@dataclass
class State:
    """Everything that training continues from; `weights` and `average` map parameter names to f32 tensors."""

    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizers: list[dict] = field(default_factory=list)
    steps: int = 0
    images: int = 0
    evaluated_images: int = 0
    cpu_seconds: float = 0.0
    seconds: float = 0.0

    @classmethod
    def fresh(cls, plan: ImagePlan) -> "State":
        """Initialise from the plan's seed."""
        torch.manual_seed(plan.seed)
        weights = {name: weight.detach().clone() for name, weight in Painter(plan).named_parameters()}
        return cls(weights, copy.deepcopy(weights))

    @classmethod
    def exported(cls, plan: ImagePlan) -> "State":
        """Begin with the weights of the exported pipeline; optimizer and schedule begin anew."""
        pipeline = StableDiffusion3Pipeline.from_pretrained(str(plan.zoo_folder), dtype=torch.float32)
        painter = Painter(plan)
        for name in ("transformer", "text_encoder", "text_encoder_2"):
            getattr(painter, name).load_state_dict(getattr(pipeline, name).state_dict())
        weights = {name: weight.detach().clone() for name, weight in painter.named_parameters()}
        return cls(weights, copy.deepcopy(weights))

    @classmethod
    def load(cls, plan: ImagePlan) -> "State":
        """Read the last saved state."""
        return cls(**torch.load(plan.state_path, weights_only=True))

    def save(self, plan: ImagePlan) -> None:
        """Write by rename, so that a reader never sees half a file."""
        plan.state_path.parent.mkdir(parents=True, exist_ok=True)
        beside = plan.state_path.with_suffix(".partial")
        torch.save(self.__dict__, beside)
        beside.rename(plan.state_path)

    def progress(self, plan: ImagePlan) -> float:
        """Return the used share of the budget, 1 at the end."""
        return max(self.images / plan.image_budget, self.cpu_seconds / plan.cpu_seconds_budget)

    def averaged_model(self, plan: ImagePlan) -> Painter:
        """Return a model with the averaged weights."""
        painter = Painter(plan)
        painter.load_state_dict(self.average, strict=False)
        return painter.eval()


def rate_share(state: State, plan: ImagePlan) -> float:
    """Return the share of the full rate at the next step: linear warm-up, plateau, linear fall."""
    if state.steps < plan.warmup_steps:
        return (state.steps + 1) / plan.warmup_steps
    left = min(1.0, max(0.0, 1 - state.progress(plan)) / plan.decay_share)
    return plan.final_share + (1 - plan.final_share) * left


def flow_loss(painter: Painter, batch: Batch) -> Tensor:
    """Return the mean squared error of the predicted velocity (rectified flow, arXiv:2403.03206, eq. 13)."""
    sigma = batch.sigma.view(-1, 1, 1, 1)
    noisy = torch.lerp(batch.pictures, batch.noise, sigma)
    states, pooled = painter.encode(batch.token_ids)
    velocity = painter(noisy, batch.sigma, states, pooled, batch.num_zeros)
    return functional.mse_loss(velocity, batch.noise - batch.pictures)


def train(plan: ImagePlan) -> State:
    """Train from the saved state, if there is one, to the end of the budget; log scores on the way."""
    state = State.load(plan) if plan.state_path.exists() else State.fresh(plan)
    painter = Painter(plan)
    painter.load_state_dict(state.weights, strict=False)
    for block in painter.transformer.transformer_blocks:
        block.compile()
    parameters = dict(painter.named_parameters())
    optimizers = make_optimizers(painter, plan)
    for optimizer, saved in zip(optimizers, state.optimizers, strict=False):
        optimizer.load_state_dict(saved)
    full_rates = (plan.matrix_learning_rate, plan.learning_rate)
    tokens = PromptTokens()
    clock = Clock(state)
    losses: list[float] = []
    saved_at = time.process_time()

    def keep() -> None:
        state.weights = {name: weight.detach() for name, weight in parameters.items()}
        state.optimizers = [optimizer.state_dict() for optimizer in optimizers]
        state.save(plan)

    while state.progress(plan) < 1:
        batch = draw_batch(plan, state.steps, tokens)
        loss = flow_loss(painter, batch)
        painter.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimizer, full_rate in zip(optimizers, full_rates, strict=True):
            optimizer.param_groups[0]["lr"] = full_rate * rate_share(state, plan)
            optimizer.step()
        state.steps += 1
        state.images += plan.batch_size
        _average(state, parameters, plan)
        losses.append(float(loss.detach()))
        clock.tell(state)
        if state.steps % STEPS_PER_LINE == 0:
            _print_progress(state, sum(losses) / len(losses), plan)
            losses = []
        if time.process_time() - saved_at > 2 * plan.seconds_per_save:
            keep()
            saved_at = time.process_time()
        if state.images - state.evaluated_images >= plan.images_per_evaluation:
            log_scores(state, plan)
    log_scores(state, plan)
    keep()
    return state


class Clock:
    """Adds this process's time to what earlier runs of the same state have used."""

    def __init__(self, state: State) -> None:
        self._cpu_before = state.cpu_seconds - time.process_time()
        self._before = state.seconds - time.monotonic()

    def tell(self, state: State) -> None:
        """Write the time used so far into the state."""
        state.cpu_seconds = self._cpu_before + time.process_time()
        state.seconds = self._before + time.monotonic()


def make_optimizers(painter: Painter, plan: ImagePlan) -> tuple[Muon, torch.optim.AdamW]:
    """Return Muon for the matrices of attention and feed-forward, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in painter.named_parameters():
        # The wide adaLN layers would double Muon's cost.
        is_inner = "transformer_blocks" in name and parameter.dim() == 2 and "norm" not in name
        (matrices if is_inner else others).append(parameter)
    return (
        Muon(matrices, plan.matrix_learning_rate, weight_decay=plan.weight_decay),
        torch.optim.AdamW(others, plan.learning_rate, betas=BETAS, weight_decay=0.0, fused=True),
    )


@torch.no_grad()
def _average(state: State, parameters: dict[str, Tensor], plan: ImagePlan) -> None:
    decay = min(plan.ema_decay, (1 + state.steps) / (10 + state.steps))
    averages = [state.average[name] for name in parameters]
    torch._foreach_lerp_(averages, list(parameters.values()), 1 - decay)


def _print_progress(state: State, loss: float, plan: ImagePlan) -> None:
    print(
        f"{state.images / 1e3:.1f}k images, loss {loss:.4f}, {state.seconds:.0f} s, "
        f"{state.cpu_seconds:.0f} CPU s, rate {rate_share(state, plan):.3f}",
        flush=True,
    )


def log_scores(state: State, plan: ImagePlan) -> None:
    """Score the averaged weights on a few held-out prompts and append one line to the log."""
    scores = score_groups(state.averaged_model(plan), CURVE_PROMPTS, seed=1)
    line = {
        "images": state.images,
        "steps": state.steps,
        "seconds": round(state.seconds),
        "cpu_seconds": round(state.cpu_seconds),
        "rate_share": round(rate_share(state, plan), 4),
        "scores": scores,
    }
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with LOG.open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
    print(json.dumps(scores), flush=True)
    state.evaluated_images = state.images
