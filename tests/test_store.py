import os
import subprocess
import sys
from pathlib import Path

from mlflow import MlflowClient


def test_processes_that_start_together_make_the_stores_once(tmp_path: Path):
    command = [sys.executable, "-c", "from softprompt.store import create_stores; create_stores()"]
    environment = os.environ | {"SOFTPROMPT_HOME": str(tmp_path / "home")}
    together = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate(timeout=120)[1] for process in together]
    assert [process.returncode for process in together] == [0, 0, 0], errors
    assert (tmp_path / "home" / "optuna.db").stat().st_size
    assert MlflowClient(f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}").search_experiments()
