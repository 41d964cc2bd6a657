"""A sweep with 1, 2 and 4 lanes on PostgreSQL: trials a minute, and what it costs that lanes share a study.

Training is slow by design: a step of a tiny model is followed by a wait that stands for the time of a GPU, so that the
lanes of this machine's few cores compete for the CPU as lanes on GPUs do, and no more. As many trials for each lane,
whatever their number. Coordination is the share of a lane's time that is neither training nor scoring nor waiting:
asking, claiming, reporting, telling, records and checkpoints.
"""

import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.slow_lane import FOLDER, WAIT
from flows.postgres import database, make_databases, serve_postgres

ROOT = Path(__file__).parent.parent
COUNTS = (1, 2, 4)
TRIALS = 2
"""Trials for each lane."""
STEPS, RUNG = 60, 20
SECONDS = 0.5
"""What a step waits."""
DOCS = ROOT / "docs" / "scaling.md"
FILE = ROOT / "benchmarks" / "results" / "lanes.json"


def main() -> None:
    """Measure, and write the record of this machine."""
    with tempfile.TemporaryDirectory(prefix="lanes-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL may run as a user of its own
        os.environ |= {"SOFTPROMPT_HOME": str(folder / "state"), "SOFTPROMPT_CACHE": str(folder / "cache")}
        os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", WAIT: str(SECONDS)}
        with serve_postgres(folder / "postgres", _free_port()) as address:
            make_databases(address)
            os.environ |= {
                "MLFLOW_TRACKING_URI": database(address, "mlflow"),
                "SOFTPROMPT_STORAGE": database(address, "studies"),
            }
            record = measure(folder)
    FILE.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = DOCS.read_text(encoding="utf-8")
    DOCS.write_text(with_table(page, record), encoding="utf-8")
    print(f"written to {FILE.relative_to(ROOT)} and {DOCS.relative_to(ROOT)}")


def with_table(page: str, record: dict[str, Any]) -> str:
    """The page of the docs with the table of a record between its two marks."""
    lines = [
        "| lanes | trials | seconds | trials a minute | times one lane | coordination |",
        "|---|---|---|---|---|---|",
    ]
    for count, found in record["lanes"].items():
        told = (found["trials"], f"{found['seconds']:.0f}", f"{found['trials_per_minute']:.1f}")
        lines.append(
            f"| {count} | {' | '.join(map(str, told))} | {found['times_one_lane']:.2f} | {found['coordination']:.1%} |"
        )
    before, begin, rest = page.partition("<!-- lanes -->\n")
    _, end, after = rest.partition("<!-- end of lanes -->\n")
    return before + begin + "\n".join(lines) + "\n" + end + after


def measure(folder: Path) -> dict[str, Any]:
    """One sweep for each number of lanes."""
    from softprompt.storage import create_stores

    create_stores()
    found = {}
    for count in COUNTS:
        found[count] = _sweep(folder, count)
        print(f"{count} lanes: {found[count]}", flush=True)
    first = found[COUNTS[0]]["trials_per_minute"]
    for count in COUNTS:
        found[count]["times_one_lane"] = round(found[count]["trials_per_minute"] / first, 2)
    return {
        "cores": os.cpu_count(),
        "trials_per_lane": TRIALS,
        "steps": STEPS,
        "seconds_per_step": SECONDS,
        "lanes": {str(count): values for count, values in found.items()},
    }


def _sweep(folder: Path, count: int) -> dict[str, Any]:
    from softprompt.data import prepare
    from softprompt.home import cache_home
    from softprompt.progress import Lines, watched_by
    from softprompt.sweep import begin_sweep, driving
    from softprompt.trials import TrialRecord
    from softprompt.workbench import Workbench
    from tasks.lanes import run_lanes
    from tests.tiny import tiny_experiment

    space = {"length": {"low": 1, "high": 8}, "learning_rate": {"low": 0.01, "high": 0.1, "log": True}}
    training = {"steps": STEPS, "batch_size": 4, "max_tokens": 48, "schedule": "cosine", "warmup_steps": 1}
    experiment = tiny_experiment(
        folder / "tiny",
        name="lanes",
        search=space | {"initialization": [{"kind": "normal"}], "pruner": {"kind": "none", "every": RUNG}},
        training=training | {"weight_decay": 0.0, "clip_norm": 1.0},
        budget={"trials": count * TRIALS},
        execution={"device": "cpu", "lanes": count},
    )
    times = folder / f"times-{count}"
    times.mkdir()
    os.environ[FOLDER] = str(times)
    data = prepare(experiment, cache_home())
    sweep = begin_sweep(Workbench(experiment, data), {})
    records: list[TrialRecord] = []
    began = time.monotonic()
    with watched_by(Lines(lambda text: None)), driving(sweep):
        program = (sys.executable, "-m", "benchmarks.slow_lane")
        run_lanes(experiment, data.path, sweep, on_end=records.append, program=program)
    whole = time.monotonic() - began
    return _summarize([json.loads(file.read_text()) for file in times.iterdir()], len(records), whole)


def _summarize(lanes: list[dict[str, float]], trials: int, whole: float) -> dict[str, Any]:
    seconds = max(lane["ended"] for lane in lanes) - min(lane["began"] for lane in lanes)
    spent = sum(lane["ended"] - lane["began"] for lane in lanes)
    busy = sum(lane["train"] + lane["score"] for lane in lanes)
    return {
        "trials": trials,
        "seconds": round(seconds, 1),
        "seconds_with_start": round(whole, 1),
        "trials_per_minute": round(60 * trials / seconds, 2),
        "coordination": round(1 - busy / spent, 4),
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
