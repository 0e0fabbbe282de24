"""Reports: one self-contained HTML file and the same pictures as PNG, from what is on disk."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from mue.lab.train.run import Run
from mue.util.files import write_atomic, write_text


@dataclass(frozen=True)
class Panel:
    """One of several pictures beside each other, as many as a window has room for, and the words under it."""

    figure: Figure
    caption: str


@dataclass
class Section:
    """One part of a report: texts, a picture, facts, a table; any of them may be missing.

    Attributes:
        id: of the picture's file and of the anchor. texts: as :func:`text` makes them. facts: (what, value).
        header, rows: of the table. wrap: columns whose text may be broken. shades: of the cells, 0 (white) to 1.
        tags: of the cells, what each rests on: a class of the template, or nothing. A table with tags is read line by line where a
            window is narrow, each cell under the name of its column.
        legend: (tag, letter, words) of the tags. panels: pictures beside each other, in the page only.
        fold: where it is not empty the table is folded away under these words.
    """

    id: str
    title: str
    texts: list[dict[str, Any]] = field(default_factory=list)
    figure: Figure | None = None
    caption: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    wrap: tuple[int, ...] = ()
    shades: Sequence[Sequence[float]] = ()
    tags: Sequence[Sequence[str]] = ()
    legend: Sequence[tuple[str, str, str]] = ()
    panels: Sequence[Panel] = ()
    fold: str = ""
    in_page: Literal["svg", "png", ""] = (
        "svg"  # the picture; a PNG is written either way, and a table reads better as text
    )


def text(words: str, *, warn: bool = False) -> dict[str, Any]:
    """A paragraph, set apart where it warns."""
    return {"text": words, "warn": warn}


def write_report(
    folder: Path, title: str, lead: str, sections: Sequence[Section], cards: Sequence[tuple[str, str]] = ()
) -> Path:
    """Write ``folder/report.html`` and ``folder/<section>.png`` for each picture, each file atomically.

    Args:
        lead: the sentence below the title. cards: (what, value) of the numbers to see first.

    Returns:
        The page's path.
    """
    for section in sections:
        if section.figure is not None:
            png = folder / f"{section.id}.png"
            write_atomic(png, partial(section.figure.savefig, dpi=160, format="png"))
    path = folder / "report.html"
    write_text(path, page(title, lead, sections, cards, pictures=folder))
    return path


def page(
    title: str,
    lead: str,
    sections: Sequence[Section],
    cards: Sequence[tuple[str, str]] = (),
    pictures: Path | None = None,
) -> str:
    """One self-contained HTML page.

    Args:
        title, lead, sections, cards: as in :func:`write_report`. pictures: the folder that has them as PNG, for those sections
            whose picture stands in the page as one.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    rendered = []
    for section in sections:
        picture = ""
        if section.figure is not None and section.in_page == "svg":
            picture = _svg(section.figure)
        elif section.figure is not None and section.in_page and pictures is not None:
            picture = _img(pictures / f"{section.id}.png")
        names = ("header", "rows", "wrap", "shades", "tags")
        table = {name: getattr(section, name) for name in names} if section.rows else None
        panels = [{"picture": _svg(panel.figure), "caption": panel.caption} for panel in section.panels]
        letters = {tag: letter for tag, letter, _ in section.legend}
        rendered.append({**vars(section), "picture": picture, "table": table, "panels": panels, "letters": letters})
    environment = Environment(
        loader=PackageLoader("mue.lab.report"),
        autoescape=True,
        undefined=StrictUndefined,  # a name that the template has and we do not give is an error, not an empty place
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        title=title, lead=lead, sections=rendered, cards=[{"value": v, "label": k} for k, v in cards]
    )


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})  # so that the same runs give the same page
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def _img(png: Path) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}" alt="">'


# ---- sections -------------------------------------------------------------------------------------------------------


def runs_section(named: Sequence[tuple[str, Run, Mapping[str, Any]]], facts: Sequence[tuple[str, str]]) -> Section:
    """What was run, with the hashes by which it is found again.

    Args:
        named: name, run and what its ``result.json`` holds. facts: (what, value), above the table.
    """
    rows = []
    for name, run, result in named:
        held = result["val_loss"]
        rows.append(
            [
                name,
                result["name"],
                f"{result['parameters']:,}",
                f"{result['active_parameters']:,}",
                f"{result['tokens']:,}",
                "diverged" if held is None else f"{held:.4f}",
                f"{result['seconds']:.1f}",
                run.key,
                run.plan.hash,
            ]
        )
    header = ["run", "model", "parameters", "active", "tokens", "validation loss", "seconds", "run hash", "plan hash"]
    return Section(id="runs", title="What was run", facts=list(facts), header=header, rows=rows)
