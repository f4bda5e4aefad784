import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from script import ROOT, made_up, together
from torch import nn

import TrainUtil
from comparison.console import UserError
from comparison.distributed import SynchronizedBatchNorm, leave, process_group
from TrainUtil import Recipe, train


def small_network(norm: bool) -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8), nn.GELU()]
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))


def test_a_batch_in_parts_has_the_gradient_of_the_whole(data):
    recipe, states = Recipe(epochs=2, batch_size=100), []
    for accumulate in (1, 3, 100):
        net = small_network(norm=False)
        done = train({"": net}, data.limit(200), recipe, 0, accumulate=accumulate)[""]
        states.append((net.state_dict(), [entry["train_loss"] for entry in done["history"]]))
    for state, losses in states[1:]:
        torch.testing.assert_close(losses, states[0][1], rtol=1e-5, atol=0)
        torch.testing.assert_close(state, states[0][0], rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="an example for each process, got 100 examples a batch in 101 parts"):
        train({"": small_network(norm=False)}, data.limit(200), recipe, 0, accumulate=101)


SIZES = [(200, 50, 1), (99, 33, 1), (200, 50, 2), (99, 33, 2)]  # images, batch, parts
SETTINGS = [(norm, *sizes) for norm in (True, False) for sizes in SIZES]


def setting(norm: bool, images: int, batch: int) -> tuple:
    # A low learning rate: Muon's steps are otherwise so large that rounding differences grow in a few steps.
    recipe = Recipe(epochs=3, batch_size=batch, filter_lr=0.01, lr=0.001)
    return small_network(norm), made_up().hold_out(99).limit(images), recipe, 0


def train_with_others(folder: str) -> None:
    rank = int(os.environ["RANK"])
    TrainUtil.compile_all = lambda models, accumulate: models  # the warm-up, without the compiler's minute
    results = {}
    with process_group(torch.device("cpu")):
        for norm, images, batch, accumulate in SETTINGS:
            network, *others = setting(norm, images, batch)
            path = Path(folder) / f"{norm}, {images}, {accumulate}.pt" if rank == 0 else None
            models = {"residual": network, "other": copy.deepcopy(network)}
            result = train(models, *others, compile=True, accumulate=accumulate, checkpoint=path)
            results[norm, images, batch, accumulate] = result["other"], models["other"].state_dict()
    torch.save(results, Path(folder) / f"result{rank}")
    leave(0)


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("together")
    together(train_with_others, str(folder))
    return [torch.load(folder / f"result{rank}") for rank in (0, 1)]


@pytest.mark.parametrize("norm_and_sizes", SETTINGS, ids=str)
def test_two_processes_train_as_one_with_the_whole_batch(norm_and_sizes, in_two_processes):
    """Batches of odd size too. In parts the curve is another with batch norm, which has the statistics of each part."""
    (first, state), (second, other) = (results[norm_and_sizes] for results in in_two_processes)
    torch.testing.assert_close(other, state, rtol=0, atol=0)  # the processes agree to the bit
    for key in ("train_loss", "test_loss", "test_accuracy"):
        assert [e[key] for e in second["history"]] == [e[key] for e in first["history"]]
    norm, images, batch, accumulate = norm_and_sizes
    if norm and accumulate > 1:
        return
    network, *others = setting(norm, images, batch)
    one = train({"": network}, *others)[""]
    losses = ([[entry["train_loss"], entry["test_loss"]] for entry in run["history"]] for run in (first, one))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert state.keys() == network.state_dict().keys()
    torch.testing.assert_close(state, network.state_dict(), rtol=1e-3, atol=1e-4)


def test_leaving_does_without_the_end_of_the_interpreter():
    """Where a thread of gloo that needs the GIL would abort the process."""
    program = "import atexit; from comparison.distributed import leave; atexit.register(print, 'end'); print('work')"
    done = subprocess.run([sys.executable, "-c", f"{program}; leave(3)"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "work\n")


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
