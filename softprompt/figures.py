"""Figures of a sweep, legible at the size that MLflow shows them. Nothing here computes what it draws."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from softprompt.evaluation import Metrics

_GREY, _BLUE = "#8c8c8c", "#0072b2"  # apart for every kind of colour vision


def draw_systems(systems: Mapping[str, Metrics]) -> Figure:
    """Score of each system on the test split with its 95 % interval; the last one is the winner."""
    figure = Figure(figsize=(8, 0.6 + 0.55 * len(systems)), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    first = next(iter(systems.values()))
    objective, scale = first.objective, 100 if first.objective.unit == "%" else 1
    widest = 100 if objective.unit == "%" else 1.02 * max(m.high for m in systems.values())
    for place, m in enumerate(systems.values()):
        colour = _BLUE if place == len(systems) - 1 else _GREY
        spread = [[scale * (m.score - m.low)], [scale * (m.high - m.score)]]
        axes.barh(place, scale * m.score, color=colour, height=0.62)
        axes.errorbar(scale * m.score, place, xerr=spread, color="black", capsize=4, linewidth=1.2)
        axes.text(widest / 100, place, objective.number(m.score), color="white", va="center", fontweight="bold")
    axes.set_yticks(range(len(systems)), list(systems), parse_math=False)  # a user's text may hold a $
    axes.invert_yaxis()
    axes.set_xlim(0, widest)
    axes.set_xlabel(f"{objective.name} on {first.rows:,} test rows, {objective.unit} (bars: 95 % interval)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
