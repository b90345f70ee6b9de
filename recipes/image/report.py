"""Own the report on the exported model: every number that docs/default-image-model.md quotes, in one file."""

import json
import time

from recipes.image.export import load_exported, load_pipeline
from recipes.image.model import Painter
from recipes.image.plan import SCORES, ImagePlan
from recipes.image.sample import DEFAULT_GUIDANCE, DEFAULT_STEPS
from recipes.image.score import score_groups
from recipes.image.trial import try_scorer

FINAL_PROMPTS, SWEEP_PROMPTS, TRIAL_PICTURES = 500, 200, 500
SWEEP_STEPS = (8, 12, 20, 30)
SWEEP_GUIDANCE = (1.0, 2.0, 3.0, 5.0)
TIMED_PICTURES = 10


def write_report(plan: ImagePlan) -> None:
    """Score the exported weights at the defaults and around them, try the scorer, time the pipeline."""
    painter = load_exported(plan)
    report = {
        "steps": DEFAULT_STEPS,
        "guidance": DEFAULT_GUIDANCE,
        "held_out": score_groups(painter, FINAL_PROMPTS, seed=2),
        "sweep": _sweep(painter),
        "scorer": try_scorer(TRIAL_PICTURES),
        "seconds_per_picture": _time_pipeline(plan),
    }
    SCORES.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: report[key] for key in ("held_out", "scorer", "seconds_per_picture")}, indent=1))


def _sweep(painter: Painter) -> list[dict]:
    settings = [(DEFAULT_STEPS, guidance) for guidance in SWEEP_GUIDANCE]
    settings += [(steps, DEFAULT_GUIDANCE) for steps in SWEEP_STEPS if steps != DEFAULT_STEPS]
    lines = []
    for steps, guidance in settings:
        scores = score_groups(painter, SWEEP_PROMPTS, seed=3, num_steps=steps, guidance=guidance)
        lines.append({"steps": steps, "guidance": guidance, "scores": scores})
        print(json.dumps(lines[-1]), flush=True)
    return lines


def _time_pipeline(plan: ImagePlan) -> dict[str, float]:
    """Return the pipeline's mean seconds per picture, one at a time, for two lengths of the zero part."""
    pipeline = load_pipeline(plan)
    seconds = {}
    for num_zeros in (256, 16):
        arguments = {
            "num_inference_steps": DEFAULT_STEPS,
            "guidance_scale": DEFAULT_GUIDANCE,
            "max_sequence_length": num_zeros,
        }
        pipeline("a red circle", **arguments)
        started_at = time.perf_counter()
        for _ in range(TIMED_PICTURES):
            pipeline("a red circle above a green square", **arguments)
        seconds[f"{num_zeros}_zeros"] = round((time.perf_counter() - started_at) / TIMED_PICTURES, 3)
    return seconds
