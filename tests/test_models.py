import weakref

import pytest
import torch

from comparison.models import Model, residual_layers


def test_parameters_added_to_the_language_model_of_table_5():
    """24 layers, D = 768, r = 32, k = 3, one block a layer: 1.20M for LR and 3.63M for RW+LR+PA, of rounded totals."""
    for name, paper in (("lr@32", 1.20e6), ("rw+lr+pa@32/3", 3.63e6)):
        block = Model.parse(name).residual(768, available=3, channel_dim=-1)
        assert 24 * sum(p.numel() for p in block.parameters()) == pytest.approx(paper, rel=0.03)


@pytest.mark.parametrize("name", ["residual", "rw+lr"])
def test_what_does_not_look_back_keeps_no_activation_at_inference(name):
    alive, counts = weakref.WeakSet(), []

    def branch(x):
        alive.add(x)
        counts.append(len(alive))
        return x.cos()

    residuals = [Model.parse(name).residual(4, available=i + 1, channel_dim=-1) for i in range(9)]
    with torch.inference_mode():
        x = torch.zeros(2, 4)
        residual_layers(x, x, [branch] * 9, residuals)
    assert max(counts) <= 2  # x and what comes of it


def test_a_models_name_sets_the_arguments_of_its_blocks():
    blocks = {
        name: Model.parse(name).residual(8, available=3, channel_dim=1)
        for name in (
            "rw:bound=none",
            "rw:scale=1,bound=sigmoid",
            "rw:dim=D",
            "rw+lr@2:init=xavier,scale=0.5",
            "pa/2:rank=none",
            "pa:shared=false",
        )
    }
    unbounded, sigmoid, vectors, lr, identity, apart = blocks.values()
    assert unbounded.bound == "none"
    assert (sigmoid.scale, sigmoid.bound, sigmoid.dim) == (1, "sigmoid", None)
    assert vectors.w.shape == (16,)
    assert (lr.init, lr.scale, lr.rank, lr.residual_weights) == ("xavier", 0.5, 2, True)
    assert (identity.rank, identity.k) == (None, 2)
    assert apart.A.shape[0] == 3
    assert Model.parse("rw+lr:decay=0.1,rate=3").own == {"block_decay": 0.1, "block_rate": 3.0}
