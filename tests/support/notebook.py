"""A notebook's cells run in one namespace, and what they print and draw, as the notebook stores it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def read(path: Path) -> Cell:
    """The notebook as JSON (nbformat 4)."""
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: Cell) -> list[Cell]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: Cell) -> list[list[dict[str, Any]]]:
    """Run every code cell, top to bottom.

    Returns:
        The outputs of each: a stream of what it printed, then a picture for each figure that it left open.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names: dict[str, Any] = {"__name__": "__main__"}
    found = []
    for n, cell in enumerate(code_cells(notebook)):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {n}", "exec"), names)
        outputs: list[dict[str, Any]] = []
        if text := printed.getvalue():
            outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
        for number in plt.get_fignums():
            png = io.BytesIO()
            plt.figure(number).savefig(png, format="png", dpi=110, metadata={"Software": None})
            data = {"image/png": base64.b64encode(png.getvalue()).decode()}
            outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
        plt.close("all")
        found.append(outputs)
    return found


def form(outputs: list[dict[str, Any]]) -> list[str]:
    """The lines of outputs without their numbers, which another machine rounds otherwise, and without the room that they take."""
    texts = ["".join(out["text"]) if out["output_type"] == "stream" else "picture" for out in outputs]
    plain = (re.sub(r"\d[\d.,]*(e[+-]\d+)?", "#", line) for text in texts for line in text.splitlines())
    return [" ".join(line.replace("─", " ").split()) for line in plain]


def write(path: Path, notebook: Cell, found: list[list[dict[str, Any]]]) -> None:
    """Store outputs in their cells."""
    for n, (cell, outputs) in enumerate(zip(code_cells(notebook), found, strict=True), 1):
        cell |= {"execution_count": n, "outputs": outputs}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
