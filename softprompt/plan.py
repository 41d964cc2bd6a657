"""What a command would do and cost, found out without training: the data prepared, the model loaded, one pass timed.

A cost is an estimate from one pass of each kind: what is recorded meanwhile is left out, and no trial counts as pruned.
"""

import random
from math import ceil

from softprompt.device import memory, time_run
from softprompt.passes import Work
from softprompt.quantization import count_parameters
from softprompt.sizing import choose_slots, estimate_memory
from softprompt.spec import Choices, ExperimentSpec, FloatRange, StartPoint
from softprompt.workbench import Split, Workbench


def plan(bench: Workbench) -> dict[str, str]:
    """A search and what follows it, by subject, with its cost."""
    experiment = bench.experiment
    trials, minutes = experiment.budget.trials, experiment.budget.minutes
    choice = choose_slots(bench)
    slots = min(choice.slots, trials or choice.slots)
    return {
        **_describe_materials(bench),
        "search": _describe_search(experiment),
        "budget": " or ".join(([_count(trials)] if trials else []) + ([f"{minutes:g} minutes"] if minutes else [])),
        "slots": str(choice),
        "memory": estimate_memory(bench).describe(slots, memory(bench.backbone.device)[0]),
        **_describe_cost(bench, slots),
    }


def plan_evaluation(bench: Workbench) -> dict[str, str]:
    """The measurement of a registered prompt beside the baselines, by subject, with its cost."""
    seconds = _seconds_of_test(bench, _seconds_per_token(bench))
    return {**_describe_materials(bench), "cost": f"{_describe_test(bench, seconds)}; nothing is trained"}


def _describe_materials(bench: Workbench) -> dict[str, str]:
    experiment, data, backbone = bench.experiment, bench.data, bench.backbone
    cut = f"{sum(bench.split(name).cut for name in data.sizes)} inputs"
    if not bench.target.labels:
        cut += f" and {bench.targets_cut} texts"
    parameters = count_parameters(backbone.model)
    return {
        "experiment": f"{experiment.name}, fingerprint {experiment.fingerprint[:12]}, seed {experiment.seed}",
        "model": f"{parameters / 1e6:.0f} M parameters in {experiment.precision} on {backbone.device}, "
        f"weights sha256 {backbone.weights_sha256[:12]}",
        "composition": f"{backbone.composition.name} (deviation {backbone.deviation(backbone.composition):.2g})",
        "data": ", ".join(f"{rows:,} {name}" for name, rows in data.sizes.items())
        + f" rows, digest {data.digest[:12]}, {cut} cut",
    }


def _describe_search(experiment: ExperimentSpec) -> str:
    search, given = experiment.search, experiment.given
    if given:
        return f"none, only search.start: {'; '.join(map(_describe_point, given))}"
    kinds = ", ".join(spec.kind for spec in search.initialization)
    told = (
        f"{_describe(search.method)}; length {_describe(search.length)}; "
        f"learning rate {_describe(search.learning_rate)}; initialization {kinds}"
    )
    further = {
        "reparameterization": " or ".join(spec.kind for spec in search.reparameterization),
        "max_norm": _describe(search.max_norm),
        "dropout": _describe(search.dropout),
    }
    off = {name: type(search).model_fields[name].default for name in further}
    return "; ".join([told, *(f"{name} {v}" for name, v in further.items() if getattr(search, name) != off[name])])


def _describe_point(point: StartPoint) -> str:
    method = f"{point.method}, " if point.method else ""
    further = "".join(f", {name} {value}" for name, value in point.settings.items())
    return f"{method}{point.initialization}, length {point.length}, learning rate {point.learning_rate:g}{further}"


def _count(trials: int) -> str:
    return "1 trial" if trials == 1 else f"{trials} trials"


def _describe(value: object) -> str:
    if isinstance(value, FloatRange):
        return f"{value.low:g} to {value.high:g}{' (log)' if value.log else ''}"
    if isinstance(value, Choices):
        return " or ".join(map(str, value.choices))
    return str(value)


def _describe_cost(bench: Workbench, slots: int) -> dict[str, str]:
    """One trial alone in its lane, and the search with as many trials side by side as there are slots."""
    experiment, training = bench.experiment, bench.experiment.training
    trials, minutes = experiment.budget.trials, experiment.budget.minutes
    token = _seconds_per_token(bench)
    step, score = _time_step(bench, slots), token * _tokens(bench, "validation")
    # Slots share a step, but are scored one after the other.
    together = step * training.steps + slots * score * len(experiment.rungs)
    search = together * ceil(trials / slots) if trials else float("inf")
    told = f"about {search / 60:.1f} minutes of search if no trial is pruned"
    if minutes and 60 * minutes < search:
        told = f"{minutes:g} minutes of search, its budget"
    rungs = ", ".join(map(str, experiment.rungs))
    beside = f", {slots} trials side by side" if slots > 1 else ""
    return {
        "trial": f"{training.steps} steps of {training.batch_size} rows, scored after {rungs}; "
        f"about {together / 60:.1f} minutes if it is not pruned{beside}",
        "cost": f"{told}: {step:.2f} s a step, {score:.1f} s a validation; then "
        + _describe_test(bench, _seconds_of_test(bench, token)),
    }


def _describe_test(bench: Workbench, seconds: float) -> str:
    rows = bench.data.sizes["test"]
    systems = "without a prompt, with the instruction and with the soft prompt"
    return f"about {seconds / 60:.1f} minutes to measure {rows:,} test rows {systems}"


def _seconds_of_test(bench: Workbench, token: float) -> float:
    return 3 * token * _tokens(bench, "test")


def _tokens(bench: Workbench, split: str) -> int:
    return sum(map(len, bench.split(split).inputs))


def _time_step(bench: Workbench, slots: int) -> float:
    """Seconds of the passes over a batch for each slot after the longest prompt.

    The batch is drawn as in training, so that it is padded as there; the optimizer is left out.
    """
    backbone = bench.backbone
    prompts = [bench.longest_prompt.to(backbone.device).requires_grad_() for _ in range(slots)]
    size = bench.experiment.training.batch_size
    drawn = random.Random(0).choices(bench.examples, k=slots * size)
    work = Work(prompts, [drawn[n : n + size] for n in range(0, len(drawn), size)], bench.loss)
    return time_run(lambda: bench.passes.run(backbone, work), backbone.device)


def _seconds_per_token(bench: Workbench) -> float:
    """Seconds of scoring for each token of input, from one batch of middling rows after the longest prompt."""
    split = bench.split("validation")
    rows = sorted(zip(split.inputs, split.answers, strict=True), key=lambda row: len(row[0]))
    inputs, answers = map(list, zip(*rows[max(0, len(rows) // 2 - 32) :][:64], strict=True))
    part = Split(inputs, answers, cut=0)
    return time_run(lambda: bench.measure(bench.longest_prompt, part), bench.backbone.device) / sum(map(len, inputs))
