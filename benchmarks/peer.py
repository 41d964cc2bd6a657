"""The peer's side: PEFT's prompt tuning in the Hugging Face Trainer, as its documentation has it.

It is given whatever makes the two sides do the same: the prompt that ours starts from, the same rows in the same
batches, padded on the right, AdamW with the same learning rate at every step, and clipping. It saves, logs and
tracks nothing. Scoring is spared the Trainer's own evaluation, which computes a loss over the vocabulary: one pass a
batch, in batches of like length, and the labels' logits alone leave the device. Labels are single tokens here.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.start import Rows, Start
from benchmarks.timing import Point, Stopwatch, now, timed
from softprompt.batch import Example
from softprompt.inference import ROWS
from softprompt.trie import Labels


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The frozen model as transformers loads it by default, with fused attention."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    frozen: PreTrainedModel = model.to(device).eval()
    return frozen


def wrap(base: PreTrainedModel, prompt: Tensor) -> PeftModel:
    """A prompt `[P, H]` over a frozen model, which itself stays as it is."""
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(prompt)))
    assert isinstance(model, PeftModel)
    vectors(model).data.copy_(prompt)
    return model


def vectors(model: PeftModel) -> Tensor:
    """The trained vectors `[P, H]`."""
    return model.get_parameter("prompt_encoder.default.embedding.weight")


class At(TrainerCallback):
    """Calls back after some steps; training stops where the answer is true."""

    def __init__(self, steps: Collection[int], call: Callable[[int], object]) -> None:
        self._steps = steps
        self._call = call

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """As the Trainer calls it."""
        if state.global_step in self._steps and self._call(state.global_step):
            control.should_training_stop = True


class _InOrder(Trainer):
    """Takes the rows as they come: they are in batches of like length already."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows)


def run(model: PeftModel, start: Start, steps: int, *callbacks: TrainerCallback) -> None:
    """Train for so many steps with the Trainer."""
    settings, device = start.settings, model.device
    optimizer = torch.optim.AdamW([vectors(model)], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = LambdaLR(optimizer, lambda n: settings.learning_rate_at(n) / settings.learning_rate)
    arguments = TrainingArguments(
        output_dir="/nonexistent",
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        max_grad_norm=settings.clip_norm,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
    )
    trainer = _InOrder(
        model,
        arguments,
        data_collator=pad_right,
        train_dataset=[{"example": example} for example in start.rows(steps)],
        optimizers=(optimizer, schedule),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def train(base: PreTrainedModel, start: Start, steps: int, warm_up: int) -> float:
    """Examples a second, on the batches that ours begins with; the first ones are not counted."""
    ends: list[float] = []
    clock = At({warm_up, warm_up + steps}, lambda _: ends.append(now()))
    run(wrap(base, start.prompt), start, warm_up + steps, clock)
    return steps * start.settings.batch_size / (ends[1] - ends[0])


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


@torch.inference_mode()
def score(model: PeftModel, inputs: Sequence[tuple[int, ...]], labels: Labels) -> Tensor:
    """`[N, C]` log-probabilities of C labels, each a single token, after N inputs."""
    tokens = [token for (token,) in labels]
    length, scores = len(vectors(model)), torch.empty(len(inputs), len(labels))
    order = sorted(range(len(inputs)), key=lambda n: len(inputs[n]))
    model.eval()
    for part in (order[n : n + ROWS] for n in range(0, len(order), ROWS)):
        batch = pad_right([{"example": Example(inputs[n], ())} for n in part])
        mask = batch["attention_mask"].to(model.device)
        logits = model(input_ids=batch["input_ids"].to(model.device), attention_mask=mask).logits
        last = logits[torch.arange(len(part), device=model.device), length + mask.sum(1) - 1]
        scores[part] = last.float().log_softmax(1)[:, tokens].cpu()
    return scores


def infer(base: PreTrainedModel, prompt: Tensor, inputs: list[tuple[int, ...]], labels: Labels, warm_up: int) -> float:
    """Examples a second, in batches of as many rows of like length; a first call is not counted."""
    model = wrap(base, prompt)
    score(model, inputs[:warm_up], labels)
    return len(inputs) / timed(lambda: score(model, inputs, labels))


def accuracy(model: PeftModel, rows: Rows, labels: Labels) -> float:
    """Share of the rows whose best label is the right one."""
    inputs, gold = rows
    return float((score(model, inputs, labels).argmax(1) == torch.tensor(gold)).double().mean())


def validate(
    base: PreTrainedModel,
    start: Start,
    every: int,
    rows: Rows,
    labels: Labels,
    then: Callable[[Point], bool],
) -> None:
    """Train, call back after every so many steps, and stop where the answer is true; the call is not counted."""
    model, watch, steps = wrap(base, start.prompt), Stopwatch(), start.settings.steps

    def measure(done: int) -> bool:
        found = accuracy(model, rows, labels)
        with watch.paused():
            return then((done, round(watch.seconds, 2), found))

    with watch.running():
        run(model, start, steps, At({*range(every, steps, every), steps}, measure))
