import copy
import json
import shutil

import pytest
from script import CONFIG, PICTURES, ROOT, runs_of

import Test
from comparison.pictures import figures
from comparison.report import MEASURES, summarize
from comparison.study import CONFIG_FIELDS, EPOCH_FIELDS, RUN_FIELDS, Study

pytestmark = pytest.mark.usefixtures("pictures")

STORED = sorted(path.parent for path in (ROOT / "results").glob("*/results.json"))


@pytest.mark.parametrize("study", STORED, ids=lambda path: path.name)
def test_every_stored_study_has_its_pictures(study):
    drawn = figures(Study.read(study).config, Study.read(study).in_order())
    assert {name for name, figure in drawn.items() if figure} == {path.name for path in study.glob("*.png")}


def test_pictures_show_the_numbers_of_the_table():
    """Rows of a forest plot, points and intervals; curves with their means; axes with units."""
    base, rw = [0.870, 0.872, 0.868], [0.881, 0.882, 0.876]
    losses = [{"test_loss": 1 - a, "train_loss": 2 - 3 * a} for a in base + rw]
    history = [
        [
            {"seconds": 2.0, "test_accuracy": loss["test_loss"] - 0.1, **loss},
            {"seconds": 3.0, "test_accuracy": a, **loss},
        ]
        for a, loss in zip(base + rw, losses)
    ]
    values = [{}] * 3 + [
        {"alpha": {"1.1": a}, "beta": {"1.1": 2 - a}, "gamma[0]": {"1.1": 5.0}} for a in (1.0, 1.1, 1.2)
    ]
    runs = runs_of({"residual": base, "rw": rw})
    runs = [{**run, "history": h, "learned": v} for run, h, v in zip(runs, history, values)]
    for seed, one in enumerate(runs[4:]):  # the first of the seeds is of a time when nothing was recorded
        one["history"] = [
            {**epoch, "learned": {"alpha": {"1.1": seed + n, "1.2": 3.0}}} for n, epoch in enumerate(one["history"])
        ]
    runs[3]["parameters"] = runs[4]["parameters"] = runs[5]["parameters"] = 110
    drawn = figures({**CONFIG, "seeds": [0, 1, 2]}, runs)
    assert list(drawn) == list(PICTURES)
    accuracy, curves, differences, parameters, learned, learning = (figure.axes for figure in drawn.values())
    assert accuracy[0].get_xlabel() == "training time (s)"
    assert accuracy[0].get_ylabel() == "test accuracy (%)"
    lines = {line.get_label(): line for line in accuracy[0].lines}
    assert list(lines["rw"].get_xdata()) == [2.0, 5.0]
    assert lines["rw"].get_ydata() == pytest.approx([100 * (0.9 - sum(rw) / 3), 100 * sum(rw) / 3])
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines.values()}) == 2
    entry = summarize(runs)[1]
    for panel, factor in zip(curves, (3, 1), strict=True):  # training loss, test loss
        (band,) = panel.collections
        low, high = entry["test_loss"]["interval"]
        assert panel.lines[0].get_ydata() == pytest.approx([factor * (low + high) / 2] * 2)
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == pytest.approx((factor * low, factor * high))
    assert "training loss" in curves[0].get_title()
    for panel, measure in zip(differences, MEASURES[:2], strict=True):
        (bar,) = panel.collections
        (segment,) = bar.get_segments()
        assert segment[:, 0] == pytest.approx(entry[measure.field]["interval"])
        assert entry[measure.field]["interval_90"] in [tuple(line.get_xdata()) for line in panel.lines]
        assert [text.get_text() for text in panel.get_yticklabels()] == ["rw"]
        assert measure.name in panel.get_xlabel()
        (band,) = panel.patches
        assert (band.get_x(), band.get_x() + band.get_width()) == (-measure.margin, measure.margin)
    assert parameters[0].get_xlabel() == "parameters added to those of residual"
    assert 100.0 in [line.get_xdata()[0] for line in parameters[0].lines]
    alpha, beta, heat = learned[:3]
    assert (alpha.get_ylabel(), beta.get_ylabel()) == ("α", "β")
    assert alpha.lines[0].get_ydata() == pytest.approx([1.1])
    assert beta.lines[0].get_ydata() == pytest.approx([0.9])
    assert heat.images[0].get_array().tolist() == [[5.0]]
    (course,) = learning
    assert [line.get_ydata().tolist() for line in course.lines] == [[0.5, 1.5], [3.0, 3.0]]  # layer by layer


def test_pictures_say_which_seeds_are_in_them():
    history = [{"seconds": 1.0, "test_accuracy": 0.8, "train_loss": 1.0, "test_loss": 1.0}]
    accuracies = {"residual": [0.87, 0.88, 0.89], "rw": [0.86, 0.882, 0.895], "pa": [0.8, 0.8, 0.8]}
    runs = [{**run, "history": history, "learned": {}} for run in runs_of(accuracies)]
    for run in (runs[3], *runs[6:]):
        run["diverged"] = 1
    config = {**CONFIG, "seeds": [0, 1, 2], "data": "a data set with a long name", "device_name": 60 * "a"}
    drawn = figures(config, runs)
    label = "rw (2 of 3 seeds, 1 diverged)"
    assert label in [line.get_label() for line in drawn["accuracy.png"].axes[0].lines]
    assert label in [text.get_text() for text in drawn["differences.png"].axes[0].get_yticklabels()]
    for figure in filter(None, drawn.values()):
        assert figure.get_suptitle().replace("\n", " ").endswith("3 seeds; diverged in all seeds: pa")
        figure.draw_without_rendering()
        title = figure._suptitle.get_window_extent()
        assert figure.bbox.x0 <= title.x0
        assert title.x1 <= figure.bbox.x1


def test_legends_of_many_models_lie_beside_the_panels():
    layers = {"alpha": {"1.1": 1.0, "1.2": 0.5}, "beta": {"1.1": 1.0, "1.2": 1.5}, "gamma[0]": {"1.1": 0.5}}
    epoch = {"seconds": 1.0, "test_accuracy": 0.8, "train_loss": 1.0, "test_loss": 1.0, "learned": layers}
    accuracies = {f"rw+lr+pa@{i}:bound=sigmoid": [0.8, 0.8 + i / 1000] for i in range(20)}
    runs = runs_of({"residual": [0.8, 0.9], **accuracies})
    runs = [{**run, "history": [epoch, epoch], "learned": layers} for run in runs]
    for i, run in enumerate(runs):
        run["parameters"] += i
    drawn = figures({**CONFIG, "seeds": [0, 1]}, runs)
    assert len([figure for figure in drawn.values() if figure.legends]) == 4
    for figure in drawn.values():
        figure.draw_without_rendering()
        panels = [panel.get_window_extent() for panel in figure.axes]
        assert all(panel.height > figure.bbox.height / 2 for panel in panels)
        for box in (legend.get_window_extent() for legend in figure.legends):
            assert not any(box.overlaps(panel) for panel in panels)
            assert all(map(figure.bbox.containsx, (box.x0 + 1, box.x1 - 1)))
            assert all(map(figure.bbox.containsy, (box.y0 + 1, box.y1 - 1)))


def test_several_studies_are_shown_in_turn(finished, tmp_path, capsys):
    for name in ("first", "second"):
        shutil.copytree(finished[1], tmp_path / name)
    folders = [str(tmp_path / name) for name in ("first", "missing", "second")]
    assert Test.main(["--draw", *folders, "--against", "rw"]) == 2
    printed = capsys.readouterr()
    assert printed.out.count("| rw+lr+pa@4/2 ") == 2
    assert folders[1] in printed.err


def test_drawing_without_a_study(tmp_path, capsys):
    assert Test.main(["--draw", str(tmp_path)]) == 2
    assert str(tmp_path / "results.json") in capsys.readouterr().err
    (tmp_path / "results.json").write_text(json.dumps({"config": CONFIG, "runs": []}))
    assert Test.main(["--draw", str(tmp_path)]) == 2
    assert "no run has finished" in capsys.readouterr().err


def test_pictures_of_runs_that_have_all_diverged_go(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path, dirs_exist_ok=True)
    study = json.loads((tmp_path / "results.json").read_text())
    for run in study["runs"]:
        run |= {"diverged": 1, "test_loss": None}
    (tmp_path / "results.json").write_text(json.dumps(study))
    assert Test.main(["--draw", str(tmp_path)]) == 0
    assert not list(tmp_path.glob("*.png"))


def test_a_study_can_be_drawn_against_another_model(finished, tmp_path, capsys):
    shutil.copy(finished[1] / "results.json", tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    assert Test.main(["--draw", str(tmp_path), "--against", "rw"]) == 0
    assert (tmp_path / "parameters.png").exists()
    assert "difference to rw" in capsys.readouterr().out
    assert (tmp_path / "results.json").read_bytes() == before
    assert Test.main(["--draw", str(tmp_path), "--against", "rw+lr+pa@4/2"]) == 0
    assert not (tmp_path / "parameters.png").exists()  # no model has more
    assert Test.main(["--draw", str(tmp_path), "--against", "lr"]) == 2
    error = capsys.readouterr().err
    assert "--against lr" in error
    assert "residual, rw, rw+lr+pa@4/2" in error


def test_a_dollar_in_a_name_is_a_dollar(finished, tmp_path):
    study = json.loads((finished[1] / "results.json").read_text())
    study["config"]["data"] = r"cats$^$, \\frac{"
    (tmp_path / "results.json").write_text(json.dumps(study))
    assert Test.main(["--draw", str(tmp_path)]) == 0
    assert (tmp_path / "accuracy.png").exists()


@pytest.mark.parametrize("value", [None, "missing", []], ids=str)
def test_a_field_that_is_missing_or_wrong_is_named(value, finished, tmp_path, capsys):
    whole = json.loads((finished[1] / "results.json").read_text())
    for place, names in {"config": CONFIG_FIELDS, "run 2": RUN_FIELDS, "history": EPOCH_FIELDS}.items():
        for name in names:
            if isinstance(value, names[name]):
                continue
            study = copy.deepcopy(whole)
            run = study["runs"][1]
            part = {"config": study["config"], "run 2": run, "history": run["history"][0]}[place]
            part.pop(name) if value == "missing" else part.update({name: value})
            (tmp_path / "results.json").write_text(json.dumps(study))
            assert Test.main(["--draw", str(tmp_path)]) == 2
            error = capsys.readouterr().err
            assert len(error.splitlines()) == 1
            assert name in error
            assert place in error
