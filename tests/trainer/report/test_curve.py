"""The reward curve as a PNG and as text."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from agl_trainer.report.curve import save_curve, terminal_curve


def dots(line: str) -> int:
    return sum((ord(char) - 0x2800).bit_count() for char in line if 0x2800 <= ord(char) < 0x2900)


def test_a_png_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "run" / "reward.png"
    points = [(step, step / 10) for step in range(10)]
    save_curve(path, {"reward": points}, title="SQL agent", levels={"base": 0.2, "sft": 0.4})
    picture = imread(path)
    assert picture.shape[2] == 4
    blue = (np.abs(picture[:, :, :3] - (0.12, 0.47, 0.71)).sum(axis=2) < 0.1).nonzero()  # C0, the smoothed line
    left, right = blue[1].argmin(), blue[1].argmax()
    assert blue[0][left] > blue[0][right]  # it rises: rows count from the top


def test_a_rising_curve_rises_in_the_terminal() -> None:
    lines = terminal_curve([(1, 0.2), (2, 0.4), (3, 0.9)], width=20, height=4).splitlines()
    assert lines[0].startswith("  0.500 ┤") and lines[3].startswith("  0.200 ┤")  # smoothed: 0.2, 0.3, 0.5
    cells = [next(row for row in range(4) if lines[row][9 + column] != "\u2800") for column in range(20)]
    assert cells == sorted(cells, reverse=True) and (cells[0], cells[-1]) == (3, 0)
    assert lines[4] == f"{'':8}step 1{'3':>15}"


def test_a_steep_curve_has_no_gaps() -> None:
    lines = terminal_curve([(1, 0.0), (2, 1.0)], width=8, height=8).splitlines()
    assert sum(dots(line) for line in lines) == 32  # each of the 32 dot rows once, in 16 columns


@pytest.mark.parametrize("points", [[(5, 0.5)], [(1, 0.0), (2, 0.0)]])
def test_a_flat_curve_is_a_line(points: list[tuple[int, float]]) -> None:
    lines = terminal_curve(points, width=10, height=3).splitlines()
    assert [dots(line) for line in lines] == [20, 0, 0, 0]


def test_without_points_there_is_a_message() -> None:
    assert terminal_curve([]) == "no points yet"
