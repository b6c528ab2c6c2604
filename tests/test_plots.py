"""The hand-written chart: well-formed, points where they belong, ticks that are round."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.plots import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, line_chart, running_mean, ticks

numbers = st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda x: round(x, 3))


def lines(path):
    found = ElementTree.parse(path).getroot().findall("{*}polyline")[1:]  # the first is the axes
    return [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in found]


def test_points_are_where_they_belong(tmp_path):
    line_chart(tmp_path / "a.svg", {"x < y & z": [(0, 1), (5, 2), (10, 1)], "b": [(0, math.nan), (10, 2)]}, "T", "x", "y")
    first, second = lines(tmp_path / "a.svg")
    (x0, y0), (x1, y1), (x2, y2) = first
    assert x0 == LEFT and x2 == WIDTH - RIGHT and x1 == (x0 + x2) / 2
    assert TOP < y1 < y0 == y2 < HEIGHT - BOTTOM  # larger is higher up
    assert second == [(x2, y1)]


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5))
def test_every_point_lies_within_the_axes(tmp_path_factory, points):
    path = tmp_path_factory.mktemp("chart") / "a.svg"
    line_chart(path, {"a": points})
    for x, y in lines(path)[0]:
        assert LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no series has a finite point"):
        line_chart(tmp_path / "a.svg", {"a": [(1, math.inf)]})
    assert not list(tmp_path.iterdir())


@given(numbers, st.floats(1e-3, 1e6))
def test_ticks(low, span):
    marks = ticks(low, low + span)
    assert 2 <= len(marks) <= 11
    step = marks[1] - marks[0]
    assert math.isclose(float(f"{step:.1g}"), step, rel_tol=1e-6)


def test_running_mean():
    assert running_mean([1, 3, 5, 7], 2) == [1, 2, 4, 6]
    assert running_mean([], 3) == []
