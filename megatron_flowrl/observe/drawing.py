"""What figures have in common: their looks, axes in rows, a legend below, SVG and PNG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLUMNS = 3
_PANEL = (3.6, 2.55)  # inches
_COLORS = ("#1769aa", "#c2452d", "#2a9d8f", "#8e5bb5", "#d4a017", "#e07a5f", "#555555", "#7f1d1d")
_LINES = ("-", "--", ":", "-.")
_LABEL = 44  # characters of a name
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.edgecolor": "#8b949e",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-4, 5),
    "grid.color": "#e6e9ed",
    "grid.linewidth": 0.7,
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "legend.fontsize": 9,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Drawing:
    """A finished figure."""

    title: str
    panels: int
    """How many are as wide as it is."""

    figure: Figure

    def data_uri(self) -> str:
        """As SVG, for the src of an image: apart from the page and from other figures."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self._saved('svg')).decode()}"

    def png(self, dpi: int = 110) -> bytes:
        """As pixels."""
        return self._saved("png", dpi=dpi)

    def _saved(self, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        # No date, and names of parts by what they are: the same runs make the same file.
        with rc_context({"svg.hashsalt": "megatron-flowrl"}):
            metadata = {"Date": None} if kind == "svg" else None
            self.figure.savefig(buffer, format=kind, metadata=metadata, **options)
        return buffer.getvalue()


def color_of(index: int) -> str:
    """The colour of the run of this place."""
    return _COLORS[index % len(_COLORS)]


def line_of(index: int) -> dict[str, Any]:
    """Colour, and after all colours another kind of line, of the run of this place, for matplotlib."""
    return {"color": color_of(index), "linestyle": _LINES[index // len(_COLORS) % len(_LINES)]}


def shortened(label: str) -> str:
    """A run's name without its middle, where it is long."""
    half = _LABEL // 2 - 1
    return label if len(label) <= _LABEL else f"{label[:half]}...{label[-half:]}"


def grid(count: int, narrowest: int = 1) -> tuple[Figure, list[Axes]]:
    """Pairs of axes in rows of three; one alone is as wide as `narrowest` of them."""
    rows, columns = -(-count // COLUMNS), min(count, COLUMNS)
    figure = Figure(figsize=(_PANEL[0] * max(columns, narrowest), _PANEL[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Below everything; the figure grows by it."""
    texts, (width, height) = [plain(label) for label in labels], figure.get_size_inches()
    columns = max(1, min(len(texts), math.floor(13 * width / (max(map(len, texts)) + 7))))  # 13 characters an inch
    figure.set_figheight(height + 0.15 + 0.2 * -(-len(texts) // columns))
    figure.legend(list(handles), texts, loc="outside lower center", ncols=columns)


def plain(label: str) -> str:
    """A name as matplotlib takes it: no formula, and not hidden by an underscore."""
    label = "".join(char if char.isprintable() else "?" for char in shortened(label)).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


__all__ = ["COLUMNS", "STYLE", "Drawing", "color_of", "grid", "legend", "line_of", "plain", "shortened"]
