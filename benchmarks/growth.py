"""How training speed grows with prompt length P, batch size B, prompts side by side K and input length T."""

from itertools import chain

from benchmarks import ours, peer
from benchmarks.sizes import Sizes
from benchmarks.start import Start, steady
from benchmarks.subject import Subject
from softprompt.batch import Example

Curve = dict[str, float]
"""Examples a second, by the size."""


def grow(subject: Subject, sizes: Sizes) -> dict[str, dict[str, Curve]]:
    """The curves of each side, by what grows."""
    steps, warm_up = sizes.growth_steps, sizes.warm_up

    def our(starts: list[Start], share: float = 1) -> float:
        """Fewer steps where each is longer."""
        return round(ours.train(subject.backbone, starts, max(2, int(steps * min(1, share))), warm_up), 2)

    return {
        "P": {
            "ours": {str(p): our([subject.start(p)]) for p in sizes.lengths},
            "peft": {
                str(p): round(peer.train(subject.base, subject.start(p), max(2, steps // 2), warm_up), 2)
                for p in sizes.peer_lengths
            },
        },
        "B": {"ours": {str(b): our([subject.start(20, batch_size=b)], 16 / b) for b in sizes.batches}},
        "K": {"ours": {str(k): our([subject.start(20, seed=n) for n in range(k)], 1 / k) for k in sizes.sides}},
        "T": {"ours": {str(t): our([_of_length(subject, t)], 32 / t) for t in sizes.inputs}},
    }


def _of_length(subject: Subject, length: int) -> Start:
    """A prompt of P=20 whose inputs have T tokens each: the training rows end to end, cut anew."""
    stream = list(chain.from_iterable(e.inputs for e in subject.bench.examples))
    target = subject.labels[0]
    cuts = range(0, len(stream) - length + 1, length)
    return Start(subject.prompt(20), [Example(tuple(stream[n : n + length]), target) for n in cuts], steady())
