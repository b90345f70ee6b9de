"""Ray Serve's request router, with the ranks that `placing.py` gives; loaded by Ray from its dotted name."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from sfumato.deploy.placing import Placing
from sfumato.deploy.ticket import Hints, Ticket


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Longest cached prefix against load, images by their group, the shorter queue among equals."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._placing = Placing()
        self._by_name: dict[str, RunningReplica] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take in who is there now."""
        super().update_replicas(replicas)
        self._by_name = {replica.replica_id.unique_id: replica for replica in replicas}
        self._placing.keep(list(self._by_name))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return replicas in ranks; where those of the first have no room, Ray tries the next."""
        hints = _hints(pending_request)
        if pending_request is not None:
            # Otherwise Ray asks again at once, as long as every replica is full.
            pending_request.routing_context.should_backoff = True
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if not by_name:
            return []
        cache = self.replica_queue_len_cache

        def queue_len(name: str) -> int | None:
            found: int | None = cache.get(by_name[name].replica_id)
            return found

        ranks = self._placing.choose(hints, list(by_name), queue_len)
        hints.chosen = tuple(ranks[0])
        return [[by_name[name] for name in rank] for rank in ranks if rank]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult
    ) -> None:
        """Count a request where it went."""
        request_id = pending_request.metadata.internal_request_id
        self._placing.place(request_id, _hints(pending_request), replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Count it no longer."""
        self._placing.end(internal_request_id)


def _hints(pending: PendingRequest | None) -> Hints:
    """Return what a request says of itself; calls that carry no ticket suit every replica alike."""
    if pending is not None and pending.args and isinstance(pending.args[0], Ticket):
        return pending.args[0].hints
    return Hints()
