"""Statistics and the table."""

import statistics
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

# Here and not where it is needed, though it takes a second: after Ctrl-C amid an import it can't be imported any more.
from scipy.special import chdtri, nctdtr, stdtrit
from scipy.stats import ttest_rel


class Measure(NamedTuple):
    """What models are compared by: a field of their runs and epochs, times a factor, and how it is written.

    better: the sign of a difference for the better. margin: below it two models are called equal.
    """

    name: str
    field: str
    factor: float
    form: str
    better: int
    margin: float
    unit: str


MEASURES = (
    Measure("test loss", "test_loss", 1, ".4f", -1, 0.005, "nats"),
    Measure("test accuracy %", "test_accuracy", 100, ".2f", 1, 0.15, "points"),
    Measure("bits per byte", "bits_per_byte", 1, ".4f", -1, 0.005, "bits"),
)


def measured(summary: list[dict]) -> list[Measure]:
    """The measures that there are values of; bits per byte are the test loss in another unit."""
    found = [measure for measure in MEASURES if any(entry[measure.field]["values"] for entry in summary)]
    text = any(measure.field == "bits_per_byte" for measure in found)
    return [measure for measure in found if not (text and measure.field == "test_loss")]


def summarize(runs: list[dict], against: str = "residual") -> list[dict]:
    """One entry a model: for each measure the values over seeds and the differences to `against`, paired by seed.

    Holm's correction is over the models, for each measure apart. Runs that diverged are counted, and left out of
    everything else.
    """
    parameters = next((run["parameters"] for run in runs if run["model"] == against), None)
    summary = []
    for name in dict.fromkeys(run["model"] for run in runs):
        mine = [run for run in runs if run["model"] == name]
        finite = [run for run in mine if not run["diverged"]]
        ratios = [(run["step_ratio"], *run["step_ratio_quartiles"]) for run in finite if run["step_ratio"]]
        summary.append(
            {
                "model": name,
                "parameters": mine[0]["parameters"],
                "added": mine[0]["parameters"] - parameters if name != against and parameters else None,
                "finished": len(finite),
                "diverged": len(mine) - len(finite),
                "step_ratio": [statistics.mean(each) for each in zip(*ratios)],
                "seconds": [run["train_seconds"] for run in finite],
                "compile_seconds": [run["compile_seconds"] for run in finite],
            }
        )
    for measure in MEASURES:
        values = {}
        for run in runs:
            if not run["diverged"] and run[measure.field] is not None:
                values.setdefault(run["model"], {})[run["seed"]] = measure.factor * run[measure.field]
        for entry in summary:
            mine, base = values.get(entry["model"], {}), values.get(against, {})
            seeds = [seed for seed in mine if seed in base and entry["model"] != against]
            tested = paired_test([mine[seed] for seed in seeds], [base[seed] for seed in seeds])
            entry[measure.field] = {"values": list(mine.values()), **tested}
        tested = [entry[measure.field] for entry in summary if entry[measure.field]["p"] is not None]
        for result, p in zip(tested, holm([result["p"] for result in tested])):
            result["p_holm"] = p
            result["verdict"] = verdict(result, measure, len(tested))
    diverged: dict[str, dict[int, bool]] = {}
    for run in runs:
        diverged.setdefault(run["model"], {})[run["seed"]] = bool(run["diverged"])
    base = diverged.get(against, {})
    for entry in summary:
        mine = diverged[entry["model"]]
        more = sum(mine[seed] - base[seed] for seed in mine.keys() & base.keys())
        if more:  # a run that diverges counts as worse than all others
            for measure in MEASURES:
                entry[measure.field]["verdict"] = "worse: diverged" if more > 0 else f"better: {against} diverged"
    return summary


def paired_test(mine: Sequence[float], base: Sequence[float]) -> dict:
    """Student's t-test of the paired differences: p, their mean's 95 and 90 % intervals, their standard deviation.

    None where there is nothing to test: fewer than two pairs, or differences that are all the same.
    """
    differences = [a - b for a, b in zip(mine, base)]
    found = dict.fromkeys(("p", "p_holm", "interval", "interval_90", "sd", "verdict"))
    sd = statistics.stdev(differences) if len(differences) > 1 else 0.0
    if sd > 1e-9:  # more than rounding
        test = ttest_rel(mine, base)
        interval, interval_90 = (tuple(map(float, test.confidence_interval(level))) for level in (0.95, 0.90))
        found |= {"p": float(test.pvalue), "interval": interval, "interval_90": interval_90, "sd": sd}
    return {"differences": differences, **found}


def verdict(result: dict, measure: Measure, tests: int = 1) -> str:
    """better or worse, after Holm's correction; equal: two one-sided tests at 5 % find less than the margin; or open.

    With open goes the number of seeds that find a difference of the margin with a power of 80 %, in four of five
    studies at least: for the upper 80 % limit of the standard deviation, which in few pairs is too small as often as
    too large (Browne 1995, "On the use of a pilot sample for sample size determination").
    """
    if result["p_holm"] < 0.05:
        return "better" if measure.better * statistics.mean(result["differences"]) > 0 else "worse"
    low, high = result["interval_90"]
    if -measure.margin < low and high < measure.margin:
        return "equal"
    n = len(result["differences"])
    sd = result["sd"] * ((n - 1) / chdtri(n - 1, 0.8)) ** 0.5
    needed = max(n + 1, seeds_to_find(measure.margin / sd, tests))
    return f"open, {needed} seeds" if needed < 10_000 else "open"


def seeds_to_find(effect: float, tests: int = 1) -> int:
    """The pairs with which a t-test finds a difference of `effect` standard deviations with a power of 80 %.

    At 5 % / `tests`, which Holm's correction asks of the first of several. 10,000 where it takes more than 9,999.
    """

    def power(n: int) -> float:
        return 1 - nctdtr(n - 1, effect * n**0.5, stdtrit(n - 1, 1 - 0.025 / tests))  # noncentral t

    return bisect_left(range(2, 10_000), 0.8, key=power) + 2


def holm(ps: list[float]) -> list[float]:
    """p-values corrected for being several (Holm 1979), which SciPy does not have."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    corrected = accumulate((min(1.0, (len(ps) - rank) * ps[i]) for rank, i in enumerate(order)), max)
    return [p for _, p in sorted(zip(order, corrected))]


def spread(values: list[float], form: str) -> str:
    """The mean, and the standard deviation where there are several."""
    if not values:
        return "–"
    text = format(statistics.mean(values), form)
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):{form}}"


def title(config: dict) -> str:
    seeds, epochs = len(config["seeds"]), config["epochs"]
    return ", ".join(
        [
            config["data"],
            f"{config['training_images']:,} training images"
            if "training_images" in config
            else f"{config['training_bytes']:,} training bytes an epoch",
            f"{epochs} epoch{'s' * (epochs > 1)}",
            f"{config['device_name']}, {config['precision']}",
            *([f"{config['processes']} processes"] if config["processes"] > 1 else []),
            "one seed" if seeds == 1 else f"{seeds} seeds",
        ]
    )


def label(entry: dict, config: dict) -> str:
    """The model's name, and how many of the seeds have finished where it is not all."""
    seeds, finished, diverged = len(config["seeds"]), entry["finished"], entry["diverged"]
    fewer = f" ({finished} of {seeds} seeds{f', {diverged} diverged' if diverged else ''})"
    return entry["model"] + fewer * (finished < seeds)


def table(config: dict, runs: list[dict]) -> dict:
    """The arguments of console.print_table."""
    seeds, against = len(config["seeds"]), config["against"]
    summary = summarize(runs, against)
    measures = measured(summary)
    columns = ["model", "parameters", "added %"]
    for measure in measures:
        columns += [measure.name, f"difference to {against}" + " [95 % interval]" * (seeds > 1)]
        columns += ["p (Holm)", "verdict"] * (seeds > 1)
    timed = [run["step_ratio"] is not None for run in runs]
    columns += ["step time / residual (quartiles)"] * any(timed)
    columns += ["training s"] + ["compilation s"] * config["compile"]
    rows = []
    for entry in summary:
        added = entry["added"] and 100 * entry["added"] / (entry["parameters"] - entry["added"])
        row = [label(entry, config), f"{entry['parameters']:,}"]
        row.append("–" if added is None else f"{added:.3f}")
        for measure in measures:
            result = entry[measure.field]
            cells = compared(result, measure.form, entry["finished"])
            row += [spread(result["values"], measure.form), *cells[: 3 if seeds > 1 else 1]]
        ratio = "{:.3f} ({:.3f}–{:.3f})".format(*entry["step_ratio"]) if entry["step_ratio"] else "–"
        row += [ratio] * any(timed) + [spread(entry["seconds"], ".1f")]
        rows.append(row + [spread(entry["compile_seconds"], ".1f")] * config["compile"])
    margins = ", ".join(f"{measure.margin:g} {measure.unit}" for measure in measures)
    notes = ["Mean ± standard deviation over the seeds; differences paired by seed, with 95 % intervals."]
    notes.append("p after Holm's correction over the models, for each measure apart.")
    notes.append(f"Equal: below {margins}, by two one-sided tests at 5 %, not corrected.")
    notes.append("Open: neither; that many seeds find such a difference (power 80 %, for an upper limit of spread).")
    if not measures:
        notes = ["All runs have diverged."]
    elif seeds == 1:
        notes = ["One seed shows little: repeat with --seeds 3 or more."]
    if against not in (run["model"] for run in runs):
        notes.append(f"No differences: there is no {against} among the models.")
    if any(timed) and not all(timed):
        notes.append("No step time where a model was not trained side by side with residual.")
    if len({commit for run in runs for commit in (run.get("git_commit") or "").split(", ")}) > 1:
        notes.append("The runs are of several commits, see results.json.")
    return {"title": title(config), "columns": columns, "rows": rows, "notes": " ".join(notes)}


def compared(result: dict, form: str, finished: int) -> list[str]:
    """Difference, p and verdict; with the mean difference its interval, and the pairs where fewer than the runs."""
    pairs, difference = len(result["differences"]), "–"
    if pairs:
        difference = f"{statistics.mean(result['differences']):+{form}}"
        if result["interval"]:
            difference += " [{:+{form}}, {:+{form}}]".format(*result["interval"], form=form)
        difference += f" ({pairs} pairs)" * (pairs < finished)
    p = "–" if result["p_holm"] is None else f"{result['p_holm']:.2g}"
    return [difference, p, result["verdict"] or "–"]
