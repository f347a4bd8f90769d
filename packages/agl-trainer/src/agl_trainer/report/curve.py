"""Draws the reward curve of a training, as a PNG or as text for a terminal."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from agl.errors import ConfigError

Points = Sequence[tuple[int, float]]
"""(step, value) pairs in step order, as returned by `store.query_metrics(run)[name]`."""

_WINDOW = 5
_BRAILLE = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of the dots of a braille cell: 4 rows from the top, 2 columns."""


def save_curve(
    path: Path, series: Mapping[str, Points], *, title: str, levels: Mapping[str, float] | None = None
) -> None:
    """Draw `series` raw and smoothed over 5 steps, `levels` as dashed lines. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a reward curve needs matplotlib: pip install 'agl-trainer[report]'") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, points) in enumerate(series.items()):
        steps, values = [step for step, _ in points], [value for _, value in points]
        axes.plot(steps, values, color=f"C{index}", alpha=0.3)
        axes.plot(steps, _smooth(values), color=f"C{index}", linewidth=2, label=name)
    for index, (name, level) in enumerate((levels or {}).items()):
        axes.axhline(level, color="0.4", linestyle=(0, (2 + 2 * index, 2)), label=f"{name} ({level:.3f})")
    axes.set(title=title, xlabel="step", ylabel="reward")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def terminal_curve(points: Points, *, width: int = 60, height: int = 8) -> str:
    """`points`, smoothed over 5 steps, as `height` lines of braille characters, with axis labels."""
    if not points:
        return "no points yet"
    values = _smooth([value for _, value in points])
    low, high = min(values), max(values)
    depths = _resample([(high - value) / ((high - low) or 1) for value in values], width * 2)
    rows = [round(depth * (height * 4 - 1)) for depth in depths]
    cells = [[_BRAILLE] * width for _ in range(height)]
    for column, (before, row) in enumerate(pairwise([rows[0], *rows])):
        for dot in range(min(before + 1, row), max(before, row + 1)):  # connects to the previous column
            cells[dot // 4][column // 2] |= _DOTS[dot % 4][column % 2]
    labels = [f"{high:.3f}", *[""] * (height - 2), f"{low:.3f}"]
    lines = [f"{label:>7} ┤{''.join(map(chr, row))}" for label, row in zip(labels, cells, strict=True)]
    first, last = f"step {points[0][0]}", str(points[-1][0])
    return "\n".join([*lines, f"{'':8}{first}{last:>{width + 1 - len(first)}}"])


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of each value and up to four values before it."""
    windows = [values[max(0, end - _WINDOW) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def _resample(values: Sequence[float], count: int) -> list[float]:
    """`count` values at equal distances, interpolated linearly between `values`."""
    scale = (len(values) - 1) / (count - 1)
    positions = [index * scale for index in range(count)]
    return [
        values[int(position)]
        + (position - int(position)) * (values[min(int(position) + 1, len(values) - 1)] - values[int(position)])
        for position in positions
    ]
