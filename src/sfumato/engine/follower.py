"""A tensor-parallel follower: part of a model and of its keys and values, and nothing of any request.

Started by rank 0 as `python -m sfumato.engine.follower`, with its configuration as one line of JSON on stdin,
or inside a process of torchrun's.
"""

from __future__ import annotations

import os
import sys

import msgspec
import torch

from sfumato.config import EngineConfig
from sfumato.engine.build import choose_dtype, resolve_device, use_device
from sfumato.engine.ranks import device_of_rank, meet, open_rendezvous, threads_of_rank
from sfumato.errors import SfumatoError
from sfumato.models.attending import Attention
from sfumato.models.batch import KVStore
from sfumato.models.folder import Folder, read_folder
from sfumato.models.language_model import LanguageModel
from sfumato.models.weights import load_model
from sfumato.parallel.spawn import end_with_parent, read_first_line
from sfumato.parallel.tensor import TensorRanks, follow
from sfumato.text.orders import fed_rows, output_tokens, read_order
from sfumato.text.paged_batching import batch_of


def run_follower(config: EngineConfig) -> None:
    """Load this rank's part and follow rank 0 until it stops. Raises EngineError when it is gone."""
    device = device_of_rank(resolve_device(config.device), config)
    if device == "cpu":
        torch.set_num_threads(threads_of_rank(config))
    rendezvous = open_rendezvous(config)
    folder = read_folder(config.model, config.overrides())
    ranks = TensorRanks(config.rank, config.tensor_parallel)
    model = load_model(
        folder,
        dtype=choose_dtype(config, folder, device),
        device=device,
        divide=lambda model: model.divide(ranks),
    )
    use_device(model.device)
    ranks.group = meet(rendezvous, config, device)
    with torch.inference_mode():
        follow(model, ranks.group, _Forwards(model, folder, config))


class _Forwards:
    """Makes the forwards of orders, each in the store that it names."""

    def __init__(self, model: LanguageModel, folder: Folder, config: EngineConfig) -> None:
        self._model, self._traits = model, folder.traits
        self._attention = Attention(has_kernels=config.attention_backend != "torch")
        self._stores: dict[int, tuple[KVStore, int]] = {}

    def __call__(self, content: bytes) -> None:
        order = read_order(content)
        for forgotten in order.forgotten:
            self._stores.pop(forgotten, None)
        if order.store not in self._stores:
            store = KVStore.allocate(
                shapes=self._model.kv_shapes,
                num_slots=order.num_slots,
                dtype=self._model.dtype,
                device=str(self._model.device),
            )
            self._stores[order.store] = (store, order.page_size)
        store, page_size = self._stores[order.store]
        self._model.hidden(
            batch_of(
                fed_rows(order, width=self._model.shape.width, device=self._model.device),
                traits=self._traits,
                output_tokens=output_tokens(order),
                store=store,
                page_size=page_size,
                device=self._model.device,
                attention=self._attention,
            )
        )


def main() -> None:
    """Follow until rank 0 stops or is gone."""
    config = msgspec.json.decode(read_first_line(), type=EngineConfig)
    end_with_parent()
    status = 0
    try:
        run_follower(config)
    except SfumatoError as error:
        print(f"sfumato: rank {config.rank}: {error}", file=sys.stderr, flush=True)
        status = 1
    # gloo's threads may be in the middle of something that the interpreter's own way out would wait for.
    os._exit(status)


if __name__ == "__main__":
    main()
