"""Differences to the plain residual after each epoch of a study: `python results/epochs.py results/cnn`.

A training loss is the mean over an epoch. Of text both losses are in bits per byte.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comparison.console import print_table, set_up_output
from comparison.report import compared, summarize, title
from comparison.study import Study


def main(folder: str) -> None:
    set_up_output(quiet=False)
    study = Study.read(Path(folder))
    runs = [run for run in study.in_order() if not run["diverged"]]
    if not runs or "test_loss" not in runs[0]["history"][0]:
        sys.exit(f"{folder} has no test losses")
    field, unit = ("bits_per_byte", math.log(2)) if runs[0]["bits_per_byte"] else ("test_loss", 1)
    rows = []
    for epoch in range(study.config["epochs"]):
        training, test = (
            summarize([{**run, field: run["history"][epoch][loss] / unit} for run in runs])
            for loss in ("train_loss", "test_loss")
        )
        for both in zip(training, test):
            cells = [compared(entry[field], ".4f", entry["finished"]) for entry in both]
            if both[0]["model"] != "residual":
                rows.append([both[0]["model"], f"{epoch + 1}", *cells[0], *cells[1]])
    columns = ["model", "epoch", "training loss", "p (Holm)", "verdict", "test loss", "p (Holm)", "verdict"]
    notes = "Differences to residual, with 95 % intervals; p after Holm's correction over the models of an epoch."
    print_table(title(study.config), columns, rows, notes)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python results/epochs.py FOLDER")
    main(sys.argv[1])
