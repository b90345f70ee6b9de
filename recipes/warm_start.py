"""Own the start of the bidirectional model from an early state of the block-causal one.

From random weights the bidirectional model had not begun to copy numbers from the question after 5 million
tokens; from these its loss is below what it had reached by then within 0.4 million.
"""

import torch
from tokenizers import Tokenizer
from torch import Tensor

from recipes.batches import draw_batches
from recipes.model import TinyModel
from recipes.plan import Plan

NUM_MEASURED_BATCHES = 4
# Far beyond the pools of any training run.
MEASURED_POOL = 1_000_000


def fold_head_norms(weights: dict[str, Tensor], plan: Plan, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return weights without query and key norms, which go into the projections.

    This is only nearly the same model: one mean size per head stands for that of every token.
    """
    mean_sizes = _mean_head_sizes(weights, plan, tokenizer)
    folded = {name: weight.clone() for name, weight in weights.items() if name not in mean_sizes}
    for norm_name, sizes in mean_sizes.items():
        scale = weights[norm_name][None, :] / sizes[:, None]
        folded[norm_name.replace("_norm.", "_proj.")] *= scale.reshape(-1, 1)
    return folded


@torch.no_grad()
def _mean_head_sizes(weights: dict[str, Tensor], plan: Plan, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Measure the root mean square of every head's queries and keys: norm weight name -> f32[H]."""
    model = TinyModel(plan)
    model.load_state_dict(weights)
    sizes: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_norm", "k_norm")):
            measured = sizes.setdefault(f"{name}.weight", [])
            module.register_forward_pre_hook(
                lambda _, inputs, measured=measured: measured.append(
                    inputs[0].pow(2).mean(-1).sqrt().mean((0, 1))
                )
            )
    batches = draw_batches(tokenizer, plan, MEASURED_POOL)
    for _ in range(NUM_MEASURED_BATCHES):
        _, batch = next(batches)
        model.hidden(batch.token_ids, batch.positions, batch.copies, batch.blocks)
    return {name: torch.stack(measured).mean(0) for name, measured in sizes.items()}
