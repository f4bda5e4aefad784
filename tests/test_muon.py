from functools import partial

import pytest
import torch
from torch import nn

from comparison.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(32, 288), (288, 32), (64, 64)])
def test_orthogonalize_brings_all_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(2, *shape)
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.max() < 1.3
    assert values.median() > 0.6
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    along = left.mT @ orthogonalize(matrices) @ right.mT  # the singular vectors
    assert along.diagonal(dim1=1, dim2=2).min() > 0


def test_orthogonalize_computes_in_the_dtype_that_it_is_given():
    found = orthogonalize(torch.randn(2, 32, 64), torch.bfloat16)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float())


def test_muon_keeps_the_norm_of_a_filter_bank_and_ignores_the_scale_of_its_gradient():
    results = []
    for scale in (1.0, 100.0):
        p = nn.Parameter(torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0)))
        optimizer = Muon([p], lr=0.1, momentum=0.6)
        for step in range(3):
            p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=0, atol=0.02)
    assert 3.5 < results[0].norm() < 4.5  # √16, before the last update


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is in torch 2.9 and newer")
@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_a_matrix_moves_as_torchs_muon_moves_it(shape):
    ends = []
    for muon in (Muon, partial(torch.optim.Muon, weight_decay=0.0)):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(shape))
        optimizer = muon([p], lr=0.1, momentum=0.95)
        for _ in range(4):
            p.grad = torch.randn(shape)
            optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_that_train_together_move_as_each_alone(dtype):
    shapes = ((16, 8, 3, 3), (8, 16, 3, 3), (16, 8, 3, 3), (24, 32), (32, 24), (24, 32))
    ends = []
    for together in (True, False):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        how = {"lr": 0.1, "momentum": 0.6, "dtype": dtype}
        optimizers = [Muon(params, **how)] if together else [Muon([p], **how) for p in params]
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape)
            for optimizer in optimizers:
                optimizer.step()
        ends.append([p.detach() for p in params])
    for mine, alone in zip(*ends):
        torch.testing.assert_close(mine, alone)
