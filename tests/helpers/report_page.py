"""Reads a report back: its figures, their legends, and the values that they draw."""

from __future__ import annotations

import re
from typing import NamedTuple
from xml.etree import ElementTree


class Figure(NamedTuple):
    """A figure of a page as a reader sees it.

    Attributes:
      section: the heading that it stands under.
      title: its own.
      legend: what stands beside each label; the label of a chart's only line is "".
      lines: points ``(x, y)`` by label, in the units of the axes, where not smoothed.
      dots: the same for single points.
      marks: x and name of upright lines.
      level: y of the dashed level line, or None.
      cells: what each cell of a histogram says, with its opacity.
    """

    section: str
    title: str
    legend: dict[str, str]
    lines: dict[str, list[tuple[float, float]]]
    dots: dict[str, list[tuple[float, float]]]
    marks: list[tuple[float, str]]
    level: float | None
    cells: dict[str, float]


def figures(page: str) -> dict[str, Figure]:
    """All charts of a page (or of a part of one) by title; a title stands once."""
    found: dict[str, Figure] = {}
    section = ""
    for match in re.finditer(
        r"<h2>(?P<h2>.*?)</h2>|<summary>(?P<summary>.*?)</summary>"
        r"|<figure>(?P<figure>.*?)</figure>",
        page,
        re.DOTALL,
    ):
        if match["figure"] is None:
            section = match["h2"] or match["summary"]
        elif "<svg" in match["figure"]:
            figure = _figure(section, f"<figure>{match['figure']}</figure>")
            assert figure.title not in found or not figure.title, figure.title
            found[figure.title] = figure
    return found


def facts(page: str) -> dict[str, str]:
    """The list in a page's head."""
    pairs = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page)
    return {name: value.replace("\N{NO-BREAK SPACE}", " ") for name, value in pairs}


def _figure(section: str, text: str) -> Figure:
    root = ElementTree.fromstring(text)
    legend, colors = {}, {}
    for span in root.findall(".//div[@class='legend']/span"):
        swatch = span.find("i")
        label = ("" if swatch is None else swatch.tail or "").strip()
        legend[label] = span.findtext("b") or ""
        colors["c0" if swatch is None else swatch.get("class")] = label
    svg = root.find("svg")
    assert svg is not None
    x, y = _unplace(svg, "middle", "x"), _unplace(svg, "end", "y")
    lines: dict[str, list[tuple[float, float]]] = {}
    dots: dict[str, list[tuple[float, float]]] = {}
    faint = {e.get("class", "").split()[1] for e in svg.iter() if _is(e, "faint")}
    for element in svg.iter():
        classes = element.get("class", "").split()
        if element.tag == "polyline":
            if classes[1] in faint and "faint" not in classes:
                continue  # smoothed
            points = [p.split(",") for p in element.get("points", "").split()]
            values = [(x(float(a)), y(float(b))) for a, b in points]
            lines.setdefault(colors[classes[1]], []).extend(values)
        elif element.tag == "circle":
            place = x(float(element.get("cx", ""))), y(float(element.get("cy", "")))
            dots.setdefault(colors[classes[1]], []).append(place)
    marks = []
    elements = list(svg)
    for element, label in zip(elements, elements[1:], strict=False):
        if _is(element, "mark"):
            at = re.match(r"M([\d.]+) ", element.get("d", ""))
            marks.append((x(float(at[1])), label.text or ""))
    levels = [e.get("d", "") for e in svg if _is(e, "level")]
    cells = {
        e.findtext("title") or "": float(e.get("fill-opacity", ""))
        for e in svg
        if _is(e, "cell")
    }
    return Figure(
        section=section,
        title=root.findtext(".//h3") or "",
        legend=legend,
        lines=lines,
        dots=dots,
        marks=marks,
        level=y(float(re.match(r"M\d+ ([\d.]+)H", levels[0])[1])) if levels else None,
        cells=cells,
    )


def _is(element: ElementTree.Element, name: str) -> bool:
    return name in element.get("class", "").split()


def _unplace(svg: ElementTree.Element, anchor: str, coordinate: str):
    """From places to values, by the first and the last tick of an axis."""
    ticks = [
        (float(e.get(coordinate, "")), _number(e.text or ""))
        for e in svg
        if _is(e, "tick")
        and e.get("text-anchor") == anchor
        and re.fullmatch(r"-?[\d.]+(e-?\d+)?[kMG]?", e.text or "")
    ]
    (a, low), (b, high) = ticks[0], ticks[-1]
    if a == b:  # one tick
        return lambda place: low
    return lambda place: low + (place - a) / (b - a) * (high - low)


def _number(text: str) -> float:
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    unit = units.get(text[-1], 1.0)
    return float(text.rstrip("kMG")) * unit
