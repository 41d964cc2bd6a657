"""The whole suite as one test, in a process of its own that runs no other; opt-in, as `make test-faults`."""

import subprocess
import sys

import pytest


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_no_fault_loses_or_doubles_anything(capfd):
    with capfd.disabled():
        assert subprocess.call([sys.executable, "-m", "tests.faults"]) == 0
