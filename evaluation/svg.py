"""Markup whose text is always escaped, and small plots drawn with it."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from typing import Iterable, Optional, Sequence, Union

import numpy as np

from .plots import COLOURS

_MARKERS = ("circle", "square", "triangle", "diamond", "cross", "down")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2")
_VOID = {"meta", "br", "col"}


class Markup(str):
    """Text that is markup already."""


Numbers = Union[Sequence[float], np.ndarray]
Content = Union[str, float, None, Iterable["Content"]]


def element(tag: str, *content: Content, **attributes: Union[str, float, None]) -> Markup:
    """An element; what is not `Markup` is escaped.

    Parameters
    ----------
    tag
        Its name.
    *content
        Text, markup, numbers, or iterables of them; None is left out.
    **attributes
        None is left out; underscores become hyphens, and one at the end is dropped.
    """
    parts = [tag]
    for name, value in attributes.items():
        if value is not None:
            text = value if isinstance(value, str) else _number(value)
            parts.append(f'{name.rstrip("_").replace("_", "-")}="{html.escape(text)}"')
    opening = " ".join(parts)
    if tag in _VOID:
        return Markup(f"<{opening}/>")
    return Markup(f"<{opening}>{join(content)}</{tag}>")


def join(content: Content) -> Markup:
    """Content one after the other."""
    if content is None:
        return Markup()
    if isinstance(content, Markup):
        return content
    if isinstance(content, str):
        return Markup(html.escape(content, quote=False))
    if isinstance(content, (int, float)):
        return Markup(_number(content))
    return Markup("".join(join(part) for part in content))


def _number(value: float) -> str:
    """At most one digit behind the point, which is finer than a screen."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Style:
    """How one forecaster is drawn throughout: told apart without colour, too."""

    colour: str
    dash: str
    marker: str

    @classmethod
    def of(cls, number: int) -> Style:
        """Style of the forecaster with this number."""
        count = len(COLOURS)
        shift = number // count
        return cls(
            COLOURS[number % count],
            _DASHES[(number + shift) % len(_DASHES)],
            _MARKERS[(number + shift) % len(_MARKERS)],
        )


BASELINE_STYLE = Style("#4d4d4d", "1 3", "circle")


def marker(style: Style, x: float, y: float, size: float = 3.5) -> Markup:
    """The style's marker around a point."""
    colour: dict[str, Union[str, float]] = {
        "fill": style.colour,
        "stroke": "#ffffff",
        "stroke_width": 0.5,
    }
    if style.marker == "circle":
        return element("circle", cx=x, cy=y, r=size, **colour)
    if style.marker == "square":
        return element(
            "rect", x=x - size, y=y - size, width=2.0 * size, height=2.0 * size, **colour
        )
    if style.marker == "cross":
        arms = f"M{x - size:.1f} {y - size:.1f}l{2 * size} {2 * size}m0 {-2 * size}"
        arms += f"l{-2 * size} {2 * size}"
        return element("path", d=arms, stroke=style.colour, stroke_width=2, fill="none")
    corners = {
        "triangle": [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)],
        "down": [(0, 1.2), (1.1, -0.9), (-1.1, -0.9)],
        "diamond": [(0, -1.4), (1.2, 0), (0, 1.4), (-1.2, 0)],
    }[style.marker]
    return element(
        "polygon", points=_points((x + size * a, y + size * b) for a, b in corners), **colour
    )


def swatch(style: Style) -> Markup:
    """A piece of the style's line with its marker, for a legend."""
    line = element(
        "line", x1=1, y1=7, x2=39, y2=7, stroke=style.colour, stroke_width=2,
        stroke_dasharray=style.dash or None,
    )  # fmt: skip
    return element(
        "svg", line, marker(style, 20, 7), viewBox="0 0 40 14", class_="swatch", aria_hidden="true"
    )


def _points(pairs: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{_number(float(x))},{_number(float(y))}" for x, y in pairs)


def ticks(lower: float, upper: float, most: int = 5) -> list[float]:
    """Round numbers between two, at most `most` of them."""
    if not upper > lower:
        return [lower]
    rough = (upper - lower) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = factor * power
        first, last = math.ceil(lower / step - 1e-9), math.floor(upper / step + 1e-9)
        if last - first + 1 <= most:
            return [round(i * step, 12) for i in range(first, last + 1)]
    return [lower, upper]


def short(value: float) -> str:
    """A number as an axis has it: 0.25, 12k, 3.5M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / min(unit, 1e3 if name == 'k' else unit):.4g}{name}"
    return f"{value:.4g}"


@dataclass
class Plot:
    """A small plot with axes.

    Parameters
    ----------
    title, description
        What a reader of the page and one who cannot see it are told.
    x, y
        Ranges of the axes.
    width, height
        Size in CSS pixels; the plot shrinks with the page.
    x_label, y_label
        Labels of the axes.
    log_x
        Logarithmic x axis.
    left
        Room for the labels of the y axis.
    """

    title: str
    description: str
    x: tuple[float, float]
    y: tuple[float, float]
    width: float = 330
    height: float = 210
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    left: float = 46
    _parts: list[Markup] = field(default_factory=list)

    _RIGHT, _TOP = 10.0, 26.0

    @property
    def _bottom(self) -> float:
        return 38.0 if self.x_label else 24.0

    def at_x(self, value: float) -> float:
        """Pixel of an x value."""
        lower, upper = self.x
        if self.log_x:
            lower, upper, value = math.log(lower), math.log(upper), math.log(value)
        return self.left + (value - lower) / (upper - lower) * (
            self.width - self.left - self._RIGHT
        )

    def at_y(self, value: float) -> float:
        """Pixel of a y value."""
        lower, upper = self.y
        inner = self.height - self._TOP - self._bottom
        return self.height - self._bottom - (value - lower) / (upper - lower) * inner

    def add(self, *parts: Markup) -> Plot:
        """Draw further markup."""
        self._parts.extend(parts)
        return self

    def axis_x(self, values: Sequence[float], labels: Optional[Sequence[str]] = None) -> Plot:
        """Ticks below the plot; those at its sides do not reach beyond it."""
        floor = self.height - self._bottom
        for value, label in zip(values, labels or [short(v) for v in values]):
            x = self.at_x(value)
            anchor = "start" if labels is not None and x < self.left + 1 else "middle"
            self.add(
                element("line", x1=x, x2=x, y1=floor, y2=floor + 4, class_="axis"),
                element("text", label, x=x, y=floor + 15, text_anchor=anchor),
            )
        return self.add(
            element(
                "line", x1=self.left, x2=self.width - self._RIGHT, y1=floor, y2=floor, class_="axis"
            )
        )

    def axis_y(self, values: Sequence[float]) -> Plot:
        """Ticks at the left, with lines across."""
        right = self.width - self._RIGHT
        for value in values:
            y = self.at_y(value)
            self.add(
                element("line", x1=self.left, x2=right, y1=y, y2=y, class_="grid"),
                element("text", short(value), x=self.left - 5, y=y + 4, text_anchor="end"),
            )
        return self

    def line(self, xs: Numbers, ys: Numbers, style: Style, marks: int = 0) -> Plot:
        """A line in a forecaster's style, with at most so many markers; it breaks at NaN."""
        self.polyline(
            xs, ys, stroke=style.colour, stroke_width=2, stroke_dasharray=style.dash or None
        )
        if marks:
            known = [i for i, y in enumerate(ys) if np.isfinite(y)]
            for i in known[:: max(1, -(-len(known) // marks))]:
                self.add(marker(style, self.at_x(xs[i]), self.at_y(ys[i])))
        return self

    def polyline(self, xs: Numbers, ys: Numbers, **attributes: Union[str, float, None]) -> Plot:
        """A line that breaks at NaN."""
        run: list[tuple[float, float]] = []
        for x, y in [*zip(xs, ys), (0.0, math.nan)]:
            if np.isfinite(y):
                run.append((self.at_x(x), self.at_y(y)))
            elif run:
                ends = run if len(run) > 1 else [run[0], (run[0][0] + 0.1, run[0][1])]
                self.add(element("polyline", points=_points(ends), fill="none", **attributes))
                run = []
        return self

    def band(
        self, xs: Numbers, lower: Numbers, upper: Numbers,
        colour: str, opacity: float,
    ) -> Plot:  # fmt: skip
        """The area between two lines."""
        there = [(self.at_x(x), self.at_y(y)) for x, y in zip(xs, upper)]
        back = [(self.at_x(x), self.at_y(y)) for x, y in zip(xs, lower)][::-1]
        return self.add(
            element(
                "polygon", points=_points([*there, *back]), fill=colour, fill_opacity=f"{opacity:g}"
            )
        )

    def bars(self, edges: Sequence[float], heights: Sequence[float], colour: str) -> Plot:
        """Bars between neighbouring edges, from zero."""
        for left, right, height in zip(edges, edges[1:], heights):
            x, y = self.at_x(left), self.at_y(height)
            self.add(
                element(
                    "rect", x=x + 0.5, y=y, width=self.at_x(right) - x - 1,
                    height=self.at_y(0) - y, fill=colour,
                )
            )  # fmt: skip
        return self

    def across(self, value: float, class_: str = "reference") -> Plot:
        """A horizontal line."""
        y = self.at_y(value)
        return self.add(
            element("line", x1=self.left, x2=self.width - self._RIGHT, y1=y, y2=y, class_=class_)
        )

    def down(self, value: float, class_: str = "reference") -> Plot:
        """A vertical line."""
        x = self.at_x(value)
        return self.add(
            element("line", x1=x, x2=x, y1=self._TOP, y2=self.height - self._bottom, class_=class_)
        )

    def interval(self, lower: float, value: float, upper: float, y: float, style: Style) -> Plot:
        """A marker at `value` and whiskers from `lower` to `upper`, at a pixel y."""
        left, right = self.at_x(lower), self.at_x(upper)
        whiskers = f"M{left:.1f} {y - 4:.1f}v8m0 -4H{right:.1f}m0 -4v8"
        return self.add(
            element("path", d=whiskers, stroke=style.colour, stroke_width=2, fill="none"),
            marker(style, self.at_x(value), y, 4.5),
        )

    def text(self, label: str, x: float, y: float, anchor: str = "start") -> Plot:
        """Text at a pixel."""
        return self.add(element("text", label, x=x, y=y, text_anchor=anchor))

    def render(self) -> Markup:
        """The plot as an `svg` element with title and description."""
        labels = []
        if self.x_label:
            middle = (self.left + self.width - self._RIGHT) / 2
            labels.append(
                element("text", self.x_label, x=middle, y=self.height - 6, text_anchor="middle")
            )
        if self.y_label:
            middle = (self._TOP + self.height - self._bottom) / 2
            turned = f"translate(11 {middle:.1f}) rotate(-90)"
            labels.append(element("text", self.y_label, transform=turned, text_anchor="middle"))
        return element(
            "svg",
            element("title", f"{self.title}: {self.description}"),
            element("text", self.title, x=self.left, y=15, class_="title"),
            self._parts,
            labels,
            role="img",
            viewBox=f"0 0 {self.width:g} {self.height:g}",
            class_="plot",
            style=f"max-width:{self.width * 1.25:g}px",
        )
