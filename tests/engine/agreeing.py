"""One rank of `test_sync.py`: `python -m tests.engine.agreeing ADDRESS RANK SIZE`; ends with its stdin."""

from __future__ import annotations

import json
import os
import sys

import torch

from sfumato.engine.sync import Contribution, Peers
from sfumato.parallel.bell import Bell
from sfumato.parallel.groups import Group, Rendezvous


def main() -> None:
    """Contribute a row per line and print what was agreed."""
    address, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    store = Rendezvous.join(address, seconds=30).store
    group = Group(store, rank=rank, size=size, device="cpu", seconds=30)
    peers = Peers(
        rank,
        lambda numbers: [tuple(row.tolist()) for row in group.all_gather(torch.tensor(numbers))],
        Bell.connect(store, rank, size),
    )
    for line in sys.stdin:
        agreement = peers.exchange(Contribution.of(json.loads(line)))
        shown = [
            agreement.actions[rank],
            agreement.returns_arrivals[rank],
            agreement.by_graph,
            agreement.is_idle,
        ]
        print(json.dumps(shown), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
