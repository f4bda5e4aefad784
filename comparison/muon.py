"""The optimiser of filters and matrices."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised (Jordan et al. 2024, "Muon"), for matrices and filters.

    torch.optim.Muon takes only matrices, and torch 2.5 does not have it. A batch norm makes the scale of the filters
    before it irrelevant but for the step size relative to it, so filters are kept at a root-mean-square norm of 1.
    Parameters of one shape go together: a GPU, and a CPU with small ones, spends more on starting than on computing.
    """

    def __init__(self, params: Iterable, lr: float, momentum: float, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.dtype = dtype  # of the orthogonalisation

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                alike.setdefault(p.shape, []).append(p)
            for shape, params in alike.items():
                gradients, buffers = [p.grad for p in params], [self.buffer(p) for p in params]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, gradients)
                matrices = torch.stack(torch._foreach_add(gradients, buffers, alpha=group["momentum"])).flatten(2)
                # With three steps for its matrices a GPT ends 0.05 nats higher.
                updates = orthogonalize(matrices, self.dtype, steps=3 if len(shape) > 2 else 5)
                if len(shape) > 2:
                    torch._foreach_mul_(params, [shape[0] ** 0.5 / p.norm() for p in params])
                rows, columns = updates.shape[1:]
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                torch._foreach_add_(params, updates.reshape(-1, *shape).unbind(), alpha=-rate)

    def buffer(self, p: nn.Parameter) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.bfloat16, steps: int = 5) -> Tensor:
    """About U Vᵀ of the singular value decomposition U S Vᵀ of each of (n, rows, columns).

    By a quintic Newton–Schulz iteration.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalize(matrices.mT, dtype, steps).mT
    norms = matrices.norm(dim=(-2, -1), keepdim=True)  # in float32, which would lift X to it
    X = (matrices.to(dtype) / (norms + 1e-7)).to(dtype)
    for _ in range(steps):
        XXt = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(XXt, XXt, XXt, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X.to(matrices.dtype)
