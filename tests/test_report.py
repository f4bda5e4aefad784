import json
import statistics

import pytest
import torch
from scipy import stats
from script import CONFIG, columns_of, runs_of

from comparison.report import holm, paired_test, summarize, table


def test_paired_test_is_that_of_a_known_study():
    """Student's own example (1908), the hours of sleep that two drugs gained; the numbers are those of R's manual."""
    drug_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    drug_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    result = paired_test(drug_1, drug_2)
    assert result["p"] == pytest.approx(0.002833, abs=1e-6)
    assert result["interval"] == pytest.approx((-2.4598858, -0.7001142))


def test_paired_test_is_a_one_sample_test_of_the_differences():
    a, b = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)).tolist()
    differences = [x - y for x, y in zip(a, b)]
    expected = stats.ttest_1samp(differences, 0)
    result = paired_test(a, b)
    assert result["p"] == pytest.approx(expected.pvalue)
    assert result["interval"] == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert result["paired_sd"] == pytest.approx(stats.tstd(differences))


def test_nothing_is_tested_where_there_is_one_pair_or_no_difference():
    for a, b in [((), ()), ([1.0], [2.0]), ([1.0, 2.0], [0.5, 1.5])]:
        assert paired_test(a, b)["p"] is paired_test(a, b)["interval"] is None


def test_holms_correction():
    """Worked by hand: the smallest p times their number, the next times one less, and none below one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([0.7, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_studies_without_an_effect_show_one_in_five_of_a_hundred():
    """1000 studies of equal models. Uncorrected, 5 % of the differences are false; corrected, 5 % of the studies."""
    generator = torch.Generator().manual_seed(0)
    raw, shown, inside = [], [], []
    for _ in range(1000):
        seeds = 0.87 + 0.002 * torch.randn(6, generator=generator)  # what all models of a seed have in common
        noise = 0.002 * torch.randn(5, 6, generator=generator)
        names = ("residual", "rw", "lr", "pa", "deeper")
        entries = summarize(runs_of({name: (seeds + own).tolist() for name, own in zip(names, noise)}))[1:]
        raw += [entry["p"] < 0.05 for entry in entries]
        inside += [entry["interval"][0] < 0 < entry["interval"][1] for entry in entries]
        shown.append(any(entry["p_holm"] < 0.05 for entry in entries))
    assert 0.03 < statistics.mean(raw) < 0.07
    assert 0.93 < statistics.mean(inside) < 0.97
    assert 0.02 < statistics.mean(shown) < 0.065


def test_a_difference_that_may_be_none_is_shown_as_such():
    base = [0.870, 0.872, 0.868, 0.871, 0.869]
    better = [value + gain for value, gain in zip(base, (0.011, 0.009, 0.010, 0.012, 0.008))]
    unclear = [value + gain for value, gain in zip(base, (0.004, -0.002, 0.003, -0.001, 0.002))]
    worse = [value - gain for value, gain in zip(base, (0.011, 0.009, 0.010, 0.012, 0.008))]
    alone = runs_of({"residual": base, "rw": better, "lr": unclear, "pa": worse})
    columns = columns_of(table({**CONFIG, "seeds": 5}, alone))
    assert columns["significant"] == ["–", "higher", "no", "lower"]
    assert columns["difference to residual"] == ["–", "+1.00", "+0.12", "-1.00"]
    low, high = map(float, columns["95 % interval"][2].strip("[]").split(","))
    assert low < 0 < high


def test_many_comparisons_make_a_small_p_count_for_less():
    """p = 0.03 alone shows a difference; one of six such does not."""
    base = [0.870, 0.872, 0.868, 0.871, 0.869]
    slightly = [value + gain for value, gain in zip(base, (0.0012, 0.0030, 0.0004, 0.0024, 0.0010))]
    for others, expected in [((), "higher"), (("lr", "pa", "rw+lr", "rw+pa", "deeper"), "no")]:
        noise = [value + gain for value, gain in zip(base, (0.004, -0.002, 0.003, -0.003, 0.002))]
        runs = runs_of({"residual": base, "rw": slightly, **dict.fromkeys(others, noise)})
        columns = columns_of(table({**CONFIG, "seeds": 5}, runs))
        assert columns["significant"][1] == expected


def test_pairing_takes_out_what_the_seeds_have_in_common():
    seeds = [0.86, 0.87, 0.88, 0.89]
    own = [0.004, -0.004, 0.002, 0.0]
    mine = [a + b for a, b in zip(seeds, own)]
    _, entry = summarize(runs_of({"residual": seeds, "rw": mine}))
    assert entry["paired_sd"] == pytest.approx(100 * stats.tstd(own))
    assert entry["unpaired_sd"] == pytest.approx(100 * (stats.tstd(seeds) ** 2 + stats.tstd(mine) ** 2) ** 0.5)


def test_a_run_that_diverged_is_counted_and_left_out():
    runs = runs_of({"residual": [0.87, 0.88, 0.89], "rw": [0.88, 0.1, 0.90]})
    runs[4]["diverged"] = 2
    rows = table({**CONFIG, "seeds": 3}, runs)["rows"]
    assert rows[1][3] == "89.00 ± 1.41 (2 of 3 seeds, 1 diverged)"
    assert rows[1][4] == "+1.00"


def test_compilation_is_shown_apart_from_training(finished):
    results = json.loads((finished[1] / "results.json").read_text())
    runs = [{**one, "train_seconds": 1.0, "compile_seconds": 20.0} for one in results["runs"]]
    for compile in (False, True):
        columns = columns_of(table({**results["config"], "compile": compile}, runs))
        assert columns["training s"][0] == "1.0 ± 0.0"
        assert columns.get("compilation s", [None])[0] == ("20.0 ± 0.0" if compile else None)


def test_nothing_is_compared_with_a_run_that_diverged():
    runs = runs_of({"residual": [0.87, 0.1, 0.89], "rw": [0.88, 0.89, 0.90]})
    runs[1]["diverged"] = 2
    row = table({**CONFIG, "seeds": 3}, runs)["rows"][1]
    assert row[3] == "89.00 ± 1.00"
    assert row[4] == "+1.00 (2 pairs)"
