"""The bars of a search, drawn in a terminal that is none."""

from io import StringIO

from rich.console import Console

from flows.terminal import _Bars, _progress
from softprompt.progress import SearchProgress, TrialProgress


def test_titles_are_no_markup():
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=160, highlight=False, markup=False, emoji=False)
    search = SearchProgress(ended=0, trials=2, best=None, seconds_left=None)
    title = "trial 0: text · text [inst]be kind[/INST] :fire:"
    with _progress(console) as progress:
        bars = _Bars(progress)
        bars.stage("[/nothing] begins")
        bars.step(TrialProgress(0, title, step=1, steps=6, rung=0, rungs=2, score=None, loss=0.1), search)
        progress.refresh()
        assert f"  {title} " in out.getvalue()
        bars.end(title, "pruned [/so]", search)
    assert f"  {title}: pruned [/so]" in out.getvalue()
    assert "· [/nothing] begins" in out.getvalue()
