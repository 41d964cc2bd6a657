"""Examples a second in training and in inference, ours against PEFT with the Hugging Face Trainer.

Both sides take turns in one process, on the same rows in the same batches, with the same frozen bfloat16 weights, AdamW
and clipping; what counts is the ratio within a round. Batches are of like length and padded on the right for both. The
peer's model is loaded as transformers loads it by default, with fused attention. Rounds begin with steps that are not
counted.

    make bench            all of it, and the figure of the docs
    make bench QUICK=1    a short pass of the same, kept apart
"""

import argparse
import json
import platform
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor
from torch.utils.data import SequentialSampler
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.figure import draw
from softprompt.composition import Example
from softprompt.home import cache_home
from softprompt.inference import ROWS, Classifier
from softprompt.loading import locate
from softprompt.spec import load_experiment
from softprompt.training import Settings, Slot, step
from softprompt.workbench import Workbench

ROOT = Path(__file__).parent.parent
WARM_UP = 2
"""Steps or passes of a round that are not counted."""


class Measured:
    """The experiment that both sides work on."""

    def __init__(self) -> None:
        self.bench = Workbench(load_experiment(ROOT / "experiments" / "movie-sentiment.yaml"))
        self.backbone = self.bench.backbone
        self.labels = list(self.bench.labels.values())
        folder = locate(self.bench.experiment.model, cache_home())
        peer: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, use_safetensors=True)
        self.peer = peer.to(self.backbone.device).eval()

    def prompt(self, length: int) -> Tensor:
        """A prompt `[P, H]` of sampled vocabulary."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(len(self.backbone.embeddings), (length,), generator=generator)
        return self.backbone.embed(ids.tolist()).cpu()

    def slot(self, length: int, batch_size: int = 16, seed: int = 0) -> Slot:
        """A prompt in training."""
        settings = Settings(
            steps=10**6,
            batch_size=batch_size,
            learning_rate=0.01,
            schedule="constant",
            warmup_steps=0,
            weight_decay=0.0,
            clip_norm=1.0,
            seed=seed,
        )
        return Slot(self.prompt(length), self.bench.examples, settings, self.backbone.device)

    def peft(self, length: int) -> PeftModel:
        """The same prompt in the peer, over the same weights."""
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
        model = get_peft_model(self.peer, config)
        assert isinstance(model, PeftModel)
        model.get_parameter("prompt_encoder.default.embedding.weight").data.copy_(self.prompt(length))
        return model


def measure_peak(device: torch.device) -> float:
    """FLOP/s of the best of some bfloat16 matrix products of 4096 by 4096."""
    a, b = (torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 4096**3 / min(timed(lambda: a @ b) for _ in range(8))


def timed(run: Callable[[], object]) -> float:
    """Seconds of a call, all work of the device included."""
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def train_ours(measured: Measured, slots: list[Slot], steps: int) -> float:
    """Examples a second."""
    for _ in range(WARM_UP):
        step(measured.backbone, slots)
    rows = sum(slot.settings.batch_size for slot in slots)
    return steps * rows / timed(lambda: [step(measured.backbone, slots) for _ in range(steps)])


def train_fresh(measured: Measured, length: int, steps: int) -> float:
    """Examples a second of one new prompt."""
    return train_ours(measured, [measured.slot(length)], steps)


class _Clock(TrainerCallback):
    """When the counted steps began."""

    began = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARM_UP:
            self.began = time.perf_counter()


class _InOrder(Trainer):
    """Takes the rows as they come: they are in batches of like length already."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows)


def train_peft(measured: Measured, length: int, steps: int, batch_size: int = 16) -> float:
    """Examples a second of PEFT with the Trainer, on the batches that `train_ours` begins with."""
    slot, rows = measured.slot(length, batch_size), []
    for slot.steps_done in range(WARM_UP + steps):
        rows += [{"example": example} for example in slot.next_examples()]
    clock = _Clock()
    arguments = TrainingArguments(
        output_dir="/nonexistent",
        max_steps=WARM_UP + steps,
        per_device_train_batch_size=batch_size,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        use_cpu=measured.backbone.device.type == "cpu",
    )
    trainer = _InOrder(measured.peft(length), arguments, data_collator=pad_right, train_dataset=rows, callbacks=[clock])
    trainer.train()
    return steps * batch_size / (time.perf_counter() - clock.began)


def pad_right(rows: list[dict[str, Example]]) -> dict[str, Tensor]:
    """A batch as PEFT takes it; the loss stands at the target tokens alone."""
    lines = [[*row["example"].inputs, *row["example"].target] for row in rows]
    width = max(map(len, lines))
    labels = [[-100] * len(row["example"].inputs) + list(row["example"].target) for row in rows]
    return {
        "input_ids": torch.tensor([line + [0] * (width - len(line)) for line in lines]),
        "attention_mask": torch.tensor([[1] * len(line) + [0] * (width - len(line)) for line in lines]),
        "labels": torch.tensor([line + [-100] * (width - len(line)) for line in labels]),
    }


def infer_ours(measured: Measured, length: int, inputs: list[tuple[int, ...]]) -> float:
    """Examples a second."""
    classifier = Classifier(measured.backbone, measured.prompt(length), measured.labels)
    classifier.score(inputs[:64])
    return len(inputs) / timed(lambda: classifier.score(inputs))


def infer_peft(measured: Measured, length: int, inputs: list[tuple[int, ...]]) -> float:
    """Examples a second, in batches of as many rows of like length."""
    model, device = measured.peft(length).eval(), measured.backbone.device
    ordered = sorted(inputs, key=len)

    def run(rows: list[tuple[int, ...]]) -> None:
        for start in range(0, len(rows), ROWS):
            batch = pad_right([{"example": Example(row, ())} for row in rows[start : start + ROWS]])
            mask = batch["attention_mask"]
            logits = model(input_ids=batch["input_ids"].to(device), attention_mask=mask.to(device)).logits
            logits[torch.arange(len(mask)), length + mask.sum(1) - 1].log_softmax(1).cpu()

    with torch.inference_mode():
        run(ordered[:64])
        return len(inputs) / timed(lambda: run(ordered))


def in_turns(rounds: int, ours: Callable[[], float], peers: Callable[[], float]) -> dict[str, Any]:
    """Both sides by turns; the ratio is the median of the rounds' ratios."""
    pairs = [(ours(), peers()) for _ in range(rounds)]
    for our, peer in pairs:
        print(f"  ours {our:7.2f}   PEFT {peer:7.2f}   ratio {our / peer:.2f}", flush=True)
    return {
        "ours": round(median(our for our, _ in pairs), 2),
        "peft": round(median(peer for _, peer in pairs), 2),
        "ratio": round(median(our / peer for our, peer in pairs), 2),
        "rounds": [[round(our, 2), round(peer, 2)] for our, peer in pairs],
    }


def share_of_peak(measured: Measured, length: int, steps: int, peak: float) -> float:
    """Share of the peak that training reaches, by the products that it does."""
    slot = measured.slot(length)
    step(measured.backbone, [slot])
    with FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            step(measured.backbone, [slot])
    slot.steps_done = 1
    seconds = timed(lambda: [step(measured.backbone, [slot]) for _ in range(steps)])
    return round(float(counter.get_total_flops()) / seconds / peak, 3)


def grow(measured: Measured, steps: int, quick: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """Our examples a second by prompt length, by batch size and by prompts side by side."""
    lengths, batches, sides = (
        ((1, 20, 100), (4, 16, 64), (1, 4)) if quick else ((1, 5, 20, 50, 100), (4, 8, 16, 32, 64), (1, 2, 4, 8))
    )
    yield "P", {str(p): round(train_ours(measured, [measured.slot(p)], steps), 2) for p in lengths}
    yield (
        "B",
        {str(b): round(train_ours(measured, [measured.slot(20, b)], max(2, steps * 16 // b)), 2) for b in batches},
    )
    yield (
        "K",
        {
            str(k): round(train_ours(measured, [measured.slot(20, seed=n) for n in range(k)], max(2, steps // k)), 2)
            for k in sides
        },
    )


def describe_device(device: torch.device) -> tuple[str, str]:
    """The device in words, and as the name of a file."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{_processor()}, {torch.get_num_threads()} threads"
    )
    return name, re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    """Measure, print, write the results and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a short pass of the same")
    quick = parser.parse_args().quick
    rounds, steps, rows = (2, 4, 192) if quick else (3, 10, 400)
    measured = Measured()
    before = measured.backbone.weights_in_memory_sha256()
    device, name = describe_device(measured.backbone.device)
    peak = measure_peak(measured.backbone.device)
    print(f"{device}: {peak / 1e9:.0f} GFLOP/s in bfloat16; {measured.backbone.composition.name}")
    inputs, results = measured.bench.split("validation").inputs[:rows], {}
    for length in (20, 100):
        print(f"training, P={length}, B=16, examples a second")
        results[f"train_p{length}"] = in_turns(
            rounds, partial(train_fresh, measured, length, steps), partial(train_peft, measured, length, steps)
        )
    print(f"inference, P=100, {ROWS} rows a pass, examples a second")
    results["infer_p100"] = in_turns(
        rounds, partial(infer_ours, measured, 100, inputs), partial(infer_peft, measured, 100, inputs)
    )
    share = share_of_peak(measured, 20, steps, peak)
    print(f"share of the peak in training, P=20, B=16: {share:.0%}")
    growth = dict(grow(measured, steps, quick))
    assert measured.backbone.weights_in_memory_sha256() == before, "the frozen weights changed"
    record = {
        **{key: result["ratio"] for key, result in results.items()},
        "matmul_share": share,
        "device": device,
        "date": datetime.now(UTC).date().isoformat(),
        "quick": quick,
        "peak_gflops": round(peak / 1e9),
        "composition": measured.backbone.composition.name,
        "versions": {n: version(n) for n in ("torch", "transformers", "peft")},
        "examples_a_second": results,
        "growth": growth,
    }
    print(json.dumps({key: record[key] for key in (*results, "matmul_share")}))
    file = ROOT / "benchmarks" / "results" / f"{name}{'.quick' if quick else ''}.json"
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {file.relative_to(ROOT)}")
    if not quick:
        draw(record).savefig(ROOT / "docs" / "images" / "engine.png")


if __name__ == "__main__":
    main()
