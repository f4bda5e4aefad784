"""The pictures of a study."""

import math
import statistics
import textwrap
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from comparison.files import atomic_write
from comparison.report import label, measured, paired_test, summarize, title

if TYPE_CHECKING:  # matplotlib takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(out: Path, config: dict, runs: list[dict]) -> list[Path]:
    """Writes the pictures, and returns their paths."""
    drawn = figures(config, runs)
    for name, figure in drawn.items():
        if figure:
            with atomic_write(out / name) as path:
                figure.savefig(path, dpi=120)
        else:
            (out / name).unlink(missing_ok=True)  # of fewer runs, or compared with another model
    return [out / name for name, figure in drawn.items() if figure]


def figures(config: dict, runs: list[dict]) -> dict[str, "Figure | None"]:
    """accuracy.png (of text loss.png) and the others: None where there is nothing to draw."""
    summary = summarize(runs, config["against"])
    text = title(config)
    if lost := [entry["model"] for entry in summary if not entry["finished"]]:
        text += f"; diverged in all seeds: {', '.join(lost)}"
    summary = [entry for entry in summary if entry["finished"]]
    runs = [run for run in runs if not run["diverged"]]
    by_model = {entry["model"]: [run for run in runs if run["model"] == entry["model"]] for entry in summary}
    style = {
        entry["model"]: {
            "label": label(entry, config),
            "color": f"C{i % 10}",
            "marker": "osD^vPX*"[i % 8],
            "linestyle": ("-", "--", "-.", ":")[i % 4],
        }
        for i, entry in enumerate(summary)
    }
    drawn = {
        **draw_accuracy(by_model, style),
        "curves.png": draw_difference_curves(by_model, config["against"], style),
        "differences.png": draw_differences(summary, config["against"], style),
        "parameters.png": draw_parameters(summary, config["against"], style),
        "learned.png": draw_learned_by_layer(by_model, style),
        "learned_by_epoch.png": draw_learned_by_epoch(by_model, style),
    }
    for figure in filter(None, drawn.values()):
        figure.suptitle(wrapped(text, figure), fontsize="small", parse_math=False)  # a $ is a $
    return drawn


def wrapped(text: str, figure: "Figure") -> str:
    """Over as many lines as it takes in small letters, of which about 15 go into an inch."""
    return textwrap.fill(text, int(15 * figure.get_figwidth()))


def subplots(columns: int, width: float, height: float = 4.5, rows: int = 0) -> tuple:
    """A figure and its panels side by side, high enough for a legend or labels of so many rows."""
    from matplotlib.figure import Figure  # here, as it takes a second to import

    figure = Figure(figsize=(width, max(height, 1 + 0.2 * rows)), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def add_legend(figure: "Figure", heading: str | None = None) -> None:
    """One for all panels, beside them: over no line and no error bar."""
    found = {}
    for panel in figure.axes:
        handles, labels = panel.get_legend_handles_labels()
        found |= dict(zip(labels, handles))
    if found:
        figure.legend(found.values(), found, title=heading, loc="outside right center", fontsize="small")


def draw_accuracy(by_model: dict[str, list[dict]], style: dict) -> dict[str, "Figure | None"]:
    """Accuracy, or the loss of text, over training time: mean and standard deviation over the seeds by epoch."""
    if not by_model:
        return {"accuracy.png": None, "loss.png": None}
    run = next(iter(by_model.values()))[0]
    name, field, factor, quantity = "accuracy.png", "test_accuracy", 100, "test accuracy (%)"
    if run["test_accuracy"] is None:
        name, field, factor, quantity = "loss.png", "test_loss", 1, "test loss (nats per byte)"
    figure, (axes,) = subplots(1, 9, rows=len(by_model))
    for model, mine in by_model.items():
        seconds = over_seeds([list(accumulate(e["seconds"] for e in run["history"])) for run in mine])[0]
        mean, sd = over_seeds([[factor * e[field] for e in run["history"]] for run in mine])
        axes.plot(seconds, mean, **style[model])
        axes.fill_between(seconds, mean - sd, mean + sd, alpha=0.15, color=style[model]["color"])
    axes.set(xlabel="training time (s)", ylabel=quantity)
    axes.grid(alpha=0.3)
    add_legend(figure, "mean ± standard deviation" if max(map(len, by_model.values())) > 1 else None)
    return {name: figure}


def draw_difference_curves(by_model: dict[str, list[dict]], against: str, style: dict) -> "Figure | None":
    """Differences to the model that the others are compared with, in the course of training: mean and 95 % band."""
    fields = {"train_loss": "training loss, mean over the epoch", "test_loss": "test loss after the epoch"}
    base = {run["seed"]: run["history"] for run in by_model.get(against, [])}
    pairs = {
        name: [(run["history"], base[run["seed"]]) for run in mine if run["seed"] in base]
        for name, mine in by_model.items()
        if name != against
    }
    pairs = {name: mine for name, mine in pairs.items() if mine}
    histories = [history for mine in pairs.values() for pair in mine for history in pair]
    if not histories or any(epoch.get(field) is None for each in histories for epoch in each for field in fields):
        return None
    figure, panels = subplots(2, 12, rows=len(pairs))
    for panel, (field, text) in zip(panels, fields.items()):
        for name, mine in pairs.items():
            tests = [
                paired_test([one[i][field] for one, _ in mine], [other[i][field] for _, other in mine])
                for i in range(len(mine[0][0]))
            ]
            means = [statistics.mean(test["differences"]) for test in tests]
            low, high = zip(*(test["interval"] or (mean, mean) for test, mean in zip(tests, means)))
            epochs = range(1, len(means) + 1)
            panel.plot(epochs, means, **style[name])
            panel.fill_between(epochs, low, high, alpha=0.15, color=style[name]["color"])
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set(title=text, xlabel="epoch", ylabel=f"difference to {against} (nats)")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    add_legend(figure, "mean and 95 % band" if max(map(len, pairs.values())) > 1 else None)
    return figure


def draw_differences(summary: list[dict], against: str, style: dict) -> "Figure | None":
    """Differences to the model that the others are compared with: those of the seeds, their mean, its intervals.

    The band is the margin of equality, which asks for the 90 % interval.
    """
    measures = [each for each in measured(summary) if any(entry[each.field]["interval"] for entry in summary)]
    if not measures:
        return None
    figure, panels = subplots(len(measures), 6 * len(measures), 1.8 + 0.4 * len(summary))
    for panel, measure in zip(panels, measures):
        tested = [entry for entry in reversed(summary) if entry[measure.field]["interval"]]
        for y, result in enumerate(entry[measure.field] for entry in tested):
            differences, (low, high) = result["differences"], result["interval"]
            mean = statistics.mean(differences)
            panel.plot(differences, [y] * len(differences), "|", color="0.6", markersize=10)
            fill = "black" if result["p_holm"] < 0.05 else "white"
            errors = [[mean - low], [high - mean]]
            panel.errorbar(mean, y, xerr=errors, fmt="o", color="black", markerfacecolor=fill, capsize=4)
            panel.plot(result["interval_90"], (y, y), color="black", linewidth=3, zorder=1)
        panel.axvspan(-measure.margin, measure.margin, color="0.92", zorder=0)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_yticks(range(len(tested)), [style[entry["model"]]["label"] for entry in tested])
        panel.set(ylim=(-0.6, len(tested) - 0.4), xlabel=f"{measure.name}, difference to {against}")
        panel.locator_params(axis="x", nbins=6)
        panel.grid(axis="x", alpha=0.3)
    how = "seeds, mean and its 95 % interval; filled: p < 0.05 after Holm's correction; equal: the 90 % one (thick)"
    figure.supxlabel(wrapped(f"{how} lies within the band", figure), fontsize="small")
    return figure


def draw_parameters(summary: list[dict], against: str, style: dict) -> "Figure | None":
    """Mean differences and 95 % intervals over the parameters that a model adds. The band is the margin of equality."""
    added = [entry for entry in summary if entry["added"] and entry["added"] > 0]
    measures = [measure for measure in measured(summary) if any(entry[measure.field]["differences"] for entry in added)]
    if not measures:
        return None
    figure, panels = subplots(len(measures), 6 * len(measures), rows=len(added))
    for panel, measure in zip(panels, measures):
        for entry in added:
            result = entry[measure.field]
            if result["differences"]:
                mean = statistics.mean(result["differences"])
                low, high = result["interval"] or (mean, mean)
                look = style[entry["model"]] | {"linestyle": "none"}
                panel.errorbar(entry["added"], mean, yerr=[[mean - low], [high - mean]], capsize=4, **look)
        panel.axhspan(-measure.margin, measure.margin, color="0.92", zorder=0)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set(xscale="log", xlabel=f"parameters added to those of {against}")
        panel.tick_params(axis="x", which="minor", labelsize="xx-small")
        panel.set_ylabel(f"{measure.name}, difference to {against}")
        panel.grid(alpha=0.3)
    add_legend(figure)
    return figure


def draw_learned_by_layer(by_model: dict[str, list[dict]], style: dict) -> "Figure | None":
    """α and β by layer, mean and standard deviation; γ by layer and activation, mean over the seeds."""
    learned = [values for runs in by_model.values() for run in runs for values in run["learned"].values()]
    layers = sorted({layer for values in learned for layer in values}, key=lambda layer: [*map(int, layer.split("."))])
    if not layers:
        return None

    def by_layer(runs: list[dict], key: str) -> tuple:
        return over_seeds([[run["learned"][key].get(layer, math.nan) for layer in layers] for run in runs])

    def nothing(panel: "Axes", symbol: str) -> None:
        panel.text(0.5, 0.5, f"no model here learns {symbol}", ha="center", transform=panel.transAxes)
        panel.set_axis_off()

    rows = {
        f"{name} γ{key[6:-1]}": by_layer(runs, key)[0]
        for name, runs in by_model.items()
        for key in runs[0]["learned"]
        if key.startswith("gamma")
    }
    figure, (*lines, heat) = subplots(3, 15, rows=max(len(by_model), len(rows)))
    rotation = 90 if len(layers) > 9 else 0
    for panel, symbol, key in zip(lines, "αβ", ("alpha", "beta")):
        for name, runs in by_model.items():
            if key in runs[0]["learned"]:
                mean, sd = by_layer(runs, key)
                panel.errorbar(layers, mean, yerr=sd, capsize=3, **style[name])
        panel.set(xlabel="layer (stage.layer)", ylabel=symbol)
        panel.tick_params(axis="x", rotation=rotation)
        panel.grid(alpha=0.3)
        if not panel.has_data():
            nothing(panel, symbol)
    if rows:
        most = max(abs(value) for row in rows.values() for value in row if not math.isnan(value))
        image = heat.imshow(list(rows.values()), cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        heat.set_facecolor("0.8")  # where there is no activation to look at
        for y, row in enumerate(rows.values()):
            for x, value in enumerate(row):
                if not math.isnan(value) and len(layers) <= 15:
                    color = "white" if abs(value) > most / 2 else "black"
                    heat.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
        heat.set_yticks(range(len(rows)), list(rows), fontsize="small")
        heat.set_xticks(range(len(layers)), layers, rotation=rotation)
        heat.set(xlabel="layer (stage.layer)", title="γ, mean over seeds")
        figure.colorbar(image, ax=heat)
    else:
        nothing(heat, "γ")
    add_legend(figure)
    return figure


def draw_learned_by_epoch(by_model: dict[str, list[dict]], style: dict) -> "Figure | None":
    """α, β and γ_0 of every layer over the epochs, mean over the seeds, of the first model that learns them."""
    courses = {}
    for key in ("alpha", "beta", "gamma[0]"):
        for name, runs in by_model.items():
            values = [[[*epoch.get("learned", {}).get(key, {}).values()] for epoch in run["history"]] for run in runs]
            values = [each for each in values if all(each)]  # (seeds, epochs, layers); older runs have none
            if values and key not in courses:
                courses[key] = style[name]["label"], over_seeds(values)[0]
    if not courses:
        return None
    figure, panels = subplots(len(courses), 6 * len(courses))
    from matplotlib import colormaps

    for panel, (key, (name, course)) in zip(panels, courses.items()):
        layers = course.shape[1]
        for i, values in enumerate(course.T):
            color = colormaps["viridis"](i / max(1, layers - 1))
            panel.plot(range(1, len(values) + 1), values, "o-", markersize=3, color=color)
        panel.set(xlabel="epoch", ylabel={"alpha": "α", "beta": "β", "gamma[0]": "γ0"}[key])
        panel.set_title(f"{name}, from the first layer (dark) to the last", fontsize="medium")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    return figure


def over_seeds(values: list) -> tuple:
    """Mean and standard deviation over the first dimension; 0 for the latter where there is one seed."""
    array = np.array(values)
    return array.mean(axis=0), array.std(axis=0, ddof=min(1, len(array) - 1))
