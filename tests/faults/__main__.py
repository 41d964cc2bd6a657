"""`python -m tests.faults`: sets the environment of a test, then runs the suite, whose last line is the result."""

import os
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path

MEMORY = Path("/dev/shm")
"""A file system in memory, where there is one: a process that dies loses none of it, and a commit costs nothing."""


def main() -> int:
    """Everything that reads the environment when it is imported is imported after it is set."""
    os.environ["TQDM_DISABLE"] = "1"
    if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2 << 30:
        tempfile.tempdir = str(MEMORY)
    import tests.conftest  # noqa: F401

    session = Path(os.environ["SOFTPROMPT_HOME"]).parent
    session.chmod(0o711)  # PostgreSQL runs as another user, in a folder below
    (session / "tmp").mkdir()
    tempfile.tempdir = os.environ["TMPDIR"] = str(session / "tmp")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by who was started in the background
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the session's folder is removed at exit
    warnings.simplefilter("ignore")
    import pyarrow
    import tqdm

    # No thread may run where a process is forked.
    tqdm.tqdm.monitor_interval = 0
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    from tests.faults.suite import Settings, run

    return run(Settings.from_environment(), session / "faults")


if __name__ == "__main__":
    sys.exit(main())
