import re
import statistics
from pydoc_data.topics import topics

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from comparison.models import Model
from comparison.networks import ARCHS
from comparison.profile import saved_bytes
from comparison.transformers import GPT, causal_attention, rotate

TEXT = torch.tensor(list("".join(topics.values()).encode()))  # Python's documentation


def train(net: GPT, steps: int, batch: int) -> float:
    """The mean loss of the last 20 steps, with everything in one AdamW at 0.003 and no warm-up."""
    adam = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.0)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        start = torch.randint(len(TEXT) - 65, (batch, 1), generator=generator)
        tokens = TEXT[start + torch.arange(65)]
        loss = F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return statistics.mean(losses[-20:])


@pytest.mark.parametrize("name", ["pa", "rw+lr+pa"])
def test_a_gpt_learns_characters_from_pythons_documentation(name):
    """A hundred and twenty steps bring it below what the frequencies of the characters alone allow."""
    frequencies = TEXT.bincount().double() / len(TEXT)
    entropy = -(frequencies * frequencies.log()).nansum()
    net = GPT(Model.parse(name), 0, dim=64, layers=2)
    assert train(net, steps=120, batch=8) < entropy - 0.3
    start = {"gamma": 1.0}  # the others start at 0
    for key, p in net.named_parameters():
        if re.search(r"residuals\.\d+\.(w|B|gamma)$", key):
            assert (p != start.get(key.rpartition(".")[2], 0.0)).any(), key


def test_causal_attention_is_that_of_torch():
    q, k, v = torch.randn(3, 2, 3, 17, 8, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(causal_attention(q, k, v), expected)


def test_no_byte_is_predicted_from_those_that_follow():
    net, tokens = GPT(Model.parse("pa"), 0, dim=64, layers=2), torch.arange(20)[None]
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    changed = tokens.clone()
    changed[0, 12:] = 99
    before, after = net(tokens), net(changed)
    torch.testing.assert_close(before[0, :12], after[0, :12])
    assert (before[0, 12:] - after[0, 12:]).abs().amax(dim=-1).min() > 0.01


def test_rotation_makes_scores_depend_only_on_the_distance():
    """Rotary positions: the score of one query and one key is a function of how far apart they stand."""
    angles = torch.arange(9)[:, None] * torch.tensor([1.0, 0.1, 0.01])
    q, k = torch.randn(2, 1, 6, dtype=torch.float64).expand(2, 9, 6)
    q, k = (rotate(each, angles.cos(), angles.sin()) for each in (q, k))
    torch.testing.assert_close(q.norm(dim=-1), q[:1].norm(dim=-1).expand(9))
    scores = q @ k.T
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand(len(diagonal)), rtol=1e-4, atol=1e-5)
    assert (scores[0].diff().abs() > 1e-3).all()


@pytest.mark.parametrize("arch", ["gpt6", "gpt", "gpt24"])
def test_all_models_of_a_gpt_start_as_one_function_of_only_the_embeddings(arch):
    tokens = torch.randint(256, (1, 12))
    plain = ARCHS[arch](Model.parse("residual"), 0, None)
    assert not any(name.endswith("bias") for name, _ in plain.named_parameters())
    logits = plain(tokens)
    torch.testing.assert_close(logits, plain.head(plain.embedding(tokens)), rtol=0, atol=0)
    for name in ("deeper", "rw", "lr", "pa", "pa:rank=none", "rw+lr+pa"):
        torch.testing.assert_close(ARCHS[arch](Model.parse(name), 0, None)(tokens), logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arch", "layers", "D"), [("gpt6", 6, 128), ("gpt", 12, 128), ("gpt24", 24, 96), ("table5", 24, 768)]
)
def test_a_gpt_has_the_layers_and_the_width_that_its_name_stands_for(arch, layers, D):
    with FakeTensorMode():
        parameters = sum(p.numel() for p in ARCHS[arch](Model.parse("residual"), 0, None).parameters())
    norms, ends = (2 * layers + 1) * D, 2 * 256 * D  # embedding and head
    assert parameters == layers * 12 * D**2 + norms + ends  # attention 4 D², MLP 8 D²


def test_a_vit_sees_images_of_every_size_of_the_recipe(data):
    net = ARCHS["vit"](Model.parse("residual"), 0, data)
    for size in (16, 24, 32):
        assert net(torch.zeros(2, 3, size, size)).shape == (2, 10)


@pytest.mark.slow
def test_low_rank_pairs_do_not_keep_a_gpt_whose_branches_start_at_zero_from_learning():
    """Twelve layers, one AdamW at 0.003. With A filled by Xavier's rule they do."""
    names = ("residual", "lr", "pa", "lr:init=xavier")
    plain, *ends = (train(GPT(Model.parse(name), 0, dim=64), steps=50, batch=4) for name in names)
    assert [end < plain + 0.08 for end in ends] == [True, True, False], ends


def test_what_the_gpt_keeps_for_the_backward_pass():
    """Ratios to the plain residual connection. They are exact, and given to four places."""

    def saved(name: str) -> int:
        with FakeTensorMode():
            tokens = torch.zeros(4, 256, dtype=torch.long)
            model = GPT(Model.parse(name), 0, dim=768, layers=4)
            return saved_bytes(model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))

    plain = saved("residual")
    for name, ratio in {
        "rw": 1.0846,
        "lr": 1.0036,
        "pa": 1.0128,
        "pa:rank=none": 1.0000,
        "rw+lr": 1.0908,
        "rw+pa": 1.0974,
        "rw+lr+pa": 1.1008,
    }.items():
        assert saved(name) / plain == pytest.approx(ratio, abs=1e-4), name
