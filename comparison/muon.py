"""The optimiser of filters and matrices."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised (Jordan et al. 2024, "Muon"), for matrices and filters.

    torch.optim.Muon takes only matrices, and torch 2.5 does not have it. A batch norm makes the scale of the filters
    before it irrelevant but for the step size relative to it, so filters are kept at a root-mean-square norm of 1.
    """

    def __init__(self, params: Iterable, lr: float, momentum: float, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.dtype = dtype  # of the orthogonalisation

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(p.grad)
                matrix = p.grad.add(buffer, alpha=group["momentum"]).flatten(1)
                # With three steps for its matrices a GPT ends 0.05 nats higher.
                update = orthogonalize(matrix, self.dtype, steps=3 if p.ndim > 2 else 5)
                if p.ndim > 2:
                    p.mul_(len(p) ** 0.5 / p.norm())
                rows, columns = update.shape
                p.add_(update.view_as(p), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalize(matrix: Tensor, dtype: torch.dtype = torch.bfloat16, steps: int = 5) -> Tensor:
    """About U Vᵀ of the singular value decomposition U S Vᵀ, by a quintic Newton–Schulz iteration."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.mT, dtype, steps).mT
    X = matrix.to(dtype) / (matrix.norm() + 1e-7)
    for _ in range(steps):
        XXt = X @ X.mT
        X = torch.addmm(X, torch.addmm(XXt, XXt, XXt, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X.to(matrix.dtype)
