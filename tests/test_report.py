import json
import re
import statistics

import pytest
import torch
from script import CONFIG, columns_of, runs_of

from comparison.report import MEASURES, holm, paired_test, seeds_to_find, summarize, table, verdict

FIELDS = ["test_loss", "test_accuracy"]  # of images


def test_paired_test_is_that_of_a_known_study():
    """Student's own example (1908), the hours of sleep that two drugs gained; the numbers are those of R's manual."""
    drug_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    drug_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    result = paired_test(drug_1, drug_2)
    assert result["p"] == pytest.approx(0.002833, abs=1e-6)
    assert result["interval"] == pytest.approx((-2.4598858, -0.7001142))
    assert result["sd"] == pytest.approx(1.229995, abs=1e-6)


def test_nothing_is_tested_where_there_is_one_pair_or_no_difference():
    for a, b in [((), ()), ([1.0], [2.0]), ([1.0, 2.0], [0.5, 1.5])]:
        assert paired_test(a, b)["p"] is paired_test(a, b)["interval"] is None


def test_holms_correction():
    """Worked by hand: the smallest p times their number, the next times one less, and none below one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([0.7, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_studies_without_an_effect_show_one_in_one_of_twenty():
    """500 studies of equal models. Uncorrected, 5 % of the differences are false; corrected, 5 % of the studies.

    For each measure apart: losses and accuracies have seeds and noise of their own.
    """
    generator = torch.Generator().manual_seed(0)
    raw, inside, shown = ({field: [] for field in FIELDS} for _ in range(3))
    names = ("residual", "rw", "lr", "pa", "deeper")
    for _ in range(500):
        seeds = 0.002 * torch.randn(2, 1, 6, generator=generator)  # what all models of a seed have in common
        accuracies, losses = 0.5 + seeds + 0.002 * torch.randn(2, 5, 6, generator=generator)
        runs = runs_of(dict(zip(names, accuracies.tolist())))
        runs = [{**run, "test_loss": loss} for run, loss in zip(runs, losses.flatten().tolist(), strict=True)]
        entries = summarize(runs)[1:]
        for field in FIELDS:
            results = [entry[field] for entry in entries]
            raw[field] += [result["p"] < 0.05 for result in results]
            inside[field] += [result["interval"][0] < 0 < result["interval"][1] for result in results]
            shown[field].append(any(result["p_holm"] < 0.05 for result in results))
    for field in FIELDS:
        assert 0.03 < statistics.mean(raw[field]) < 0.07
        assert 0.93 < statistics.mean(inside[field]) < 0.97
        assert 0.02 < statistics.mean(shown[field]) < 0.065


BASE = [0.870, 0.872, 0.868, 0.871, 0.869]


def test_a_difference_that_may_be_none_is_shown_as_such():
    better = [value + gain for value, gain in zip(BASE, (0.011, 0.009, 0.010, 0.012, 0.008))]
    unclear = [value + gain for value, gain in zip(BASE, (0.004, -0.002, 0.003, -0.001, 0.002))]
    worse = [value - gain for value, gain in zip(BASE, (0.011, 0.009, 0.010, 0.012, 0.008))]
    runs = runs_of({"residual": BASE, "rw": better, "lr": unclear, "pa": worse})
    columns = columns_of(table({**CONFIG, "seeds": [0, 1, 2, 3, 4]}, runs))
    accuracy, loss = columns["test accuracy %: difference"], columns["test loss: difference"]
    assert [cell.partition(" ")[0] for cell in accuracy] == ["–", "+1.00", "+0.12", "-1.00"]
    assert [cell.partition(" ")[0] for cell in loss] == ["–", "-0.0100", "-0.0012", "+0.0100"]
    for cells in (accuracy, loss):
        low, high = map(float, cells[2].partition("[")[2].strip("]").split(","))
        assert low < 0 < high
    for p in (columns["test accuracy %: p"], columns["test loss: p"]):
        assert p[0] == "–"
        assert [float(cell) < 0.05 for cell in p[1:]] == [True, False, True]


def test_many_comparisons_make_a_small_p_count_for_less():
    """p = 0.03 alone shows a difference; one of six such does not. Another measure counts for nothing."""
    slightly = [value + gain for value, gain in zip(BASE, (0.0012, 0.0030, 0.0004, 0.0024, 0.0010))]
    for others, expected in [((), True), (("lr", "pa", "rw+lr", "rw+pa", "deeper"), False)]:
        noise = [value + gain for value, gain in zip(BASE, (0.004, -0.002, 0.003, -0.003, 0.002))]
        entry = summarize(runs_of({"residual": BASE, "rw": slightly, **dict.fromkeys(others, noise)}))[1]
        for field in FIELDS:
            assert (entry[field]["p_holm"] < 0.05) == expected


def test_a_difference_is_better_or_worse_equal_or_open():
    """Losses and accuracies with the same differences: 0.01 are a point, and beyond both margins."""
    offsets = {"rw": 0.01, "lr": 0.0, "pa": -0.01, "rw+lr": 0.001}
    small, large = (0.0001, -0.0002, 0.0, 0.0002, -0.0001), (0.006, -0.009, 0.001, 0.008, -0.006)
    runs = {name: [v + offset + n for v, n in zip(BASE, small)] for name, offset in offsets.items()}
    columns = columns_of(table({**CONFIG, "seeds": [0, 1, 2, 3, 4]}, runs_of({"residual": BASE, **runs})))
    # 0.1 points of accuracy are less than the margin and significant: a difference, however small
    assert columns["test accuracy %: verdict"] == ["–", "better", "equal", "worse", "better"]
    assert columns["test loss: verdict"] == ["–", "better", "equal", "worse", "better"]
    noisy = runs_of({"residual": BASE, "rw": [v + n for v, n in zip(BASE, large)]})
    one, two = (summarize([*noisy, *more])[1] for more in ([], ({**run, "model": "lr"} for run in noisy[5:])))
    for measure in MEASURES[:2]:  # more seeds where there are more models to correct for
        assert seeds_named(one[measure.field]["verdict"]) < seeds_named(two[measure.field]["verdict"])
    many = runs_of({"residual": BASE * 9, "rw": [v + 0.004 + n for v, n in zip(BASE * 9, large * 9)]})
    assert summarize(many)[1]["test_loss"]["verdict"] == "better"


def seeds_named(verdict: str) -> int:
    return int(re.fullmatch(r"open, (\d+) seeds", verdict)[1])


@pytest.mark.parametrize("pairs", [2, 3, 6])
def test_the_seeds_that_an_open_verdict_names_are_enough_in_four_of_five_studies(pairs):
    generator, margin = torch.Generator().manual_seed(0), MEASURES[0].margin
    differences = margin + 2 * margin * torch.randn(300, pairs, generator=generator)
    results = [paired_test(each, [0.0] * pairs) | {"p_holm": 1.0} for each in differences.tolist()]
    named = [text for text in (verdict(result, MEASURES[0]) for result in results) if text != "equal"]
    enough = [seeds_named(text) >= seeds_to_find(0.5) for text in named]
    assert 0.73 < statistics.mean(enough) < 0.87


@pytest.mark.parametrize("difference", [-0.005, 0.005])
def test_models_that_differ_by_the_margin_are_called_equal_in_one_of_twenty_studies(difference):
    """Where they are not shown to differ, which is looked at first."""
    generator, equal = torch.Generator().manual_seed(0), []
    for _ in range(500):
        differences = difference + 0.001 * torch.randn(6, generator=generator)
        result = paired_test(differences.tolist(), [0.0] * 6) | {"p_holm": 1.0}
        equal.append(verdict(result, MEASURES[0]) == "equal")
    assert 0.03 < statistics.mean(equal) < 0.07


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_the_number_of_seeds_is_that_of_power_tables(effect, pairs):
    """Those that G*Power 3 has for the difference of two dependent means, two-tailed."""
    assert seeds_to_find(effect) == pairs
    assert seeds_to_find(effect, tests=3) > 1.2 * pairs


def test_pairs_are_those_of_the_seeds_whatever_their_order():
    runs = runs_of({"residual": BASE, "rw": [value + 0.001 * i for i, value in enumerate(BASE)]})
    shuffled = [runs[i] for i in (9, 3, 0, 7, 5, 1, 8, 2, 4, 6)]
    ordered = summarize(runs)[1]["test_accuracy"]["differences"]
    entry = next(entry for entry in summarize(shuffled) if entry["model"] == "rw")
    assert sorted(entry["test_accuracy"]["differences"]) == pytest.approx(sorted(ordered))


def test_a_run_that_diverged_is_counted_and_left_out():
    runs = runs_of({"residual": [0.87, 0.88, 0.89], "rw": [0.88, 0.1, 0.90]})
    runs[4] |= {"diverged": 2, "test_loss": None}
    columns = columns_of(table({**CONFIG, "seeds": [0, 1, 2]}, runs))
    assert columns["model"][1] == "rw (2 of 3 seeds, 1 diverged)"
    assert columns["test accuracy %"][1] == "89.00 ± 1.41"
    assert columns["test accuracy %: difference"][1] == "+1.00"
    assert columns["test accuracy %: verdict"][1] == "worse: diverged"


def test_nothing_is_compared_with_a_run_that_diverged():
    runs = runs_of({"residual": [0.87, 0.1, 0.89], "rw": [0.88, 0.89, 0.90]})
    runs[1]["diverged"] = 2
    columns = columns_of(table({**CONFIG, "seeds": [0, 1, 2]}, runs))
    assert columns["test accuracy %"][1] == "89.00 ± 1.00"
    assert columns["test accuracy %: difference"][1] == "+1.00 (2 pairs)"
    assert columns["test accuracy %: verdict"] == ["–", "better: residual diverged"]


def test_a_run_that_diverged_says_nothing_of_models_that_were_not_trained_with_its_seed():
    runs = runs_of({"residual": BASE, "rw": BASE[:3], "lr": BASE})
    runs[4]["diverged"] = 1  # residual's last seed
    columns = columns_of(table({**CONFIG, "seeds": [0, 1, 2, 3, 4]}, runs))
    assert columns["test loss: verdict"] == ["–", "–", "better: residual diverged"]
    assert all(entry["test_loss"]["verdict"] is None for entry in summarize(runs, "pa"))


def test_a_step_ratio_is_shown_where_there_is_one():
    runs = runs_of({"residual": [0.87], "rw": [0.88], "lr": [0.88]}, step_ratio_quartiles=[0.95, 1.2])
    runs[1]["step_ratio"] = 1.05
    runs[2] |= {"step_ratio": None, "step_ratio_quartiles": None}
    content = table(CONFIG, runs)
    assert columns_of(content)["step time / residual (quartiles)"][1:] == ["1.050 (0.950–1.200)", "–"]
    assert "not trained side by side" in content["notes"]
    assert "not trained side by side" not in table(CONFIG, runs[:2])["notes"]


def test_a_study_without_test_losses_has_a_table_of_its_accuracies():
    content = table(CONFIG, runs_of({"residual": [0.87], "rw": [0.88]}, test_loss=None))
    assert "test loss" not in content["columns"]
    assert columns_of(content)["test accuracy %: difference"] == ["–", "+1.00"]


def test_compilation_is_shown_apart_from_training(finished):
    results = json.loads((finished[1] / "results.json").read_text())
    runs = [{**one, "train_seconds": 1.0, "compile_seconds": 20.0} for one in results["runs"]]
    for compile in (False, True):
        columns = columns_of(table({**results["config"], "compile": compile}, runs))
        assert columns["training s"][0] == "1.0 ± 0.0"
        assert columns.get("compilation s", [None])[0] == ("20.0 ± 0.0" if compile else None)
