import torch

from comparison.text import LENGTH, Text, synthetic_text


def text(*sizes: int) -> Text:
    """Parts whose bytes count up, so that each tells its place."""
    return Text("counting", *(torch.arange(size).remainder(251).to(torch.uint8) for size in sizes))


def test_each_byte_is_predicted_from_those_before_it():
    for x, y in (next(text(4000, 3000, 2000).batches(0, 0, 8)), next(text(4000, 3000, 2000).test_batches(8))):
        assert x.shape == y.shape == (len(x), LENGTH)
        assert x.dtype == torch.long
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert torch.equal((x[:, -1] + 1) % 251, y[:, -1])


def test_batches_are_a_function_of_seed_and_epoch():
    data = synthetic_text()

    def batches(seed, epoch):
        return torch.cat([x for x, _ in data.batches(seed, epoch, 8)])

    first = batches(0, 0)
    assert len(first) == data.train_size // 8 * 8
    assert torch.equal(first, batches(0, 0))
    for other in (batches(0, 1), batches(1, 0)):
        assert not torch.equal(first, other)


def test_every_place_of_the_training_part_is_drawn_and_none_beyond_it():
    data = Text("one at the end", torch.zeros(LENGTH + 2, dtype=torch.uint8), *torch.ones(2, 2000, dtype=torch.uint8))
    data.train[-1] = 7
    ends = {y[0, -1].item() for epoch in range(50) for _, y in data.batches(0, epoch, 1)}
    assert ends == {0, 7}


def test_the_tested_sequences_are_spread_over_the_whole_part_and_do_not_overlap():
    data = Text("", *torch.zeros(2, 3000, dtype=torch.uint8), torch.zeros(20 * LENGTH, dtype=torch.uint8), tested=5)
    data.test[:] = torch.arange(20).repeat_interleave(LENGTH)
    sequences = torch.cat([x for x, _ in data.test_batches(2)])
    assert len(sequences) == data.test_size == 5
    assert sequences[:, 0].tolist() == sorted(set(sequences[:, 0].tolist()))
    assert sequences[0, 0] == 0
    assert sequences[-1, -1] >= 18


def test_holding_out_tests_on_the_validation_part():
    parts = (torch.full((5000,), i, dtype=torch.uint8) for i in range(3))
    held = Text("", *parts).hold_out(7)
    (x, _), (trained, _) = next(held.test_batches(100)), next(held.batches(0, 0, 4))
    assert len(x) == held.test_size == 7
    assert set(x.flatten().tolist()) == {1}
    assert set(trained.flatten().tolist()) == {0}


def test_several_processes_have_a_sequence_once(monkeypatch):
    data = synthetic_text().limit(20)
    whole = [x for x, _ in data.batches(0, 0, 8)], [x for x, _ in data.test_batches(1000)]
    shards = []
    for rank in range(3):
        monkeypatch.setattr("comparison.distributed.processes", lambda rank=rank: (rank, 3))
        shards.append(([x for x, _ in data.batches(0, 0, 8)], [x for x, _ in data.test_batches(1000)]))
    for part in range(2):
        for i, batch in enumerate(whole[part]):
            together = torch.cat([shard[part][i] for shard in shards])
            assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, batch.tolist()))


def test_a_limit_is_the_number_of_sequences_trained_on():
    data = synthetic_text()
    limited = data.limit(16)
    assert limited.train_size == 16
    assert limited.test_size == data.test_size
    assert [len(x) for x, _ in limited.batches(0, 0, 5)] == [5, 5, 5]
    assert [len(x) for x, _ in limited.batches(0, 0, 50)] == [16]  # fewer than a batch are one
