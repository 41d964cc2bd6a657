"""The engine beside PEFT with the Hugging Face Trainer, measured in one run.

Both sides take turns, on the same rows in the same batches, with the same frozen weights, AdamW and clipping; what
counts is the ratio within a round. The results go into `benchmarks/results/`, from where the docs have their table and
figure. On a GPU a model of 1 B parameters is measured as well, and the sweep has 32 trials.

    make bench            all of it
    make bench QUICK=1    a short pass of the same, kept apart
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import growth, large, memory, ours, peer, quality, sweep
from benchmarks.figure import draw
from benchmarks.sizes import FULL, GPU, QUICK, Sizes
from benchmarks.subject import Subject
from benchmarks.table import name_figure, write_docs
from benchmarks.timing import describe_device, in_turns, measure_peak
from softprompt.inference import ROWS
from softprompt.spec import load_experiment

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    """Measure, print, write the results, and put them into the docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short pass of the same")
    quick = parser.parse_args().quick
    with _own_state():
        subject = Subject(load_experiment(ROOT / "experiments" / "movie-sentiment.yaml"))
        cuda = subject.backbone.device.type == "cuda"
        sizes = QUICK if quick else GPU if cuda else FULL
        record = measure(subject, sizes) | {"quick": quick}
        if cuda:
            record |= measure_large(subject, sizes, large.LLAMA_1B)
    print(json.dumps({key: value for key, value in record.items() if isinstance(value, float)}))
    file = RESULTS / f"{describe_device(subject.backbone.device)[1]}{'.quick' if quick else ''}.json"
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {file.relative_to(ROOT)}")
    if not quick:
        draw(record).savefig(ROOT / "docs" / "images" / name_figure(record))
        write_docs(ROOT / "docs" / "engine.md", RESULTS)


@contextmanager
def _own_state() -> Iterator[None]:
    """The records of the sweep last as long as the benchmark, and go to no server of the user's."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["SOFTPROMPT_HOME"] = home
        for name in ("MLFLOW_TRACKING_URI", "SOFTPROMPT_STORAGE"):
            os.environ.pop(name, None)
        yield


def measure(subject: Subject, sizes: Sizes) -> dict[str, Any]:
    """The record of a device: ratios and share first, then what they come from."""
    backbone, device = subject.backbone, subject.backbone.device
    before, peak = backbone.weights_in_memory_sha256(), measure_peak(device, sizes.matrix)
    print(f"{describe_device(device)[0]}: {peak / 1e9:,.0f} GFLOP/s in bfloat16; {backbone.composition.name}")
    rates = measure_rates(subject, sizes)
    share = ours.share_of_peak(backbone, subject.start(20), sizes.steps[20], sizes.warm_up, peak)
    print(f"training, P=20, B=16, reaches {share:.0%} of the peak; how it grows", flush=True)
    grown = growth.grow(subject, sizes)
    print(f"a trial to {sizes.score:.0%} on {sizes.score_rows} validation rows", flush=True)
    raced = quality.race(subject, sizes)
    print(f"a sweep of {sizes.trials} trials", flush=True)
    swept = sweep.measure(subject, sizes)
    print("peak memory", flush=True)
    used = memory.measure(_memory_job(subject, sizes))
    assert backbone.weights_in_memory_sha256() == before, "the frozen weights changed"
    return {
        **{key: result["ratio"] for key, result in rates.items()},
        "matmul_share": share,
        f"sweep_{sizes.trials}": swept["ratio"],
        "time_to_score": raced["ratio"],
        "device": describe_device(device)[0],
        "device_type": device.type,
        "date": datetime.now(UTC).date().isoformat(),
        "peak_gflops": round(peak / 1e9),
        "composition": backbone.composition.name,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "optuna")},
        "examples_a_second": rates,
        "quality": raced,
        "sweep": swept,
        "peak_memory_mb": used,
        "growth": grown,
    }


def measure_rates(subject: Subject, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Examples a second of both sides by turns."""
    rates = {}
    for length, steps in sizes.steps.items():
        print(f"training, P={length}, B=16, examples a second", flush=True)
        start = subject.start(length)
        rates[f"train_p{length}"] = in_turns(
            sizes.rounds,
            partial(ours.train, subject.backbone, [start], steps, sizes.warm_up),
            partial(peer.train, subject.base, start, steps, sizes.warm_up),
        )
    print(f"inference, P=100, {ROWS} rows a pass, examples a second", flush=True)
    inputs, prompt = subject.validation(sizes.rows)[0], subject.prompt(100)
    rates["infer_p100"] = in_turns(
        sizes.rounds,
        partial(ours.infer, subject.backbone, prompt, inputs, subject.labels, sizes.warm_rows),
        partial(peer.infer, subject.base, prompt, inputs, subject.labels, sizes.warm_rows),
    )
    return rates


def measure_large(subject: Subject, sizes: Sizes, shape: large.Shape) -> dict[str, Any]:
    """The record of a model with random weights, with its ratio and share."""
    print(f"training, a model of 1 B parameters, P={shape.prompt}, tokens a second", flush=True)
    device, tokenizer = subject.backbone.device, subject.backbone.tokenizer
    result = large.measure(
        shape,
        tokenizer,
        device,
        rounds=sizes.rounds,
        steps=sizes.steps[20],
        warm_up=sizes.warm_up,
        peak=measure_peak(device, sizes.matrix),
    )
    return {"train_1b": result["ratio"], "matmul_share_1b": result["matmul_share"], "large": result}


def _memory_job(subject: Subject, sizes: Sizes) -> memory.Job:
    """The longest batch of some fifty, twice for each prompt length."""
    start = subject.start(1)
    longest = sorted(start.rows(50), key=lambda example: len(example.inputs))[-start.settings.batch_size :]
    return memory.Job(
        folder=str(subject.folder.absolute()),
        precision=subject.experiment.precision,
        device=str(subject.backbone.device),
        lengths=tuple(sorted(sizes.steps)),
        steps=2,
        rows=[(example.inputs, example.target) for example in longest],
    )


if __name__ == "__main__":
    main()
