import re
import statistics
from pydoc_data.topics import topics

import pytest
import torch
import torch.nn.functional as F

from comparison.models import Model
from comparison.networks import ARCHS
from comparison.profile import saved_bytes
from comparison.transformers import GPT


@pytest.mark.parametrize("name", ["pa", "rw+lr+pa"])
def test_a_gpt_learns_characters_from_pythons_documentation(name):
    """A few hundred steps bring it below what the frequencies of the characters alone allow."""
    text = torch.tensor(list("".join(topics.values()).encode()))
    frequencies = text.bincount().double() / len(text)
    entropy = -(frequencies * frequencies.log()).nansum()
    net = GPT(Model.parse(name), 64, 2, 64)
    adam = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.0)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(200):
        start = torch.randint(len(text) - 65, (16, 1), generator=generator)
        tokens = text[start + torch.arange(65)]
        loss = F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert statistics.mean(losses[-20:]) < entropy - 0.3
    start = {"gamma": 0.0 if name == "pa" else 1.0}  # of the weights that are not bounded
    for key, p in net.named_parameters():
        if re.search(r"residuals\.\d+\.(w|B|gamma)$", key):
            assert (p != start.get(key.rpartition(".")[2], 0.0)).any(), key


def test_a_vit_sees_images_of_every_size_of_the_recipe(data):
    net = ARCHS["vit"](Model.parse("residual"), 0, data)
    for size in (16, 24, 32):
        assert net(torch.zeros(2, 3, size, size)).shape == (2, 10)


@pytest.mark.slow
def test_what_the_gpt_keeps_for_the_backward_pass():
    """Ratios to the plain residual connection. They are exact, so that the bounds leave room for rounding alone."""
    tokens = torch.zeros(4, 256, dtype=torch.long)

    def saved(name: str) -> int:
        model = GPT(Model.parse(name), 768, 4, 256)
        return saved_bytes(model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))

    plain = saved("residual")
    for name, most in {
        "rw": 1.1204,
        "lr": 1.0050,
        "pa": 1.0000,
        "rw+lr": 1.1292,
        "rw+pa": 1.1204,
        "rw+lr+pa": 1.1435,
    }.items():
        assert saved(name) / plain < most + 0.0001, name
