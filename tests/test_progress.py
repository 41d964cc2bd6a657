"""The plain lines of a search."""

from softprompt.progress import Lines, SearchProgress, TrialProgress

SEARCH = SearchProgress(ended=1, trials=2, best="accuracy 90.0%", seconds_left=61)


def scored(rung: int) -> TrialProgress:
    return TrialProgress(
        0, "trial 0: text [inst]", step=3 * rung, steps=6, rung=rung, rungs=2, score="accuracy 90.0%", loss=0.1
    )


def test_one_line_for_each_rung_again_after_the_end():
    said: list[str] = []
    lines = Lines(said.append)
    for _ in range(2):
        lines.step(scored(1), SEARCH)
        lines.step(scored(1), SEARCH)
        lines.end("trial 0: text [inst]", "pruned", SEARCH)
    rung = "trial 0: text [inst]: rung 1 of 2, step 3 of 6, loss 0.100, best validation accuracy 90.0%, about 1:01 left"
    assert said == [rung, "trial 0: text [inst]: pruned; 1 of 2 trials done, about 1:01 left"] * 2
