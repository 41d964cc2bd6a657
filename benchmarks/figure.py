"""The figure of the engine's measurements, for the docs."""

from typing import Any

from matplotlib.figure import Figure

_GREY, _BLUE = "#8c8c8c", "#0072b2"  # apart for every kind of colour vision
_TITLES = {"train_p20": "training, P=20", "train_p100": "training, P=100", "infer_p100": "inference, P=100"}
_AXES = {"P": "prompt length P", "B": "batch size B (P=20)", "K": "prompts at once K (P=20, B=16)"}


def draw(record: dict[str, Any]) -> Figure:
    """Ours beside PEFT, and how ours grows with P, B and K."""
    figure = Figure(figsize=(10, 6.4), layout="constrained", dpi=150)
    grid = figure.add_gridspec(2, 3)
    _draw_bars(figure.add_subplot(grid[0, :]), record["examples_a_second"])
    for place, (name, values) in enumerate(record["growth"].items()):
        axes = figure.add_subplot(grid[1, place])
        axes.plot(range(len(values)), list(values.values()), color=_BLUE, marker="o")
        axes.set_xticks(range(len(values)), list(values))
        axes.set_ylim(0, 1.15 * max(max(each.values()) for each in record["growth"].values()))
        axes.set_xlabel(_AXES[name])
        axes.set_ylabel("training examples/s" if place == 0 else "")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{record['device']}, bfloat16, {record['date']}", fontsize=10)
    return figure


def _draw_bars(axes: Any, results: dict[str, Any]) -> None:
    for place, result in enumerate(results.values()):
        for shift, side, colour in ((-0.2, "peft", _GREY), (0.2, "ours", _BLUE)):
            axes.barh(place + shift, result[side], height=0.36, color=colour)
            ratio = f"  ({result['ratio']:.1f}x)" if side == "ours" else ""
            axes.text(result[side], place + shift, f" {result[side]:.1f}{ratio}", va="center")
    axes.barh(0, 0, color=_BLUE, label="softprompt")
    axes.barh(0, 0, color=_GREY, label="PEFT + Trainer")
    axes.set_yticks(range(len(results)), [_TITLES[key] for key in results])
    axes.invert_yaxis()
    axes.set_xlabel("examples/s")
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)
