"""What is left at equal time: `python results/equal_time.py results/resnet results/resnet-epochs-4`.

The second study trains the plain residual for more epochs. Between the two, linear in the logarithm of the steps, lies
what the plain residual reaches in the training time of each model of the first, which is its step ratio times as long.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comparison.console import print_table, set_up_output
from comparison.report import compared, measured, summarize, title
from comparison.study import Study


def main(folder: str, longer: str) -> None:
    set_up_output(quiet=False)
    study, more = Study.read(Path(folder)), Study.read(Path(longer))
    growth = math.log(more.config["epochs"] / study.config["epochs"])
    in_order = study.in_order()
    equal_steps = summarize(in_order)
    ratios = {entry["model"]: entry["step_ratio"][0] for entry in equal_steps}
    measures = measured(equal_steps)
    runs = []
    for run in in_order:
        plain, longer_plain = (each.runs["residual", run["seed"]] for each in (study, more))
        part = math.log(ratios[run["model"]]) / growth
        gained = {m.field: part * (longer_plain[m.field] - plain[m.field]) for m in measures}
        runs.append({**run, **{field: run[field] - gain for field, gain in gained.items()}})
    columns, rows = ["model", "step time / residual"], [[name, f"{ratios[name]:.3f}"] for name in ratios]
    for m in measures:
        columns += [f"{m.name} at equal steps", "at equal time [95 % interval]", "p (Holm)", "verdict"]
        for row, steps, time in zip(rows, equal_steps, summarize(runs)):
            row += compared(steps[m.field], m.form, steps["finished"])[:1]
            row += compared(time[m.field], m.form, time["finished"])
    notes = "Differences to residual; p after Holm's correction over the models, for each measure apart."
    print_table(title(study.config), columns, rows[1:], notes)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python results/equal_time.py FOLDER LONGER")
    main(*sys.argv[1:])
