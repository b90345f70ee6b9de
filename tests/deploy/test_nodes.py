"""Several nodes under load: nodes that are killed and join, replicas that hang, upgrades. Nothing is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from tests.deploy.clusters import Driver, driving
from tests.deploy.load import (
    IMAGE_MODEL,
    TEXT_MODELS,
    Answer,
    Ask,
    ask,
    expected_texts,
    mixed,
    send_all,
    settings,
    wrong,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SDAR = TEXT_MODELS[0]
AT_A_TIME = 24
ON_WORKERS = {"resources": {"cpu": 0.5, "custom": {"worker": 1}}}
RECOVERY = {"silence": 3, "health-period": 1, "health-timeout": 5, "wait": 240, "drain": 60}


def deployment(*models: str, **others: Any) -> dict[str, Any]:
    """Return a deployment whose front is on the head and whose engines are on worker nodes."""
    return {
        "models": {model: settings(model, replicas=2, **ON_WORKERS, **others) for model in models},
        "front": {"resources": {"custom": {"head": 1}}},
        "recovery": RECOVERY,
    }


class Progress:
    """How many requests are answered, and who waits for a number of them."""

    def __init__(self) -> None:
        self.done = 0
        self._changed = threading.Condition()

    def note(self, done: int) -> None:
        with self._changed:
            self.done = done
            self._changed.notify_all()

    def wait_for(self, done: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.done >= done, 400)


def under_load(driver: Driver, asks: list[Ask], disturb: Callable[[Progress], None]) -> list[Answer | str]:
    """Send requests while something happens; return their answers."""
    progress = Progress()
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(
            lambda: asyncio.run(send_all(driver.url, asks, concurrency=AT_A_TIME, on_progress=progress.note))
        )
        disturb(progress)
        return sending.result(600)


def report(title: str, answers: list[Answer | str]) -> None:
    """Print what it was like for clients."""
    seconds = sorted(answer.seconds for answer in answers if isinstance(answer, Answer))
    pauses = sorted(answer.longest_pause for answer in answers if isinstance(answer, Answer))
    print(
        f"{title}: {len(answers)} requests, seconds median {statistics.median(seconds):.2f} "
        f"max {seconds[-1]:.2f}, longest pause of a stream {pauses[-1]:.2f}"
    )


def right_answers(driver: Driver, models: tuple[str, ...]) -> dict[Any, tuple[Any, ...]]:
    """Return the answers of one process; of pictures those of an undisturbed deployment."""
    found: dict[Any, tuple[Any, ...]] = {}
    for model in models:
        if model != IMAGE_MODEL:
            found.update(expected_texts(model))
            continue
        pictures = [ask(model, number, is_stream=False) for number in range(4)]
        for each, answer in zip(
            pictures, asyncio.run(send_all(driver.url, pictures, concurrency=1)), strict=True
        ):
            assert isinstance(answer, Answer), answer
            found[each.key] = answer.content
    return found


def processes(driver: Driver, *words: str) -> list[psutil.Process]:
    """Return this cluster's processes whose command has all words."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        try:
            if all(word in command for word in words) and str(driver.folder) in str(process.environ()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(driver: Driver, is_true: Callable[[dict[str, dict[str, int]]], bool]) -> None:
    """Wait for a state of the deployments."""
    end = time.monotonic() + 180
    while not is_true(status := driver.do("status")):
        assert time.monotonic() < end, status
        time.sleep(0.5)


def test_nodes_are_killed_and_join_twice() -> None:
    models = (*TEXT_MODELS, IMAGE_MODEL)
    asks = mixed(500, 500, num_images=60)
    with driving(deployment(*models), num_workers=3) as driver:
        print("start-up:", driver.do("figures"))
        print("idle memory, MiB:", {name: round(size) for name, size in driver.do("memory").items()})
        right = right_answers(driver, models)

        def disturb(progress: Progress) -> None:
            for lost, joins, at in (("n0", "n3", 150), ("n1", "n4", 600)):
                progress.wait_for(at)
                driver.do("lose", name=lost)
                driver.do("add", name=joins)

        answers = under_load(driver, asks, disturb)
        report("two nodes killed, two joined", answers)
        assert wrong(asks, answers, right) == []


@pytest.mark.parametrize("what", ["engine", "replica"])
def test_a_replica_that_stands_still(what: str) -> None:
    asks = mixed_of(SDAR, 120)
    described = deployment(SDAR)
    described["recovery"] = {**RECOVERY, "stall": 4}
    with driving(described, num_workers=2) as driver:
        right = right_answers(driver, (SDAR,))

        def disturb(progress: Progress) -> None:
            progress.wait_for(20)
            words = ("sfumato.engine.process",) if what == "engine" else ("ray::ServeReplica", SDAR)
            os.kill(processes(driver, *words)[0].pid, signal.SIGSTOP)

        answers = under_load(driver, asks, disturb)
        report(f"a stopped {what}", answers)
        assert wrong(asks, answers, right) == []
        # Ray replaces it.
        wait_until(driver, lambda status: status[SDAR] == {"RUNNING": 2})
        after = under_load(driver, asks[:20], lambda progress: None)
        assert wrong(asks[:20], after, right) == []


# With half a second, most of what runs does not finish where it is.
@pytest.mark.parametrize("drain", [60, 0.5])
def test_an_upgrade_under_load(drain: float) -> None:
    asks = mixed_of(SDAR, 200)
    described = deployment(SDAR)
    described["recovery"] = {**RECOVERY, "drain": drain}
    with driving(described, num_workers=2) as driver:
        right = right_answers(driver, (SDAR,))
        before = {process.pid for process in processes(driver, "sfumato.engine.process")}

        def disturb(progress: Progress) -> None:
            progress.wait_for(30)
            # Another setting of the engine: every replica is replaced.
            changed = deployment(SDAR, **{"max-running-requests": 12})
            driver.do("begin", deployment={**driver.deployment, "models": changed["models"]})

        answers = under_load(driver, asks, disturb)
        report(f"an upgrade, {drain:g} s to finish", answers)
        assert wrong(asks, answers, right) == []
        wait_until(driver, lambda status: status[SDAR] == {"RUNNING": 2})
        now = {process.pid for process in processes(driver, "sfumato.engine.process")}
        assert not before & now


def mixed_of(model: str, count: int) -> list[Ask]:
    """Return requests to one model, every other one streaming."""
    return [ask(model, number % 12, is_stream=bool(number % 2)) for number in range(count)]


def test_prefill_and_denoise_on_different_nodes_of_which_one_is_killed() -> None:
    asks = mixed_of(SDAR, 300)
    described = deployment(SDAR)
    model = described["models"][SDAR]
    model["resources"] = {"cpu": 0.5, "custom": {"denoise": 1}}
    model["prefill"] = {"replicas": 2, "resources": {"cpu": 0.5, "custom": {"prefill": 1}}}
    with driving(
        described, workers={"d0": "denoise", "d1": "denoise", "p0": "prefill", "p1": "prefill"}
    ) as driver:
        right = right_answers(driver, (SDAR,))

        def disturb(progress: Progress) -> None:
            progress.wait_for(60)
            driver.do("lose", name="p0")
            driver.do("add", name="p2", kind="prefill")
            progress.wait_for(160)
            driver.do("lose", name="d0")
            driver.do("add", name="d2", kind="denoise")

        answers = under_load(driver, asks, disturb)
        report("a prefill node and a denoise node killed, two joined", answers)
        assert wrong(asks, answers, right) == []
        assert series(driver, "sfumato_handovers", SDAR, 'outcome="arrived"') > 0
        # The new prefill engine is found by itself, and asked.
        wait_until(driver, lambda status: status[f"{SDAR}--prefill"] == {"RUNNING": 2})


def test_ranks_share_a_placement_group() -> None:
    described = deployment(SDAR, **{"tensor-parallel": 2})
    asks = mixed_of(SDAR, 24)
    with driving(described, num_workers=2) as driver:
        assert driver.do("bundles") == [{"CPU": 0.5, "worker": 1.0}] * 2
        assert len(processes(driver, "sfumato.engine.follower")) == 2
        right = right_answers(driver, (SDAR,))

        def disturb(progress: Progress) -> None:
            # A rank that dies ends its engine.
            processes(driver, "sfumato.engine.follower")[0].kill()

        answers = under_load(driver, asks, disturb)
        assert wrong(asks, answers, right) == []


def test_two_fronts_have_one_page() -> None:
    described = deployment(SDAR)
    described["front"] = {"replicas": 2, "resources": {"custom": {"head": 1}}}
    asks = mixed_of(SDAR, 60)
    with driving(described, num_workers=2) as driver:
        right = right_answers(driver, (SDAR,))
        answers = under_load(driver, asks, lambda progress: None)
        assert wrong(asks, answers, right) == []
        time.sleep(3)
        counts = set()
        for _ in range(6):
            page = driver.http.get("/metrics").text
            lines = [line for line in page.splitlines() if line.startswith("sfumato_requests_total")]
            counts.add(sum(float(line.rsplit(" ", 1)[1]) for line in lines))
            assert page.count("\nsfumato_engine_up{") == 1
        assert counts == {60.0}


def test_stages_of_pictures_on_different_nodes() -> None:
    described = deployment(IMAGE_MODEL)
    model = described["models"][IMAGE_MODEL]
    model["replicas"] = 1
    for role in ("encode", "decode"):
        model[role] = {"resources": {"cpu": 0.5, "custom": {"worker": 1}}}
    pictures = [ask(IMAGE_MODEL, number % 4, is_stream=False) for number in range(12)]
    with driving(deployment(IMAGE_MODEL), num_workers=1) as driver:
        right = right_answers(driver, (IMAGE_MODEL,))
    with driving(described, num_workers=2) as driver:
        answers = under_load(driver, pictures, lambda progress: None)
        assert wrong(pictures, answers, right) == []
        assert series(driver, "sfumato_handovers", IMAGE_MODEL, 'outcome="arrived"') > 0


def test_replicas_follow_the_load() -> None:
    described = deployment(SDAR)
    model = described["models"][SDAR]
    del model["replicas"]
    model["autoscaling"] = {
        "max-replicas": 3,
        "target-requests": 6,
        "look-back-seconds": 3,
        "upscale-delay-seconds": 1,
        "downscale-delay-seconds": 5,
    }
    with driving(described, num_workers=1) as driver:
        assert driver.do("status")[SDAR] == {"RUNNING": 1}
        right = right_answers(driver, (SDAR,))
        asks = mixed_of(SDAR, 400)
        most = 1

        def disturb(progress: Progress) -> None:
            nonlocal most
            while progress.done < 380 and most < 2:
                most = max(most, driver.do("status")[SDAR].get("RUNNING", 0))
                time.sleep(0.5)

        answers = under_load(driver, asks, disturb)
        assert wrong(asks, answers, right) == []
        assert most >= 2
        # Those that are not needed any more go.
        wait_until(driver, lambda status: status[SDAR] == {"RUNNING": 1})


def series(driver: Driver, name: str, model: str, labels: str) -> float:
    """Return one series of the front's page; the last turns are told within a moment."""
    time.sleep(1)
    for line in driver.http.get("/metrics").text.splitlines():
        if line.startswith(f"{name}{{") and f'model="{model}"' in line and labels in line:
            return float(line.rsplit(" ", 1)[1])
    return 0.0
