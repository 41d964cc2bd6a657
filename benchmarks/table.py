"""The measured part of `docs/engine.md`, written from the results of the last full pass on a CPU and on a GPU.

A measurement that no result holds stands there as unproven. A test holds the docs to the results.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sizes import FULL, GPU

BEGIN, END = "<!-- written by `make bench` -->", "<!-- end of what it writes -->"
_UNPROVEN = {"cpu": "unproven: not measured yet", "cuda": "unproven: no GPU was at hand"}

Record = dict[str, Any]
Cells = tuple[str, str, str]
"""Ours, the peer's, and the ratio."""


def write_docs(docs: Path, results: Path) -> None:
    """Put the results into the page, in place of those that stand there."""
    before, rest = docs.read_text(encoding="utf-8").split(BEGIN)
    docs.write_text(f"{before}{BEGIN}\n\n{describe(results)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def describe(results: Path) -> str:
    """The machines and the table, as Markdown."""
    read = [
        json.loads(file.read_text(encoding="utf-8")) | {"file": file.name}
        for file in sorted(results.glob("*.json"))
        if file.stem != "lanes"
    ]
    full = sorted((record for record in read if not record.get("quick", True)), key=lambda record: record["date"])
    latest: dict[str, Record] = {record["device_type"]: record for record in full}
    machines = [_describe_machine(record) for record in latest.values()]
    head = ["| | softprompt | PEFT + Trainer | ratio | goal |", "|---|---|---|---|---|"]
    figures = [f"\n![Beside PEFT with the Trainer on {r['device']}](images/{name_figure(r)})" for r in latest.values()]
    return "\n".join([*machines, *head, *(_line(latest, *line) for line in _LINES), *figures])


def name_figure(record: Record) -> str:
    """The file of a record's figure, among the images of the docs."""
    return f"engine-{record['device_type']}.png"


def _describe_machine(record: Record) -> str:
    place = f"[`benchmarks/results/{record['file']}`](../benchmarks/results/{record['file']})"
    peak = f"{record['peak_gflops']:,} GFLOP/s in bfloat16"
    return f"On {record['device']} ({peak}), {record['date']}, from {place}:\n"


def _line(records: dict[str, Record], device: str, what: str, goal: str, cells: Callable[[Record], Cells]) -> str:
    try:
        ours, peft, ratio = cells(records[device])
    except KeyError:
        ours, peft, ratio = "", "", _UNPROVEN[device]
    return f"| {what} | {ours} | {peft} | {ratio} | {goal} |"


def _rate(key: str) -> Callable[[Record], Cells]:
    return lambda record: _rates(record["examples_a_second"][key])


def _rates(result: Record) -> Cells:
    ratios = [ours / peft for ours, peft in result["rounds"]]
    spread = f"{result['ratio']:.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
    return f"{result['ours']:,.1f}", f"{result['peft']:,.1f}", spread


def _race(record: Record) -> Cells:
    result = record["quality"]
    ours, peft = (
        f"{side['seconds']:.0f} s, {side['steps']} steps" if side["seconds"] else "not reached"
        for side in (result["ours"], result["peft"])
    )
    return ours, peft, f"{result['ratio']:.1f}" if result["ratio"] else ""


def _sweep(record: Record) -> Cells:
    result = record["sweep"]
    return (
        f"{result['ours']['seconds_to_score']:.0f} s",
        f"{result['peft']['seconds_to_score']:.0f} s",
        f"{result['ratio']:.1f}",
    )


def _whole(record: Record) -> Cells:
    result = record["sweep"]
    return f"{result['ours']['seconds']:.0f} s", f"{result['peft']['seconds']:.0f} s", f"{result['ratio_of_whole']:.1f}"


def _memory(length: str) -> Callable[[Record], Cells]:
    def cells(record: Record) -> Cells:
        ours, peft = (record["peak_memory_mb"][side][length] for side in ("ours", "peft"))
        return f"{ours:,} MB", f"{peft:,} MB", f"{peft / ours:.1f}"

    return cells


_LINES: Sequence[tuple[str, str, str, Callable[[Record], Cells]]] = (
    ("cpu", "training, P=20, B=16, examples/s", "5", _rate("train_p20")),
    ("cpu", "training, P=100, B=16, examples/s", "8", _rate("train_p100")),
    ("cpu", "inference, P=100, examples/s", "5", _rate("infer_p100")),
    ("cpu", "share of the matrix-multiply peak in training", "70%", lambda r: (f"{r['matmul_share']:.0%}", "", "")),
    ("cpu", f"one trial to {FULL.score:.0%} on {FULL.score_rows} validation rows", "", _race),
    ("cpu", f"a sweep of {FULL.trials} trials to equal best score", "6", _sweep),
    ("cpu", "the whole of both sweeps", "", _whole),
    ("cpu", "peak memory of training, P=20", "", _memory("20")),
    ("cpu", "peak memory of training, P=100", "", _memory("100")),
    ("cuda", f"H100 or H200: a sweep of {GPU.trials} trials to equal best score", "15", _sweep),
    ("cuda", "H100 or H200: training, 1.2 B parameters, P=20, tokens/s", "2", lambda r: _rates(r["large"])),
    (
        "cuda",
        "H100 or H200: share of the matrix-multiply peak in that",
        "50%",
        lambda r: (f"{r['large']['matmul_share']:.0%}", "", ""),
    ),
)
