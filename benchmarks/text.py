"""The engine against loops over the same model: `make bench`, or `python -m benchmarks.text`.

Every figure is the median of paired runs: naive and engine in turn, in one process, on the same prompts;
ratios are medians of the pairs' ratios. The naive loop takes one request after another, so its rate does not
depend on how many there are: it is timed on NAIVE_REQUESTS of each pair's prompts.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import cached, joint, roofline
from benchmarks.models import MASK_ID, fast_dtype, random_loaded, random_model
from benchmarks.naive import llada_generate, sdar_generate
from sfumato import Engine, EngineConfig, Limits, SamplingParams
from sfumato.engine.build import Loaded, load
from sfumato.engine.profile import Profile
from sfumato.engine.profile_config import DEFAULT_START, DEFAULT_STEPS, ProfileConfig
from sfumato.models.decoder import Decoder
from sfumato.models.weights import load_model

BATCHES = (1, 4, 8, 16)
NAIVE_REQUESTS = 1
TABLES = {
    "naive": "engine / naive loop",
    "dual": "dual cache / naive whole-canvas loop",
    "joint": "eight unlike requests, together and one after another",
}
_MIB = 1 << 20


@dataclass(frozen=True)
class Setting:
    """One model and how it decodes: prompt, output and block in tokens; tokens_per_step by schedule."""

    name: str
    loaded: Loaded
    plain: Decoder
    prompt_len: int
    max_tokens: int
    block_length: int
    tokens_per_step: int

    @property
    def params(self) -> SamplingParams:
        """Return the engine's parameters; the schedule is the naive loop's."""
        if self.loaded.traits.has_exact_cache:
            parameters = {
                "remasking_strategy": "low_confidence_static",
                "denoising_steps": self.block_length // self.tokens_per_step,
            }
            return self._params("sdar", parameters)
        return self._params("llada", {"steps": self.max_tokens // self.tokens_per_step})

    def _params(self, algorithm: str, parameters: dict[str, int | str]) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            ignore_eos=True,
            seed=0,
            block_length=self.block_length,
            algorithm=algorithm,
            algorithm_parameters=dict(parameters),
        )


@dataclass(frozen=True)
class Run:
    """One timed run: output tokens per second, forwards, NFE per request, the host's share of step time."""

    tokens_per_second: float
    num_forwards: int
    nfe: float
    host_share: float
    host_ms: float
    seconds: float = 0.0


def run_naive(setting: Setting, prompts: list[list[int]]) -> Run:
    """Time the naive loop over the prompts, one after another."""
    mask_id = setting.loaded.traits.mask_token_id
    started = time.perf_counter()
    forwards = 0
    for prompt in prompts:
        if setting.loaded.traits.has_exact_cache:
            forwards += sdar_generate(
                setting.plain,
                prompt,
                mask_id=mask_id,
                gen_length=setting.max_tokens,
                block_length=setting.block_length,
                steps_per_block=setting.block_length // setting.tokens_per_step,
            ).num_forwards
        else:
            forwards += llada_generate(
                setting.plain,
                prompt,
                mask_id=mask_id,
                steps=setting.max_tokens // setting.tokens_per_step,
                gen_length=setting.max_tokens,
                block_length=setting.block_length,
            ).num_forwards
    seconds = time.perf_counter() - started
    return Run(len(prompts) * setting.max_tokens / seconds, forwards, forwards / len(prompts), 0.0, 0.0)


def run_engine(setting: Setting, engine: Engine, prompts: list[list[int]]) -> Run:
    """Time the engine over the prompts, all at once."""
    engine.steps.clear()
    started = time.perf_counter()
    choices = engine.generate(prompts, setting.params)
    seconds = time.perf_counter() - started
    tokens = sum(len(choice.token_ids) for choice in choices)
    assert tokens == len(prompts) * setting.max_tokens
    host = seconds - sum(step.device_seconds for step in engine.steps)
    return Run(
        tokens_per_second=tokens / seconds,
        num_forwards=len(engine.steps),
        nfe=statistics.mean(choice.usage.nfe for choice in choices),
        host_share=host / seconds,
        host_ms=host / len(engine.steps) * 1e3,
        seconds=seconds,
    )


def make_prompts(setting: Setting, batch: int) -> Callable[[], list[list[int]]]:
    """Return what draws prompts, the same in every run."""
    rng = random.Random(batch)
    return lambda: [
        [rng.randrange(3, setting.loaded.traits.vocab_size - 1) for _ in range(setting.prompt_len)]
        for _ in range(batch)
    ]


def measure(
    setting: Setting, batch: int, num_pairs: int, table: Table, profile: ProfileConfig | None
) -> None:
    """Run pairs after a warm-up and add a row of medians; a profile is of a run that is not counted."""
    machine = roofline.measured(setting.loaded.dtype, torch.get_num_threads())
    counted = roofline.Counted(setting.loaded.model, machine)
    engine = Engine.from_loaded(dataclasses.replace(setting.loaded, model=counted))
    make = make_prompts(setting, batch)
    run_engine(setting, engine, make())
    pairs, shares = [], []
    for _ in range(num_pairs):
        prompts = make()
        naive_run = run_naive(setting, prompts[:NAIVE_REQUESTS])
        counted.reset()
        pairs.append((naive_run, run_engine(setting, engine, prompts)))
        shares.append(counted.floor_seconds / pairs[-1][1].seconds)
    if profile is not None:
        record(profile, setting, prompts)
    naive = statistics.median(pair[0].tokens_per_second for pair in pairs)
    fast = statistics.median(pair[1].tokens_per_second for pair in pairs)
    ratio = statistics.median(pair[1].tokens_per_second / pair[0].tokens_per_second for pair in pairs)
    last = pairs[-1][1]
    table.add_row(
        setting.name,
        str(batch),
        f"{naive:.1f}",
        f"{fast:.1f}",
        f"{ratio:.2f}",
        f"{100 * statistics.median(shares):.0f} %",
        f"{pairs[-1][0].nfe * batch:.0f}",
        f"{last.num_forwards}",
        f"{last.nfe:.0f}",
        f"{setting.max_tokens / last.nfe:.2f}",
        f"{100 * statistics.median(pair[1].host_share for pair in pairs):.1f} %",
        f"{statistics.median(pair[1].host_ms for pair in pairs):.2f}",
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}",
    )


def record(profile: ProfileConfig, setting: Setting, prompts: list[list[int]]) -> None:
    """Write a trace of some steps of a run."""
    recorder = Profile.of(profile, f"{setting.name}-{len(prompts)}")
    run_engine(setting, Engine.from_loaded(setting.loaded, recorder=recorder), prompts)
    recorder.close()


def setting_of(name: str, loaded: Loaded) -> Setting:
    """Return how a random model of 150 million parameters is run: 4 tokens a step, blocks of 32."""
    plain = random_model(loaded.model.shape, fast_dtype(), pack=False)
    return Setting(name, loaded, plain, 128, 128, 32, 4)


def settings(names: list[str]) -> list[Setting]:
    """Return the chosen settings."""
    made = []
    limits = Limits(max_running_requests=max(BATCHES))
    for name in names:
        if name.endswith("-150m"):
            family = name.removesuffix("-150m")
            made.append(setting_of(name, random_loaded(family, fast_dtype(), 32, limits)))
            assert made[-1].loaded.traits.mask_token_id == MASK_ID
        else:
            config = EngineConfig(
                model=f"sfumato-tiny-{name}", device="cpu", kv_memory=64 * _MIB, limits=limits
            )
            loaded = load(config)
            plain = load_model(loaded.folder, dtype=loaded.dtype, device="cpu", pack=False)
            made.append(Setting(f"tiny-{name}", loaded, plain, 48, 64, loaded.traits.block_length, 1))
    return made


def naive_table(
    models: list[str], batches: list[int], num_pairs: int, title: str, profile: ProfileConfig | None
) -> Table:
    """Return the engine against the naive loop for all settings and batch sizes."""
    table = Table(title=title)
    headings = (
        "model",
        "requests",
        "naive tok/s",
        "engine tok/s",
        "ratio",
        "roofline",
        "naive forwards",
        "forwards",
        "NFE",
    )
    for heading in (*headings, "TPF", "host", "host ms/step", "peak MiB"):
        table.add_column(heading, justify="right")
    for setting in settings(models):
        for batch in batches:
            measure(setting, batch, num_pairs, table, profile)
    return table


def main() -> None:
    """Print the chosen tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text", description=__doc__)
    parser.add_argument("--tables", default="naive", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--models", default="sdar-150m,llada-150m,sdar,llada", help="of the table naive")
    parser.add_argument("--families", default="llada,sdar", help="of the table joint")
    parser.add_argument(
        "--lengths", default=",".join(map(str, joint.LENGTHS)), help="output tokens, of the table joint"
    )
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="of the tables naive and dual")
    parser.add_argument("--pairs", type=int, default=5, help="paired runs per row")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every forward")
    parser.add_argument("--profile", help="folder for a torch profiler trace per row of the table naive")
    parser.add_argument("--profile-steps", type=int, default=DEFAULT_STEPS, help="of each trace")
    parser.add_argument("--profile-start", type=int, default=DEFAULT_START, help="steps in front of them")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ending = f"{options.threads} thread(s), medians of {options.pairs} pairs"
    lengths = [int(length) for length in options.lengths.split(",")]
    batches = [int(batch) for batch in options.batches.split(",")]
    console = Console(width=170)
    machine = platform.processor() or platform.machine()
    console.print(f"{machine}, torch {torch.__version__}, random models in {fast_dtype()}")
    for name in options.tables.split(","):
        title = f"{TABLES[name]}, {ending}"
        if name == "naive":
            profile = None
            if options.profile:
                profile = ProfileConfig(
                    folder=options.profile, num_steps=options.profile_steps, skip=options.profile_start
                )
                profile.check()
            table = naive_table(options.models.split(","), batches, options.pairs, title, profile)
        elif name == "dual":
            table = cached.make_table(batches, options.pairs, title)
        else:
            table = joint.make_table(options.families.split(","), lengths, options.pairs, title)
        console.print(table)


if __name__ == "__main__":
    main()
