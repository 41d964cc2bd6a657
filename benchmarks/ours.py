"""Our side: the product's engine, called as the product calls it."""

from collections.abc import Iterator

from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.start import Rows, Start
from benchmarks.subject import Subject
from benchmarks.timing import Point, Stopwatch, timed
from softprompt.backbone import Backbone
from softprompt.evaluation import measure_scores
from softprompt.inference import Classifier
from softprompt.training import step
from softprompt.trie import Labels


def train(backbone: Backbone, starts: list[Start], steps: int, warm_up: int) -> float:
    """Examples a second of K prompts that are trained side by side."""
    slots = [start.slot(backbone.device) for start in starts]
    for _ in range(warm_up):
        step(backbone, slots)
    rows = sum(start.settings.batch_size for start in starts)
    return steps * rows / timed(lambda: [step(backbone, slots) for _ in range(steps)])


def infer(backbone: Backbone, prompt: Tensor, inputs: list[tuple[int, ...]], labels: Labels, warm_up: int) -> float:
    """Examples a second; a first call on some of the rows is not counted."""
    classifier = Classifier(backbone, prompt, labels)
    classifier.score(inputs[:warm_up])
    return len(inputs) / timed(lambda: classifier.score(inputs))


def validate(subject: Subject, start: Start, every: int, rows: Rows) -> Iterator[Point]:
    """Train, and yield after every so many steps; what happens between two of these points is not counted."""
    (inputs, gold), labels = rows, list(subject.bench.target.labels.values())
    slot, watch = start.slot(subject.backbone.device), Stopwatch()
    while not slot.finished:
        with watch.running():
            for _ in range(min(every, start.settings.steps - slot.steps_done)):
                step(subject.backbone, [slot])
            accuracy = measure_scores(gold, Classifier(subject.backbone, slot.prompt, labels).score(inputs)).accuracy
        yield slot.steps_done, round(watch.seconds, 2), accuracy


def share_of_peak(backbone: Backbone, start: Start, steps: int, warm_up: int, peak: float) -> float:
    """Share of the peak that training reaches, by the products that it does; the steps counted are those timed."""
    slot = start.slot(backbone.device)

    def run(count: int) -> None:
        for _ in range(count):
            step(backbone, [slot])

    run(warm_up)
    with FlopCounterMode(display=False) as counter:
        run(steps)
    slot.steps_done = warm_up
    return round(float(counter.get_total_flops()) / timed(lambda: run(steps)) / peak, 3)
