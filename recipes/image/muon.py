"""Own the optimizer of the blocks' matrices: Muon, momentum with all singular values moved towards one."""

from collections import defaultdict

import torch
from torch import Tensor
from torch.optim import Optimizer

# Quintic Newton-Schulz iteration, with the coefficients of K. Jordan's "Muon" (2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
# Makes the root mean square of an update that of AdamW (arXiv:2502.16982, eq. 4).
ADAM_RMS = 0.2


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return f32[N, R, C], R <= C, with the singular vectors of `matrices` and singular values near one."""
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(Optimizer):
    """Nesterov momentum, orthogonalized; matrices of one shape go through the iteration together."""

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix in place."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                by_shape[tuple(matrix.shape)].append(matrix)
            for shape, matrices in by_shape.items():
                updates = torch.stack([self._momentum(matrix, group["momentum"]) for matrix in matrices])
                is_tall = shape[0] > shape[1]
                updates = orthogonalize(updates.mT if is_tall else updates)
                updates = updates.mT if is_tall else updates
                scale = ADAM_RMS * max(shape) ** 0.5
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(updates.unbind()), alpha=-group["lr"] * scale)

    def _momentum(self, matrix: Tensor, momentum: float) -> Tensor:
        state = self.state[matrix]
        if "average" not in state:
            state["average"] = torch.zeros_like(matrix)
        state["average"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(state["average"], momentum)
