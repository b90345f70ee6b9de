"""Decides which requests run this step; touches no tensor.

Not being chosen has no side effect: there is one set of live requests, and selecting from it moves nothing.
What changes here is admission (a lease on pages) and retraction (the lease given back).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sfumato.cache.pages import PageCache
from sfumato.cache.pool import PageLease
from sfumato.core.plan import ALL_KINDS, Cost, Row, RowKind, StepPlan
from sfumato.core.recording import UNRECORDED, Recorder
from sfumato.core.request import Request, Standing, Status
from sfumato.engine.limits import Limits
from sfumato.engine.step_times import TEXT_SHARE, StepTimes
from sfumato.errors import EngineError

# Shortest first, a running request that has not run for this many steps goes first; or for so many times the
# number of those that could run, where a step takes only some of them.
_PATIENCE_STEPS = 32
_PATIENCE_SHARE = 8


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A running request with the rows it would run now and the pages it must hold for them."""

    request: Request
    standing: Standing
    rows: tuple[Row, ...]
    num_pages: int
    cost: Cost

    @property
    def is_prefill(self) -> bool:
        return self.rows[0].kind is RowKind.PREFILL

    @property
    def is_step(self) -> bool:
        """Whether it is no stage beside the steps."""
        return self.rows[0].kind not in (RowKind.ENCODE, RowKind.DECODE)


class Scheduler:
    """Plans one step at a time over the live requests.

    clock: seconds, monotonic; decides only how long a request has waited.
    takes: whether a running request's next rows are a peer's; such a one is left alone. rate_share: how near
    to the rate of an endless step one has to be, where the order asks how large steps should be.
    stage_tokens: of stages beside the steps that are run together; a larger one runs alone.
    """

    def __init__(
        self,
        limits: Limits,
        pages: PageCache,
        clock: Callable[[], float],
        recorder: Recorder = UNRECORDED,
        *,
        rate_share: float = TEXT_SHARE,
        stage_tokens: int = 0,
    ) -> None:
        self.takes: Callable[[Request], bool] = lambda request: False
        self._limits = limits
        self._pages = pages
        self._clock = clock
        self._recorder = recorder
        self._launch_id = 0
        self._step = 0
        self._prefill_streak = 0
        self._step_times = StepTimes(rate_share)
        self._stage_tokens = stage_tokens
        self.num_retractions = 0

    def plan(self, live: Mapping[str, Request], kinds: frozenset[RowKind] = ALL_KINDS) -> StepPlan:
        """Return the rows of the next forward, in the order of their cost being admitted.

        kinds: what the lane that asks runs.
        """
        with self._recorder.region("plan"):
            return self._plan(live, kinds)

    def _plan(self, live: Mapping[str, Request], kinds: frozenset[RowKind]) -> StepPlan:
        self._make_way(live)
        self._admit(live)
        candidates, stalled = self._candidates(live, kinds)
        if stalled and not candidates:
            # Nobody can take a step: the youngest gives its pages to the oldest; one alone always fits.
            while len(holders := _holders(stalled)) > 1 and not candidates:
                self._retract(_last(holders))
                candidates, stalled = self._candidates(live, kinds)
        chosen = self._choose(candidates)
        if candidates and not chosen:
            raise EngineError(f"none of {len(candidates)} requests that could run was chosen")
        self._launch_id += 1
        if chosen and chosen[0].is_step:
            self._step += 1
        rows: list[Row] = []
        for candidate in chosen:
            candidate.request.last_step = self._step
            rows.extend(candidate.rows)
        guesses = frozenset(candidate.request.id for candidate in chosen if candidate.standing.is_guess)
        return StepPlan(launch_id=self._launch_id, rows=tuple(rows), guesses=guesses)

    def _candidates(
        self, live: Mapping[str, Request], kinds: frozenset[RowKind]
    ) -> tuple[list[_Candidate], list[Request]]:
        """Return what could run, oldest first, and who lacks pages; pages are counted, not taken."""
        room = self._pages.num_available
        found: list[_Candidate] = []
        stalled: list[Request] = []
        running = [request for request in live.values() if request.status is Status.RUNNING]
        for request in sorted(running, key=_seniority):
            if request.is_leaving or self.takes(request):
                continue
            standing: Standing | None = request.standing
            for ahead in request.in_flight:
                standing = standing and standing.behind(ahead)
            if standing is None:
                # Its next rows depend on an outcome that is not here.
                continue
            rows = standing.rows(self._limits.max_prefill_tokens)
            if not rows or rows[0].kind not in kinds:
                # All that is to be computed here is in flight, or another lane's; the rest is a peer's.
                continue
            num_pages = standing.pages_for(rows)
            missing = num_pages - (len(request.lease.pages) if request.lease else 0)
            if missing > 0 and missing > room:
                stalled.append(request)
                continue
            room -= max(0, missing)
            found.append(_Candidate(request, standing, rows, num_pages, _total(rows)))
        return found, stalled

    def _choose(self, candidates: list[_Candidate]) -> list[_Candidate]:
        """Apply the policy and the budgets of a step."""
        prefills = [candidate for candidate in candidates if candidate.is_prefill]
        denoises = [candidate for candidate in candidates if not candidate.is_prefill]
        max_tokens = self._limits.max_step_tokens
        if self._is_shortest_first:
            patience = max(_PATIENCE_STEPS, _PATIENCE_SHARE * len(candidates))
            urgency = lambda candidate: self._urgency(candidate.request, patience)
            prefills.sort(key=urgency)
            denoises.sort(key=urgency)
            max_tokens = min(max_tokens, self._step_times.enough_tokens())
        else:
            # Who has not run for longest goes first, so that too small a budget serves all in turn.
            denoises.sort(key=lambda candidate: (candidate.request.last_step, _seniority(candidate.request)))
        if denoises and not denoises[0].is_step:
            return self._fit(denoises, self._stage_tokens)
        if self._limits.policy == "mixed":
            return self._fit(denoises, max_tokens) + self._fit_prefill(prefills)
        is_denoise_due = bool(denoises) and self._prefill_streak >= self._limits.denoise_every - 1
        if prefills and not is_denoise_due:
            chosen = self._fit_prefill(prefills)
            if chosen:
                self._prefill_streak += 1
                return chosen
        self._prefill_streak = 0
        return self._fit(denoises, max_tokens)

    @property
    def _is_shortest_first(self) -> bool:
        return self._limits.order == "shortest"

    def _urgency(self, request: Request, patience: int) -> tuple[int, bool, int, int]:
        """Order running requests: who lost patience first, then the least remaining work."""
        is_patient = self._step - request.last_step < patience
        rank = request.standing.remaining if is_patient else request.last_step
        return (-request.priority, is_patient, rank, request.arrival)

    def note_step(self, plan: StepPlan, seconds: float) -> None:
        """Learn what a step costs, for the order that asks how large steps should be."""
        if self._is_shortest_first and plan.kind == "denoise":
            self._step_times.note(sum(row.cost.tokens for row in plan.rows), seconds)

    def _fit(self, candidates: list[_Candidate], max_tokens: int) -> list[_Candidate]:
        """Take candidates while the budgets last; the first always fits, and a refused one stops nobody.

        The first one also says what kind of forward it is: those with another key wait. Who has waited
        longest is first in some later step, so that they wait no more steps than there are keys.
        """
        chosen: list[_Candidate] = []
        used = Cost()
        for candidate in candidates:
            total = used + candidate.cost
            is_other = bool(chosen) and candidate.rows[0].key != chosen[0].rows[0].key
            if is_other or (chosen and self._is_over(total, max_tokens)) or not self._extend(candidate):
                continue
            used = total
            chosen.append(candidate)
        return chosen

    def _is_over(self, total: Cost, max_tokens: int) -> bool:
        """Whether a step would exceed a budget; rows count where they are images'."""
        limits = self._limits
        return (
            total.tokens > max_tokens
            or total.logits_bytes > limits.max_logits_bytes
            or total.latent_bytes > limits.max_latent_bytes
            or (total.latent_bytes > 0 and total.rows > limits.max_step_rows)
        )

    def _fit_prefill(self, candidates: list[_Candidate]) -> list[_Candidate]:
        """Share the prefill tokens of one forward among prompts, oldest first, in whole blocks."""
        chosen: list[_Candidate] = []
        left = self._limits.max_prefill_tokens
        for candidate in candidates:
            rows = candidate.standing.rows(left)
            cost = _total(rows)
            if chosen and cost.tokens > left:
                continue
            fitted = replace(candidate, rows=rows, cost=cost)
            if self._extend(fitted):
                left -= cost.tokens
                chosen.append(fitted)
        return chosen

    def _extend(self, candidate: _Candidate) -> bool:
        lease = candidate.request.lease
        return not isinstance(lease, PageLease) or self._pages.extend(lease, candidate.num_pages)

    def _admit(self, live: Mapping[str, Request]) -> None:
        """Let waiting requests in while there are rows and pages; a refused one stops nobody behind it."""
        # A request whose prompt is prefilled elsewhere holds pages and comes back.
        running = [request for request in live.values() if request.status is not Status.WAITING]
        waiting = [request for request in live.values() if request.status is Status.WAITING]
        num_running = len(running)
        if not waiting or num_running >= self._limits.max_running_requests:
            return
        now = self._clock()
        room = self._pages.num_available - sum(_missing(request) for request in running)
        for request in sorted(waiting, key=lambda request: self._turn_of(request, now)):
            if num_running >= self._limits.max_running_requests:
                return
            if self._try_admit(request, room, running):
                request.is_protected = self._is_overdue(request, now)
                num_running += 1
                running.append(request)
                room = self._pages.num_available - sum(_missing(other) for other in running)
            elif self._is_overdue(request, now):
                # Whoever has waited this long lets nobody pass until it fits.
                return

    def _turn_of(self, request: Request, now: float) -> tuple[int, float, int, int]:
        """Order waiting requests: those that have waited too long by their wait, the others as all are."""
        if self._is_overdue(request, now):
            return (0, request.waiting_since, 0, request.arrival)
        remaining = request.standing.remaining if self._is_shortest_first else 0
        return (1, -request.priority, remaining, request.arrival)

    def _is_overdue(self, request: Request, now: float) -> bool:
        return now - request.waiting_since >= self._limits.max_wait_seconds

    def _try_admit(self, request: Request, room: int, running: list[Request]) -> bool:
        standing = request.standing
        needed = standing.pages_to_progress
        if needed:
            tokens, key = standing.known_tokens, standing.cache_key
            shared = self._pages.match(key, tokens, standing.block_length)
            # A prefix that only the tree keeps counts as available; leasing it takes it away from the others.
            wanted = needed - sum(self._pages.pool.is_leased(page) for page in shared)
            if request.retractions and running:
                # It was in the way once: it comes back when everybody can finish.
                worst = sum(other.standing.pages_at_most - _held(other) for other in running)
                wanted = standing.pages_at_most - len(shared) + worst
            if wanted > room:
                return False
            lease = self._pages.admit(
                request.id, shared, needed, key=key, tokens=tokens, block_length=standing.block_length
            )
            if lease is None:
                return False
            request.lease = lease
            _resume_at(request, len(shared) * self._pages.pool.page_size)
        request.status = Status.RUNNING
        if self._is_shortest_first and request.last_step < 0:
            # Its patience begins now.
            request.last_step = self._step
        return True

    def _make_way(self, live: Mapping[str, Request]) -> None:
        """Retract the lowest priority where a higher one waits and all rows or pages are taken."""
        running = [request for request in live.values() if request.status is Status.RUNNING]
        for request in running:
            if request.is_leaving:
                self._retract(request)
        waiting = [request for request in live.values() if request.status is Status.WAITING]
        if not waiting:
            return
        highest = min(waiting, key=_seniority)
        running = [r for r in running if r.status is Status.RUNNING and not r.is_leaving]
        lower = [r for r in running if r.priority < highest.priority and not r.is_protected]
        needed = highest.standing.pages_to_progress
        # What is leaving gives its pages back as soon as nothing of it is in flight.
        room = self._pages.num_available + sum(_held(r) for r in live.values() if r.is_leaving)
        if not lower or needed > room + sum(_held(request) for request in lower):
            return
        is_full = len(running) >= self._limits.max_running_requests
        while lower and (is_full or room < needed):
            victim = _last(lower)
            lower.remove(victim)
            room += _held(victim)
            is_full = False
            self._retract(victim)

    def _retract(self, request: Request) -> None:
        """Give a request's pages back; it keeps its canvas and waits with its old place in line.

        While a launch of it is in flight, which reads and writes its pages, it only runs no more.
        """
        request.is_leaving = bool(request.in_flight)
        if request.is_leaving:
            return
        if isinstance(request.lease, PageLease):
            self._pages.pool.release(request.lease)
        self.detach(request)
        request.retractions += 1
        self.num_retractions += 1

    def detach(self, request: Request) -> None:
        """Let a request wait for new pages; what it held is no longer its own."""
        request.lease = None
        _resume_at(request, 0)
        request.status = Status.WAITING
        request.waiting_since = self._clock()

    def check(self) -> None:
        """Recount the pages. Raises EngineError where one is neither free, leased nor cached."""
        self._pages.pool.check()

    def release(self, request: Request) -> None:
        """Take back what an ended request held."""
        if isinstance(request.lease, PageLease):
            self._pages.pool.release(request.lease)
        request.lease = None

    def share(self, request: Request) -> None:
        """Enter a request's final keys and values into the prefix tree.

        A page that is there already takes the place of its own copy, but not while a launch is in flight.
        """
        standing = request.standing
        tokens = standing.known_tokens[: standing.cached_len]
        if tokens and isinstance(request.lease, PageLease):
            self._pages.share(
                request.lease,
                standing.cache_key,
                tokens,
                standing.block_length,
                may_replace=not request.in_flight,
            )


def _seniority(request: Request) -> tuple[int, int]:
    """Order requests: higher priority first, then who came first."""
    return (-request.priority, request.arrival)


def _last(requests: list[Request]) -> Request:
    """Return the lowest-priority youngest request."""
    return max(requests, key=_seniority)


def _total(rows: tuple[Row, ...]) -> Cost:
    total = Cost()
    for row in rows:
        total += row.cost
    return total


def _held(request: Request) -> int:
    return len(request.lease.pages) if request.lease else 0


def _missing(request: Request) -> int:
    """Return how many pages a running request lacks for its next decision."""
    return max(0, request.standing.pages_to_progress - _held(request))


def _holders(stalled: list[Request]) -> list[Request]:
    """Return those that hold pages which no launch in flight uses."""
    return [
        request
        for request in stalled
        if request.lease is not None and request.lease.pages and not request.in_flight
    ]


def _resume_at(request: Request, cached_len: int) -> None:
    request.work.resume_at(cached_len)
    request.standing = request.work.standing(request.id)
