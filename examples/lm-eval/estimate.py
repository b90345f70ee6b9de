"""Likelihood tasks of lm-evaluation-harness for bidirectional models, through the Monte Carlo estimate.

    python examples/lm-eval/estimate.py --model sfumato-tiny-llada --tasks word_problems_choice

Needs lm-eval beside a running `sfumato serve`; run from the root of the repository.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table


class Estimates(LM):
    """Asks /v1/log_likelihood; an estimate does not tell whether a completion would have been chosen."""

    def __init__(self, url: str, fields: dict[str, Any], concurrency: int) -> None:
        super().__init__()
        self._url = url
        self._fields = fields
        self._concurrency = concurrency

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return (log likelihood, False) of each (context, continuation)."""
        with ThreadPoolExecutor(self._concurrency) as workers:
            return list(workers.map(self._ask, (request.args for request in requests)))

    def _ask(self, pair: tuple[str, str]) -> tuple[float, bool]:
        body = json.dumps({**self._fields, "prompt": pair[0], "completion": pair[1]}).encode()
        asked = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked) as answer:
            return json.load(answer)["log_likelihood"], False

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Refuse: texts without a context are not what is estimated here."""
        raise NotImplementedError("rolling likelihoods are not estimated")

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Refuse: local-completions generates."""
        raise NotImplementedError("use --model local-completions for tasks that generate")


def main() -> None:
    """Run tasks and print lm-eval's table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1/log_likelihood")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--concurrency", type=int, default=4)
    options = parser.parse_args()
    fields = {"model": options.model, "num_samples": options.num_samples, "seed": options.seed}
    results = simple_evaluate(
        model=Estimates(options.url, fields, options.concurrency),
        tasks=options.tasks.split(","),
        task_manager=TaskManager(include_path="examples/lm-eval"),
        limit=options.limit,
    )
    print(make_table(results))


if __name__ == "__main__":
    main()
