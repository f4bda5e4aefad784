"""Statistics and the table."""

import math
import statistics
from collections.abc import Sequence
from itertools import accumulate


def summarize(runs: list[dict], against: str = "residual") -> list[dict]:
    """One entry a model: values over seeds, differences to the model `against` paired by seed, and what they show.

    Runs that diverged are counted, and left out of everything else.
    """
    baseline = {run["seed"]: run for run in runs if run["model"] == against and not run.get("diverged")}
    parameters = next((run["parameters"] for run in runs if run["model"] == against), None)
    summary = []
    for name in dict.fromkeys(run["model"] for run in runs):
        mine = [run for run in runs if run["model"] == name]
        finite = [run for run in mine if not run.get("diverged")]
        paired = [(run, baseline[run["seed"]]) for run in finite if run["seed"] in baseline and name != against]
        summary.append(
            {
                "model": name,
                "parameters": mine[0]["parameters"],
                "added": mine[0]["parameters"] - parameters if name != against and parameters else None,
                "accuracy": [100 * run["test_accuracy"] for run in finite],
                "diverged": len(mine) - len(finite),
                "difference": [100 * (run["test_accuracy"] - base["test_accuracy"]) for run, base in paired],
                **paired_test(*([100 * each["test_accuracy"] for each in pair] for pair in zip(*paired))),
                "seconds": [run["train_seconds"] for run in finite],
                "images_per_second": [run["images_per_second"] for run in finite],
                "compile_seconds": [run["compile_seconds"] for run in finite],
            }
        )
    tested = [entry for entry in summary if entry["p"] is not None]
    for entry, p in zip(tested, holm([entry["p"] for entry in tested])):
        entry["p_holm"] = p
    return summary


def paired_test(mine: Sequence[float] = (), base: Sequence[float] = ()) -> dict:
    """Student's t-test of the paired differences: p, their mean's 95 % interval, their standard deviation.

    And the standard deviation that they would have if they were not paired. None where there is nothing to test: fewer
    than two pairs, or differences that are all the same.
    """
    paired_sd = statistics.stdev(a - b for a, b in zip(mine, base)) if len(mine) > 1 else 0.0
    if paired_sd < 1e-9:  # 0 but for rounding
        return {"p": None, "p_holm": None, "interval": None, "paired_sd": None, "unpaired_sd": None}
    from scipy.stats import ttest_rel  # here, as it takes a second to import

    test = ttest_rel(mine, base)
    return {
        "p": float(test.pvalue),
        "p_holm": None,
        "interval": tuple(map(float, test.confidence_interval(0.95))),
        "paired_sd": paired_sd,
        "unpaired_sd": math.hypot(statistics.stdev(mine), statistics.stdev(base)),
    }


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
    seeds, epochs = config["seeds"], config["epochs"]
    return ", ".join(
        [
            config["data"],
            f"{config['training_images']:,} training images",
            f"{epochs} epoch{'s' * (epochs > 1)}",
            f"{config['device_name']}, {config['precision']}",
            *([f"{config['processes']} processes"] if config["processes"] > 1 else []),
            *([f"{config['parallel']} runs at a time"] if config["parallel"] > 1 else []),
            "one seed" if seeds == 1 else f"{seeds} seeds: mean ± standard deviation",
        ]
    )


def table(config: dict, runs: list[dict]) -> dict:
    """The arguments of console.print_table."""
    several, against = config["seeds"] > 1, config["against"]
    columns = ["model", "parameters", "added %", "test accuracy %", f"difference to {against}"]
    columns += ["95 % interval", "p (Holm)", "significant", "s.d. of differences", "if not paired"] * several
    columns += ["training s", "images/s"] + ["compilation s"] * config["compile"]
    rows = []
    for entry in summarize(runs, against):
        n, pairs, diverged = len(entry["accuracy"]), len(entry["difference"]), entry["diverged"]
        fewer = f" ({n} of {config['seeds']} seeds{f', {diverged} diverged' if diverged else ''})"
        added = entry["added"] and 100 * entry["added"] / (entry["parameters"] - entry["added"])
        row = [
            entry["model"],
            f"{entry['parameters']:,}",
            "–" if added is None else f"{added:.3f}",
            spread(entry["accuracy"], ".2f") + fewer * (n < config["seeds"]),
            f"{statistics.mean(entry['difference']):+.2f}" + f" ({pairs} pairs)" * (pairs < n) if pairs else "–",
        ]
        if several and entry["p"] is None:
            row += ["–"] * 5
        elif several:
            low, high = entry["interval"]
            significant = "no" if entry["p_holm"] >= 0.05 else "higher" if low > 0 else "lower"
            row += [f"[{low:+.2f}, {high:+.2f}]", f"{entry['p_holm']:.2g}", significant]
            row += [f"{entry['paired_sd']:.2f}", f"{entry['unpaired_sd']:.2f}"]
        row += [spread(entry["seconds"], ".1f"), spread(entry["images_per_second"], ".0f")]
        rows.append(row + [spread(entry["compile_seconds"], ".1f")] * config["compile"])
    notes = ["Differences paired by seed; intervals for each alone, p and significance (0.05) after Holm's correction."]
    if not several:
        notes = ["One seed shows little: repeat with --seeds 5 or more."]
    if against not in (run["model"] for run in runs):
        notes.append(f"No differences: there is no {against} among the models.")
    if len({run.get("git_commit") for run in runs}) > 1:
        notes.append("The runs are of several commits, see results.json.")
    return {"title": title(config), "columns": columns, "rows": rows, "notes": " ".join(notes)}
