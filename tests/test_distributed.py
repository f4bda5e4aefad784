import copy
import os
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

import TrainUtil
from comparison.data import synthetic
from comparison.distributed import SynchronizedBatchNorm, process_group
from TrainUtil import Recipe, train


def small_network(norm: bool) -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8), nn.GELU()]
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))


def test_a_batch_in_parts_has_the_gradient_of_the_whole(data):
    recipe, states = Recipe(epochs=2, batch_size=100), []
    for accumulate in (1, 3, 100):
        net = small_network(norm=False)
        done = train(net, data.limit(200), recipe, 0, accumulate=accumulate)
        states.append((net.state_dict(), [entry["train_loss"] for entry in done["history"]]))
    for state, losses in states[1:]:
        torch.testing.assert_close(losses, states[0][1], rtol=1e-5, atol=0)
        torch.testing.assert_close(state, states[0][0], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="100 images can't be divided by 1 processes and 101 parts"):
        train(small_network(norm=False), data.limit(200), recipe, 0, accumulate=101)


def train_with_others(rank: int, world: int, folder: str, norm: bool, sizes: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost", LOCAL_RANK=str(rank))
    os.environ["MASTER_PORT"] = (Path(folder) / "port").read_text()
    images, batch, accumulate = sizes
    data, net = synthetic().limit(images), small_network(norm)
    # A low learning rate: Muon's steps are otherwise so large that rounding differences grow in a few steps.
    recipe = Recipe(epochs=3, batch_size=batch, filter_lr=0.01, lr=0.001)
    TrainUtil.compiled = lambda models, accumulate: models  # the warm-up, without the compiler's minute
    with process_group(torch.device("cpu")):
        path = Path(folder) / f"{rank}.pt"
        result = train(net, data, recipe, 0, compile=True, accumulate=accumulate, checkpoint=path)
    torch.save((result, net.state_dict()), Path(folder) / f"result{rank}")


@pytest.mark.parametrize("norm", [True, False], ids=["batch norm", "group norm"])
@pytest.mark.parametrize("sizes", [(200, 50, 1), (99, 33, 1), (200, 50, 2), (99, 33, 2)], ids=str)
def test_two_processes_train_as_one_with_the_whole_batch(norm, sizes, tmp_path):
    """Batches of odd size too. In parts the curve is another with batch norm, which has the statistics of each part."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(train_with_others, (2, str(tmp_path), norm, sizes), nprocs=2)
    (first, state), (second, other) = (torch.load(tmp_path / f"result{rank}") for rank in (0, 1))
    torch.testing.assert_close(other, state, rtol=0, atol=0)  # the processes agree to the bit
    assert [e["test_accuracy"] for e in second["history"]] == [e["test_accuracy"] for e in first["history"]]
    assert (tmp_path / "0.pt").exists()
    assert not (tmp_path / "1.pt").exists()  # the first one writes alone
    images, batch, accumulate = sizes
    if norm and accumulate > 1:
        return
    net = small_network(norm)
    recipe = Recipe(epochs=3, batch_size=batch, filter_lr=0.01, lr=0.001)
    one = train(net, synthetic().limit(images), recipe, 0)
    torch.testing.assert_close(
        [e["train_loss"] for e in first["history"]], [e["train_loss"] for e in one["history"]], rtol=1e-5, atol=0
    )
    assert state.keys() == net.state_dict().keys()
    torch.testing.assert_close(state, net.state_dict(), rtol=1e-3, atol=1e-4)


def test_a_synchronized_batch_norm_of_one_process_is_batch_norm():
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(4).double()
    nn.init.normal_(plain.weight)
    ours = copy.deepcopy(plain)
    ours.__class__ = SynchronizedBatchNorm
    x = torch.randn(6, 4, 5, 3, dtype=torch.double, requires_grad=True)
    for _ in range(2):
        outputs = [norm(x) for norm in (plain, ours)]
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), x)[0] for y in outputs))
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))
    half = x.detach().bfloat16()
    assert ours.float().train()(half).dtype == torch.bfloat16
