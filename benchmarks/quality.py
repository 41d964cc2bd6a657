"""Time and steps to a given validation score: the experiment's own first trial, trained by both sides by turns.

Both start from the same prompt and take the same batches at the same learning rates, and both are scored after the same
steps on the same validation rows, whose scoring counts. One side waits while the other has its turn. They differ in
rounding alone, so the steps are about the same; the seconds are what is compared.
"""

from typing import Any

from benchmarks import ours, peer
from benchmarks.sizes import Sizes
from benchmarks.start import Start
from benchmarks.subject import Subject
from benchmarks.timing import Point, ratio


def race(subject: Subject, sizes: Sizes) -> dict[str, Any]:
    """What each side needed to reach the score; None where it did not within the trial's steps."""
    first = subject.experiment.search.start[0].model_dump(exclude_none=True)
    slot = subject.bench.start(first, seed=[subject.experiment.seed, 0])
    start = Start(slot.prompt.detach().cpu(), subject.bench.examples, slot.settings)
    rows = subject.validation(sizes.score_rows)
    turns = ours.validate(subject, start, sizes.score_every, rows)
    curves: dict[str, list[Point]] = {"ours": [], "peft": []}

    def reached(side: str) -> bool:
        return bool(curves[side]) and curves[side][-1][2] >= sizes.score

    def take_our_turn() -> bool:
        point = None if reached("ours") else next(turns, None)
        curves["ours"] += [point] if point else []
        return point is not None

    def after_theirs(point: Point) -> bool:
        curves["peft"].append(point)
        take_our_turn()
        return reached("peft")

    peer.validate(subject.base, start, sizes.score_every, rows, subject.labels, after_theirs)
    while take_our_turn():
        pass
    ends = {side: curve[-1] if reached(side) else (None, None, None) for side, curve in curves.items()}
    return {
        "score": sizes.score,
        "rows": len(rows[0]),
        "ratio": ratio(ends["peft"][1], ends["ours"][1]),
        **{side: {"steps": ends[side][0], "seconds": ends[side][1], "curve": curve} for side, curve in curves.items()},
    }
