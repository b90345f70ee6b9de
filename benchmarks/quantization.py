"""Eight-bit weights against the checkpoint's own: `python -m benchmarks.quantization`.

Three tables. speed: random models of 150 million parameters, both engines in turn, medians of the pairs'
ratios. answers: exact answers of the embedded models to held-out questions. logits: how far the logits of the
embedded models move, on prompts and half-open blocks of their own tasks.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.accuracy import QUESTIONS, SEED
from benchmarks.models import fast_dtype, random_loaded
from benchmarks.text import Setting, make_prompts, run_engine, setting_of
from recipes.data import draw_held_out
from sfumato import Engine, EngineConfig, Limits, SamplingParams
from sfumato.engine.build import Loaded, load
from sfumato.models.batch import Batch, Segment, group_segments
from sfumato.models.folder import embedded_models
from sfumato.models.int8 import zero_point

TABLES = ("speed", "answers", "logits")


def speed_table(families: list[str], batches: list[int], num_pairs: int) -> Table:
    """Return output tokens per second of both."""
    threads = torch.get_num_threads()
    table = Table(title=f"150m, {fast_dtype()} / int8, {threads} thread(s), medians of {num_pairs} pairs")
    for heading in ("model", "requests", "plain tok/s", "int8 tok/s", "ratio"):
        table.add_column(heading, justify="right")
    limits = Limits(max_running_requests=max(batches))
    for family in families:
        plain, narrow = (
            setting_of(f"{family}-150m", random_loaded(family, fast_dtype(), 32, limits, is_narrow=is_narrow))
            for is_narrow in (False, True)
        )
        for batch in batches:
            table.add_row(plain.name, str(batch), *_speeds(plain, narrow, batch, num_pairs))
    return table


def _speeds(plain: Setting, narrow: Setting, batch: int, num_pairs: int) -> list[str]:
    engines = [(setting, Engine.from_loaded(setting.loaded)) for setting in (plain, narrow)]
    make = make_prompts(plain, batch)
    pairs = []
    for number in range(num_pairs + 1):
        prompts = make()
        order = engines if number % 2 else engines[::-1]
        found = {setting is narrow: run_engine(setting, engine, prompts) for setting, engine in order}
        if number:
            pairs.append((found[False].tokens_per_second, found[True].tokens_per_second))
    medians = [statistics.median(values) for values in zip(*pairs, strict=True)]
    ratio = statistics.median(fast / slow for slow, fast in pairs)
    return [*(f"{value:.1f}" for value in medians), f"{ratio:.2f}"]


def embedded(model: str, quantization: str | None) -> Loaded:
    """Load an embedded model."""
    limits = Limits(max_running_requests=32)
    return load(EngineConfig(model=model, device="cpu", limits=limits, quantization=quantization))


def answers_table(share: float) -> Table:
    """Return exact answers of both, by the server's default."""
    table = Table(title="exact answers to held-out questions, the server's default")
    for heading in ("model", "weights", "task", "questions", "correct", "TPF", "tokens/s"):
        table.add_column(heading, justify="right")
    for model in embedded_models():
        for quantization in (None, "int8"):
            loaded = embedded(model, quantization)
            engine = Engine.from_loaded(loaded)
            for task, number in QUESTIONS.items():
                examples = draw_held_out(task, int(number * share), SEED)
                started = time.perf_counter()
                chats = [[{"role": "user", "content": example.question}] for example in examples]
                choices = engine.generate(chats, SamplingParams())
                seconds = time.perf_counter() - started
                correct = sum(c.text == e.answer for c, e in zip(choices, examples, strict=True))
                tokens = sum(len(choice.token_ids) for choice in choices)
                forwards = sum(choice.usage.nfe for choice in choices)
                table.add_row(
                    model,
                    quantization or str(loaded.dtype).removeprefix("torch."),
                    task,
                    str(len(examples)),
                    f"{100 * correct / len(examples):.1f} %",
                    f"{tokens / forwards:.2f}",
                    f"{tokens / seconds:.0f}",
                )
    return table


@torch.inference_mode()
def logits_of(loaded: Loaded, ids: list[int]) -> torch.Tensor:
    """Return the logits [L, V] of a canvas that sees all of itself."""
    group = group_segments([Segment(0, len(ids), None, None)], "cpu")
    batch = Batch(token_ids=torch.tensor(ids), positions=torch.arange(len(ids)), groups=group)
    return loaded.model.head(loaded.model.hidden(batch)).float()


def logits_table(num_questions: int) -> Table:
    """Return how far logits move at the masked positions of answers that are half open."""
    table = Table(title="logits at open positions, int8 against the checkpoint's own weights")
    for heading in ("model", "positions", "relative error", "KL (nats)", "same best token"):
        table.add_column(heading, justify="right")
    for model in embedded_models():
        plain, narrow = embedded(model, None), embedded(model, "int8")
        engine = Engine.from_loaded(plain)
        errors, divergences, same = [], [], []
        for task in QUESTIONS:
            for number, example in enumerate(draw_held_out(task, num_questions, SEED)):
                chat = [{"role": "user", "content": example.question}]
                ids = [*engine.encode(chat), *engine.encode(example.answer)]
                places = range(len(engine.encode(chat)) + number % 2, len(ids), 2)
                for place in places:
                    ids[place] = plain.traits.mask_token_id
                wide, close = (logits_of(loaded, ids)[list(places)] for loaded in (plain, narrow))
                errors.append(float((close - wide).norm() / wide.norm()))
                log_wide = wide.log_softmax(-1)
                divergences.append((log_wide.exp() * (log_wide - close.log_softmax(-1))).sum(-1))
                same.append(wide.argmax(-1) == close.argmax(-1))
        agree = torch.cat(same).float()
        table.add_row(
            model,
            str(len(agree)),
            f"{statistics.mean(errors):.4f}",
            f"{float(torch.cat(divergences).mean()):.5f}",
            f"{100 * float(agree.mean()):.2f} %",
        )
    return table


def main() -> None:
    """Print the chosen tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__)
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--families", default="sdar,llada", help="of the table speed")
    parser.add_argument("--batches", default="1,8", help="requests at once, of the table speed")
    parser.add_argument("--pairs", type=int, default=3, help="of the table speed")
    parser.add_argument("--share", type=float, default=1.0, help="of the questions, of the table answers")
    parser.add_argument("--questions", type=int, default=50, help="per task, of the table logits")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=130)
    console.print(f"activations of {7 if zero_point() == 64 else 8} bits on this CPU")
    if "speed" in options.tables:
        batches = [int(batch) for batch in options.batches.split(",")]
        console.print(speed_table(options.families.split(","), batches, options.pairs))
    if "answers" in options.tables:
        console.print(answers_table(options.share))
    if "logits" in options.tables:
        console.print(logits_table(options.questions))


if __name__ == "__main__":
    main()
