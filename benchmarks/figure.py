"""The figure of the engine's measurements, for the docs. Nothing here computes what it draws."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_SIDES = {"ours": ("softprompt", "#0072b2", "o"), "peft": ("PEFT + Trainer", "#d55e00", "s")}
"""Name, colour and mark: apart for every kind of colour vision, and in grey."""
_RATES = {"train_p20": "training, P=20", "train_p100": "training, P=100", "infer_p100": "inference, P=100"}
_GROWTH = {
    "P": "prompt length P (B=16)",
    "B": "batch size B (P=20)",
    "K": "prompts at once K (P=20, B=16)",
    "T": "input tokens T (P=20, B=16)",
}


def draw(record: dict[str, Any]) -> Figure:
    """Rates and memory; the course of a trial and of a sweep; and how training grows."""
    figure = Figure(figsize=(12, 10), layout="constrained", dpi=130)
    grid = figure.add_gridspec(3, 4)
    _draw_rates(figure.add_subplot(grid[0, :2]), record["examples_a_second"])
    _draw_memory(figure.add_subplot(grid[0, 2:]), record["peak_memory_mb"])
    _draw_race(figure.add_subplot(grid[1, :2]), record["quality"])
    _draw_sweep(figure.add_subplot(grid[1, 2:]), record["sweep"])
    most = max(max(c.values()) for sides in record["growth"].values() for c in sides.values())
    for place, (name, sides) in enumerate(record["growth"].items()):
        axes = figure.add_subplot(grid[2, place])
        _draw_growth(axes, sides)
        axes.set_ylim(0, 1.1 * most)
        axes.set_xlabel(_GROWTH[name])
        axes.set_ylabel("training, examples/s" if place == 0 else "")
    marks = figure.axes[0].get_legend_handles_labels()
    figure.legend(*marks, loc="outside upper right", ncols=2, frameon=False)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{record['device']}, bfloat16, {record['date']}", x=0.01, ha="left")
    return figure


def _draw_rates(axes: Axes, results: dict[str, Any]) -> None:
    rows = {_RATES[key]: result for key, result in results.items()}
    _draw_bars(axes, rows, {name: f"  ({result['ratio']:.1f}x)" for name, result in rows.items()})
    axes.set_xlabel("examples/s")


def _draw_memory(axes: Axes, used: dict[str, dict[str, float]]) -> None:
    rows = {f"training, P={p}": {side: used[side][p] / 1000 for side in used} for p in used["ours"]}
    _draw_bars(axes, rows, dict.fromkeys(rows, ""))
    axes.set_xlabel("peak memory, GB")


def _draw_bars(axes: Axes, rows: dict[str, Any], notes: dict[str, str]) -> None:
    """A pair of bars for each row, with its note behind ours."""
    for place, (name, values) in enumerate(rows.items()):
        for shift, side in ((-0.2, "ours"), (0.2, "peft")):
            label, colour, _ = _SIDES[side]
            axes.barh(place + shift, values[side], height=0.36, color=colour, label=None if place else label)
            note = notes[name] if side == "ours" else ""
            axes.text(values[side], place + shift, f" {values[side]:.1f}{note}", va="center")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlim(0, 1.3 * max(values[side] for values in rows.values() for side in _SIDES))
    axes.invert_yaxis()


def _draw_race(axes: Axes, result: dict[str, Any]) -> None:
    for side, (name, colour, mark) in _SIDES.items():
        _, seconds, scores = zip(*result[side]["curve"], strict=True)
        axes.plot(seconds, [100 * score for score in scores], color=colour, marker=mark, label=name)
    axes.axhline(100 * result["score"], color="black", linestyle=":", linewidth=1)
    axes.set_title(f"one trial to {result['score']:.0%}", fontsize=10)
    axes.set_xlabel("seconds of training and scoring")
    axes.set_xlim(left=0)
    axes.set_ylabel(f"accuracy on {result['rows']} rows, %")


def _draw_sweep(axes: Axes, result: dict[str, Any]) -> None:
    for side, (name, colour, mark) in _SIDES.items():
        seconds, scores = zip(*result[side]["curve"], (result[side]["seconds"], result[side]["best"]), strict=True)
        axes.step(seconds, [100 * score for score in scores], where="post", color=colour, marker=mark, label=name)
    axes.axhline(100 * result["score"], color="black", linestyle=":", linewidth=1)
    axes.set_title("a sweep to equal best score", fontsize=10)
    axes.set_xlabel("seconds of search")
    axes.set_xlim(left=0)
    axes.set_ylabel(f"best accuracy on {result['rows']} rows so far, %")


def _draw_growth(axes: Axes, sides: dict[str, dict[str, float]]) -> None:
    """By the places of our sizes, which are the x axis."""
    sizes = list(sides["ours"])
    for side, values in sides.items():
        name, colour, mark = _SIDES[side]
        axes.plot([sizes.index(size) for size in values], list(values.values()), color=colour, marker=mark, label=name)
    axes.set_xticks(range(len(sizes)), sizes)
