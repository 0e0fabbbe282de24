"""docs/tutorial.ipynb: its cells run, and what is stored in it is what comes out.

``MUE_WRITE_TUTORIAL=1`` stores what comes out.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from support import notebook
from support.pages import broken, sentences, words
from support.paths import ROOT

PATH = ROOT / "docs" / "tutorial.ipynb"


@pytest.fixture(scope="module")
def found() -> list[list[dict[str, Any]]]:
    return notebook.run(notebook.read(PATH))


def test_every_cell_runs_and_what_is_stored_comes_out(found: list[list[dict[str, Any]]]) -> None:
    stored = notebook.read(PATH)
    if os.environ.get("MUE_WRITE_TUTORIAL"):
        notebook.write(PATH, stored, found)
        return
    for cell, outputs in zip(notebook.code_cells(stored), found, strict=True):
        # every line that is stored comes out, by its first words: a new check adds a line and another may say it otherwise, and
        # neither asks for the notebook to be written again
        lines = iter([line.split()[:3] for line in notebook.form(outputs)])
        assert all(line.split()[:3] in lines for line in notebook.form(cell["outputs"])), outputs
        assert bool(cell["outputs"]) == bool(outputs)
    printed = "".join("".join(out.get("text", "")) for outputs in found for out in outputs)
    assert re.search(r"multipliers +pass", printed) and "hidden width 64, planned 128" in printed
    assert sum(out["output_type"] == "display_data" for outputs in found for out in outputs) == 1


def test_what_is_wrong_in_a_cell_ends_the_run() -> None:
    """Negative control: up and down by each other's roles."""
    wrong = notebook.read(PATH)
    wrong["cells"] = wrong["cells"][:10]  # up to the check, the sweep of the base left out
    for cell in wrong["cells"]:
        source = "".join(cell["source"]).replace("valley(mue.transfer(base, base, guess))", "{}, mue.HParams(1, 1, 1)")
        source = source.replace("guess.lr * 2**fit.minimum", "guess.lr")
        cell["source"] = source.replace('f"{kind}_up", stacked', 'f"{kind}_gate", stacked')
    with pytest.raises(ValueError, match="role expert_up, the model none"):
        notebook.run(wrong)


def test_its_words_are_those_of_a_page() -> None:
    text = "\n\n".join("".join(c["source"]) for c in notebook.read(PATH)["cells"] if c["cell_type"] == "markdown")
    assert [s for s in sentences(text) if words(s) > 30] == []
    assert broken({"docs/tutorial.ipynb": text}, ROOT) == []
