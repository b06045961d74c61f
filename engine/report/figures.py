"""Figures for a paper, as SVG and PDF: one column wide, text that stays text, and the same bytes for the same numbers."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import atomic_path
from ..references import REFERENCES
from ..statistics.pairing import HIGHER_IS_BETTER
from . import series
from .gather import Arm, Evidence
from .kinds import KINDS, by_category, kinds_of
from .names import name_of
from .search import read_searches

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 3.4, 2.3  # inches: one column of a two-column page
COLOURS = ("#2563c9", "#d2541b", "#0f8a68", "#8e44ad", "#b58300", "#c22d6d", "#4a7a12", "#0e7796")
GREY = "#7d838c"
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "#e6e7e9",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # TrueType: text that can be searched and edited
    "svg.fonttype": "none",
    "svg.hashsalt": "vidtta",  # else ids are random
}
STEP_TITLES = {
    "losses": "loss",
    "gradient_norms": "gradient norm",
    "penalties": "penalty",
    "distances": "distance from the start",
    "fixed_losses": "loss on fixed draws",
    "kl": "KL divergence from the base network, nats",
    "held_out": "loss on held-out draws",
    "forgetting": "loss on held-out clips",
}


def write_figures(evidence: Evidence, focus: Arm, folder: Path) -> dict[str, str]:
    """Write each figure that the results allow as NAME.svg and NAME.pdf; returns the captions by name."""
    import matplotlib

    captions = {}
    with matplotlib.rc_context(STYLE):
        for name, caption, figure in _figures(evidence, focus):
            for suffix, metadata in ((".svg", {"Date": None}), (".pdf", {"CreationDate": None, "ModDate": None})):
                with atomic_path(folder / f"{name}{suffix}") as temporary:
                    figure.savefig(temporary, metadata=metadata)
            captions[name] = caption
    return captions


def _figures(evidence: Evidence, focus: Arm) -> "Iterator[tuple[str, str, Figure]]":
    figure, axes = _drawing(0.5 + 0.24 * len(evidence.treated))
    _forest(evidence, axes)
    yield (
        "differences",
        "Mean PSNR difference to the baseline on the same clips, with 95 % intervals. Hollow: placebos.",
        figure,
    )
    for cost, (title, _) in series.COSTS.items():
        figure, axes = _drawing()
        drawn = _pareto(evidence, axes, cost)
        if drawn:
            yield f"pareto_{cost}", f"Quality against {title}. The grey line is the Pareto front.", figure
    for score in series.frame_scores(evidence):
        figure, axes = _drawing()
        _frames(evidence, axes, score)
        title = name_of(score)[0]
        yield (
            f"frames_{score}",
            f"Difference in {title} to the baseline over frames, mean over each arm's clips with its 95 % interval.",
            figure,
        )
        figure, axes = _drawing()
        _scores(evidence, axes, score)
        yield f"scores_{score}", f"{title} over frames, mean over each arm's clips.", figure
    if categories := by_category(evidence, focus):
        figure, axes = _drawing(width=max(WIDTH, 0.22 * len(categories)))
        axes.boxplot([one.gains for one in categories], tick_labels=[one.name for one in categories], **BOX)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.tick_params(axis="x", rotation=90)
        axes.set_ylabel(f"{_plain(focus.label)}: ΔPSNR, dB")
        yield "categories", f"PSNR difference of single clips by category, {_plain(focus.label)}.", figure
    for name, title in STEP_TITLES.items():
        figure, axes = _drawing()
        drawn = _steps(evidence, axes, name, title)
        if drawn:
            yield f"steps_{name}", f"While adapting: {title}, median and quartiles over clips.", figure
    for kind, values in kinds_of(evidence).items():
        figure, axes = _drawing()
        gains = focus.gains("psnr")
        clips = [clip for clip in gains if clip in values]
        colour = _colour(evidence, focus)
        axes.scatter([values[c] for c in clips], [gains[c] for c in clips], s=6, color=colour, alpha=0.5, linewidths=0)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set(xlabel=KINDS[kind][0], ylabel=f"{_plain(focus.label)}: ΔPSNR, dB")
        yield f"kind_{kind}", f"PSNR difference of single clips against {KINDS[kind][0]}.", figure
    for k, search in enumerate(read_searches(evidence.roots)):
        figure, axes = _drawing()
        _heat(figure, axes, search)
        yield f"search_{k}", search["title"], figure


BOX: dict[str, Any] = {
    "widths": 0.6,
    "flierprops": {"markersize": 1.5, "marker": "."},
    "medianprops": {"color": COLOURS[1]},
    "boxprops": {"linewidth": 0.7},
    "whiskerprops": {"linewidth": 0.7},
    "capprops": {"linewidth": 0.7},
}


def _drawing(height: float = HEIGHT, width: float = WIDTH) -> "tuple[Figure, Axes]":
    """A figure that no window system and no global state knows of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def _colour(evidence: Evidence, arm: Arm) -> str:
    methods = [one.label for one in evidence.methods]
    label = arm.parent or arm.label
    return COLOURS[methods.index(label) % len(COLOURS)] if label in methods else GREY


def _style(arm: Arm) -> str:
    return ":" if arm.placebo else "-"


def _forest(evidence: Evidence, axes: "Axes") -> None:
    shown = [(arm, found) for arm in evidence.treated if (found := arm.difference("psnr"))]
    for k, (arm, found) in enumerate(reversed(shown)):
        colour = _colour(evidence, arm)
        if found.low is not None and found.high is not None:
            axes.plot([found.low, found.high], [k, k], color=colour)
        axes.plot(found.mean, k, "o", markersize=4, color=colour, markerfacecolor="white" if arm.placebo else colour)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(shown)), [_plain(arm.label) for arm, _ in reversed(shown)])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("ΔPSNR, dB")


def _pareto(evidence: Evidence, axes: "Axes", cost: str) -> bool:
    title, read = series.COSTS[cost]
    places = {}
    for arm in evidence.arms:
        found, spent = arm.difference("psnr"), arm.mean(read)
        if spent is None or (found is None and not arm.is_baseline):
            continue
        if cost == "parameters" and not spent:
            continue
        mean, colour = (0.0 if found is None else found.mean), _colour(evidence, arm)
        places[arm.label] = spent, mean
        if found is not None and found.low is not None and found.high is not None:
            axes.plot([spent, spent], [found.low, found.high], color=colour, linewidth=0.8, alpha=0.6)
        axes.plot(spent, mean, "o", markersize=4, color=colour, markerfacecolor="white" if arm.placebo else colour)
        axes.annotate(_plain(arm.label), (spent, mean), xytext=(4, 3), textcoords="offset points", fontsize=6.5)
    line = [places[label] for label in series.front(evidence, cost, "psnr") if label in places]
    if line:
        axes.step(*zip(*line, strict=True), where="post", color=GREY, linewidth=3, alpha=0.3, zorder=0)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.margins(x=0.18)
    if cost == "parameters":
        axes.set_xscale("log")
    axes.set(xlabel=title, ylabel="ΔPSNR, dB")
    return len(places) > 1


def _frames(evidence: Evidence, axes: "Axes", score: str) -> None:
    first, seams = series.scored_frames(evidence)
    for arm in evidence.treated:
        _, gain = series.frame_curves(evidence, arm, score)
        if gain is None:
            continue
        at, colour = first + np.arange(len(gain.mean)), _colour(evidence, arm)
        axes.plot(at, gain.mean, _style(arm), color=colour, label=_plain(arm.label))
        if None not in gain.low:
            axes.fill_between(at, gain.low, gain.high, color=colour, alpha=0.12, linewidth=0)  # pyright: ignore[reportArgumentType]
    axes.axhline(0, color=GREY, linewidth=0.8)
    title, unit, _ = name_of(score)
    _over_frames(axes, seams, f"Δ{title}{f', {unit}' if unit else ''}")


def _scores(evidence: Evidence, axes: "Axes", score: str) -> None:
    first, seams = series.scored_frames(evidence)
    for arm in evidence.arms:
        value, _ = series.frame_curves(evidence, arm, score)
        if value is not None:
            at = first + np.arange(len(value.mean))
            axes.plot(at, value.mean, _style(arm), color=_colour(evidence, arm), label=_plain(arm.label))
    for (name, title), style in zip(REFERENCES.items(), ("--", "-."), strict=True):
        if curve := series.reference_curve(evidence, name, score):
            axes.plot(first + np.arange(len(curve)), curve, style, color=GREY, linewidth=1, label=title)
    title, unit, _ = name_of(score)
    arrow = "higher is better" if score in HIGHER_IS_BETTER else "lower is better"
    _over_frames(axes, seams, f"{title}{f', {unit}' if unit else ''} ({arrow})")


def _over_frames(axes: "Axes", seams: list[int], label: str) -> None:
    for seam in seams:
        axes.axvline(seam - 0.5, color=GREY, linewidth=0.6, linestyle=":")
    axes.set(xlabel="frame", ylabel=label)
    axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22))


def _steps(evidence: Evidence, axes: "Axes", name: str, title: str) -> bool:
    zero = None
    for arm in evidence.treated:
        curves = series.step_curves(arm)
        if name not in curves or len(curves[name].at) < 2:
            continue
        curve, colour = curves[name], _colour(evidence, arm)
        axes.plot(curve.at, curve.median, _style(arm), color=colour, label=_plain(arm.label))
        axes.fill_between(curve.at, curve.low, curve.high, color=colour, alpha=0.1, linewidth=0)
        if (
            name == "losses"
            and "zero_losses" in curves
            and (zero is None or len(curves["zero_losses"].at) > len(zero.at))
        ):
            zero = curves["zero_losses"]
    if not axes.lines:
        return False
    if zero is not None:
        axes.plot(zero.at, zero.median, "--", color=GREY, linewidth=1, label="predicting zero")
    axes.set(xlabel="steps taken", ylabel=title)
    axes.set_ylim(bottom=0)
    axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    return True


def _heat(figure: "Figure", axes: "Axes", search: dict[str, Any]) -> None:
    values = np.array([[np.nan if z is None else z for z in row] for row in search["z"]], dtype=float)
    reach = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    image = axes.imshow(
        values,
        cmap="RdBu" if search["better"] > 0 else "RdBu_r",
        vmin=-reach,
        vmax=reach,
        origin="lower",
        aspect="auto",
    )
    axes.set_xticks(range(len(search["x"])), [_plain(str(x)) for x in search["x"]])
    axes.set_yticks(range(len(search["y"])), [_plain(str(y)) for y in search["y"]])
    axes.set(xlabel=_plain(search["x_name"]), ylabel=_plain(search["y_name"]))
    axes.grid(visible=False)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(column, row, _plain(search["text"][row][column]), ha="center", va="center", fontsize=5)
    figure.colorbar(image, ax=axes)
