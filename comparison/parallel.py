"""Further processes of the script that share the seeds of its study."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from comparison.study import ROOT

PARENT = "LAUREL_HELPS"  # in the environment of a further process: the process that it was started by


def helping() -> bool:
    """Whether this is a further process."""
    return PARENT in os.environ


def end_with_parent() -> None:
    """Ends a further process whose parent was killed."""
    if helping() and os.name == "posix" and os.getppid() != int(os.environ[PARENT]):
        os._exit(1)


@contextmanager
def helpers(n: int, options: Sequence[str]) -> Iterator[None]:
    """Starts n further processes, unless this is one, with these options; they end with this one.

    What one says on stderr is printed at the end; where it failed, another has done its work, or said the same.
    """
    started = []
    with ExitStack() as files:
        for _ in range(0 if helping() else n):
            errors = files.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": errors}
            environment = {**os.environ, PARENT: str(os.getpid())}
            command = [sys.executable, str(ROOT / "Test.py"), *options]
            # A session of its own: Ctrl-C is this process's.
            process = subprocess.Popen(command, **pipes, env=environment, start_new_session=True)
            started.append((process, errors))
        try:
            yield
        finally:
            for process, errors in started:
                code = process.poll()
                process.terminate()
                process.wait()
                if code:
                    reason = f" by {signal.Signals(-code).name}, perhaps for lack of memory" if code < 0 else ""
                    print(f"A process of --parallel was ended{reason}.", file=sys.stderr)
                errors.seek(0)
                print(errors.read(), end="", file=sys.stderr)
