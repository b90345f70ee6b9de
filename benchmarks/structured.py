"""What a grammar costs and gives: `python -m benchmarks.structured`.

Two tables. answers: held-out extraction questions with and without a schema, and with the schema on questions
that do not ask for JSON: valid answers, exact ones, tokens per forward, tokens per second, medians of pairs.
cost: the time that the automaton of an embedded model takes of a step of the random model of 150 million
parameters. vocabulary: the same with a vocabulary of 150,000 tokens, trained on the sources of Python's own
library, in the model and in the automaton.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

import tokenizers
import torch
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from recipes.data import draw_held_out
from sfumato import Engine, EngineConfig, Limits, SamplingParams
from sfumato.core.spec import Grammar
from sfumato.text import constraint, transform

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "job": {"type": "string"},
        "city": {"type": "string"},
    },
    "required": ["name", "age", "job", "city"],
    "additionalProperties": False,
}
GRAMMAR = Grammar(kind="json_schema", source=json.dumps(SCHEMA))
SEED = 2
MODELS = ("sfumato-tiny-sdar", "sfumato-tiny-llada")


def is_valid(text: str) -> bool:
    """Whether a text is an object of the schema's fields and types."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(found, dict)
        and found.keys() == SCHEMA["properties"].keys()  # type: ignore[attr-defined]
        and isinstance(found["age"], int)
        and 0 <= found["age"] <= 150
        and all(isinstance(found[name], str) for name in ("name", "job", "city"))
    )


def answers_table(num_questions: int, num_pairs: int) -> Table:
    """Return what a schema gives and costs on the embedded models."""
    table = Table(title=f"extraction as JSON, the server's default, medians of {num_pairs} pairs")
    for heading in ("model", "questions", "schema", "valid", "exact", "TPF", "tokens/s", "ratio"):
        table.add_column(heading, justify="right")
    for model in MODELS:
        engine = Engine.load(
            EngineConfig(model=model, device="cpu", limits=Limits(max_running_requests=32), dtype="float32")
        )
        for task in ("extraction", "rewriting"):
            examples = draw_held_out(task, num_questions, SEED)
            chats = [[{"role": "user", "content": example.question}] for example in examples]
            rates: dict[bool, list[float]] = {False: [], True: []}
            rows = {}
            for number in range(num_pairs + 1):
                for has_schema in (False, True) if number % 2 else (True, False):
                    params = SamplingParams(max_tokens=128, grammar=GRAMMAR if has_schema else None)
                    started = time.perf_counter()
                    choices = engine.generate(chats, params)
                    seconds = time.perf_counter() - started
                    tokens = sum(len(choice.token_ids) for choice in choices)
                    if number:
                        rates[has_schema].append(tokens / seconds)
                    is_exact = [c.text == e.answer for c, e in zip(choices, examples, strict=True)]
                    rows[has_schema] = (
                        f"{100 * statistics.mean(is_valid(choice.text) for choice in choices):.1f} %",
                        f"{100 * statistics.mean(is_exact):.1f} %",
                        f"{tokens / sum(choice.usage.nfe for choice in choices):.2f}",
                    )
            ratio = statistics.median(w / p for p, w in zip(rates[False], rates[True], strict=True))
            for has_schema in (False, True):
                table.add_row(
                    model,
                    task,
                    "yes" if has_schema else "no",
                    *rows[has_schema],
                    f"{statistics.median(rates[has_schema]):.0f}",
                    f"{ratio:.2f}" if has_schema else "",
                )
    return table


class Stopwatch:
    """Adds up the seconds of some functions; they run one inside another nowhere."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, owner: object, name: str) -> None:
        """Put a stopwatch around a function of a class or module."""
        inner = getattr(owner, name)

        def timed(*arguments: object, **named: object) -> object:
            started = time.perf_counter()
            try:
                return inner(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - started

        setattr(owner, name, timed)


def automaton_watch() -> Stopwatch:
    """Return a stopwatch around all that a grammar does in a step."""
    watch = Stopwatch()
    for name in ("allowed", "restrict"):
        watch.watch(constraint.Constraint, name)
    watch.watch(transform, "_obey")
    return watch


def cost_table(batches: list[int]) -> Table:
    """Return the automaton's time per step and request, beside a step of the 150M model."""
    from benchmarks.models import fast_dtype, random_loaded
    from benchmarks.text import make_prompts, run_engine, setting_of

    watch = automaton_watch()
    engine = Engine.load(
        EngineConfig(model=MODELS[0], device="cpu", limits=Limits(max_running_requests=32), dtype="float32")
    )
    table = Table(title=f"automata per step, {torch.get_num_threads()} thread(s)")
    for heading in ("requests", "automata ms/step", "150m ms/step", "share"):
        table.add_column(heading, justify="right")
    setting = setting_of(
        "sdar-150m", random_loaded("sdar", fast_dtype(), 32, Limits(max_running_requests=max(batches)))
    )
    large = Engine.from_loaded(setting.loaded)
    for batch in batches:
        examples = draw_held_out("extraction", batch, SEED)
        chats = [[{"role": "user", "content": example.question}] for example in examples]
        for _ in range(2):
            engine.steps.clear()
            watch.seconds = 0.0
            engine.generate(chats, SamplingParams(max_tokens=128, grammar=GRAMMAR))
        automata = watch.seconds / len(engine.steps)
        run_engine(setting, large, make_prompts(setting, batch)())
        step = statistics.mean(step.device_seconds for step in large.steps if step.rows)
        table.add_row(
            str(batch), f"{1e3 * automata:.2f}", f"{1e3 * step:.1f}", f"{100 * automata / step:.2f} %"
        )
    return table


def train_tokenizer(folder: Path, size: int) -> int:
    """Write a byte-level tokenizer of at most so many tokens, the last its end token; return how many."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = (path.read_text("utf-8", "replace") for path in sorted(library.rglob("*.py")))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - 1,
        min_frequency=1,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sources, trainer)
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return int(tokenizer.get_vocab_size())


def vocabulary_table(size: int, batches: list[int]) -> Table:
    """Return the automata's time beside the steps of a model of the same large vocabulary."""
    from benchmarks.models import SHAPE, loaded_of, random_loaded

    table = Table(title=f"automata over a large vocabulary, {torch.get_num_threads()} thread(s)")
    for heading in ("requests", "tokens", "automata ms/step", "step ms", "share", "share without the first"):
        table.add_column(heading, justify="right")
    watch = automaton_watch()
    with tempfile.TemporaryDirectory() as name:
        num_tokens = train_tokenizer(Path(name), size)
        limits = Limits(max_running_requests=max(batches))
        traits = replace(
            random_loaded("sdar", torch.float32, 32, limits).traits,
            vocab_size=num_tokens + 1,
            mask_token_id=num_tokens,
            eos_token_ids=(num_tokens - 1,),
        )
        loaded = loaded_of(
            traits, dataclasses.replace(SHAPE, vocab_size=num_tokens + 1), torch.float32, limits
        )
        folder = dataclasses.replace(loaded.folder, path=Path(name))
        engine = Engine.from_loaded(dataclasses.replace(loaded, folder=folder))
        for batch in batches:
            params = [SamplingParams(max_tokens=64, grammar=GRAMMAR, seed=seed) for seed in range(batch)]
            prompts = [[5 + seed, 6, 7] for seed in range(batch)]
            shares, millis, steps = [], [], []
            for _ in range(2):
                engine.steps.clear()
                watch.seconds = 0.0
                engine.generate(prompts, params)
                device = [step.device_seconds for step in engine.steps if step.rows]
                shares.append(watch.seconds / sum(device))
                millis.append(1e3 * watch.seconds / len(device))
                steps.append(1e3 * statistics.mean(device))
            table.add_row(
                str(batch),
                str(num_tokens),
                f"{millis[-1]:.2f}",
                f"{steps[-1]:.1f}",
                f"{100 * shares[0]:.2f} %",
                f"{100 * shares[1]:.2f} %",
            )
    return table


def main() -> None:
    """Print the chosen tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structured", description=__doc__)
    parser.add_argument("--tables", default="answers,cost,vocabulary")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--batches", default="1,8", help="requests at once, of the table cost")
    parser.add_argument("--vocabulary", type=int, default=150_000, help="tokens, of the table vocabulary")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=130)
    if "answers" in options.tables:
        console.print(answers_table(options.questions, options.pairs))
    if "cost" in options.tables:
        console.print(cost_table([int(batch) for batch in options.batches.split(",")]))
    if "vocabulary" in options.tables:
        batches = [int(batch) for batch in options.batches.split(",")]
        console.print(vocabulary_table(options.vocabulary, batches))


if __name__ == "__main__":
    main()
