"""What the user sees while the script runs: messages, tables, the live line."""

import os
import sys
from collections.abc import Sequence

import rich
from rich.box import MARKDOWN
from rich.cells import cell_len
from rich.progress import Progress, ProgressColumn
from rich.table import Table
from rich.text import Text


class UserError(Exception):
    """An error that is printed without a traceback: what is wrong, which value, what is allowed.

    The script ends with `code`.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def set_up_output(quiet: bool) -> None:
    """Makes output fit its stream: any encoding, and a live line only on a terminal that can show one.

    Args:
        quiet: prints only errors.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    terminal = sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    rich.reconfigure(force_terminal=terminal, width=None if terminal else 1000, quiet=quiet)


def say(message: object) -> None:
    """Prints a message, uncut and as it is."""
    if not rich.get_console().quiet:
        print(message, flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: str) -> None:
    """Prints a Markdown table, in parts below each other where the terminal is too narrow: no number is cut."""
    console = rich.get_console()
    widths = [max(map(cell_len, cells)) + 3 for cells in zip(columns, *rows)]
    parts: list[list[int]] = [[]]
    for i in range(1, len(columns)):
        if parts[-1] and widths[0] + sum(widths[j] for j in parts[-1]) + widths[i] + 1 > console.width:
            parts.append([])
        parts[-1].append(i)
    say(title)
    for part in parts:
        table = Table(box=MARKDOWN, width=widths[0] + sum(widths[i] for i in part) + 1)
        for i in (0, *part):
            table.add_column(Text(columns[i]), justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(row[i]) for i in (0, *part)))
        console.print(table, crop=False)
    say(notes)


def progress(*columns: ProgressColumn, **options) -> Progress:
    """A bar that leaves no trace, and is not there at all where the output is no terminal."""
    return Progress(*columns, transient=True, disable=not rich.get_console().is_terminal, **options)
