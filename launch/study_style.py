"""Colors, sizes and files that the plots of a study share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ssl_pretrain.launch.study_columns import RANDOM_BACKBONE, RAW_PIXELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which people with color blindness can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")  # for more lines than colors


class LineStyle(NamedTuple):
    """Color and dashes of a line."""

    color: str
    linestyle: str


REFERENCE_STYLES = {
    RAW_PIXELS: LineStyle("#666666", ":"),
    RANDOM_BACKBONE: LineStyle("#666666", "--"),
}
WIDTH = 9.0  # inches, of a figure that fills a page of the docs
RESOLUTION = 150  # dots per inch of a .png


def line_style(number: int) -> LineStyle:
    """Return the style of a plot's line, counted from 0."""
    dashes = LINE_STYLES[number // len(COLORS) % len(LINE_STYLES)]
    return LineStyle(COLORS[number % len(COLORS)], dashes)


def build_figure(height: float) -> "Figure":
    """Return a figure with a white background and this height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")


def draw_reference(draw: Callable[..., object], value: float, name: str, label: str = "") -> None:
    """Draw raw pixels or the random backbone as a straight line.

    Args:
        draw: `axhline` or `axvline` of a panel.
        value: Position of the line.
        name: `RAW_PIXELS` or `RANDOM_BACKBONE`.
        label: Entry in the legend, by default the name.
    """
    style = REFERENCE_STYLES[name]
    draw(value, label=label or name, color=style.color, linestyle=style.linestyle)


def clean(panel: "Axes", title: str = "") -> None:
    """Give a panel its title and a light grid, and remove the frame's upper and right side."""
    panel.set_title(title, fontsize=11)
    panel.grid(alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def save(figure: "Figure", path: Path, note: str, panels: Sequence["Axes"]) -> None:
    """Save a figure as .png, and as .svg beside it.

    Args:
        figure: The figure.
        path: Path of the .png.
        note: Text below the panels.
        panels: Panels whose labels are listed once in the legend.
    """
    from matplotlib import rc_context

    handles = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels())
    }
    if handles:  # the note is the legend's title, because a label below it would overlap
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=min(4, len(handles)),
            frameon=False,
            title=note or None,
            title_fontsize=9,
        )
    elif note:
        figure.supxlabel(note, fontsize=9, color="#444444")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same figure gives the same file: no date, and names that do not depend on the process.
    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, dpi=RESOLUTION)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
