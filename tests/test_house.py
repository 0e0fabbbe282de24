"""The house rules that a reader cannot see at one place: what is public, what is named twice, how long, what goes in circles, and
whether what is named exists."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import grimp
import pytest

from support.paths import ROOT

SOURCE = ROOT / "src" / "mue"
MOST_LINES = 400
LEAST_WORDS = 20  # what belongs in a folder, and what does not: two sentences at least

PUBLIC = {
    "mue": "Block Convention Dense HParams Layout Mixed MoE Multipliers Plan RULES Training check coordinate_check get_rule"
    " transfer",
    "mue.fold": "FOLDS Fold agc clip_grad_norm_ coefficients convert fold fold_numbers unfold",
    "mue.moe": "ExpertWeights MoELayer Router Routing balance_bias_step experts gate_moments load_balance_loss router_z_loss"
    " routing_stats",
}
"""Names that users' code stands on: more may come, none may go."""

READ = ("README.md", "Makefile", "pyproject.toml", ".importlinter", ".ci", "docs", "src", "tests", "benchmarks")
"""Where names are looked for. (The changelog has those that were.)"""
NAME = re.compile(r"(?<![\w./-])mue(?:\.[A-Za-z_]\w*)+")
NO_NAMES = {"mue.plugins": "a group of entry points", "mue.kinds_under_test": "of a test's own"}

UNPUBLISHED = re.compile(
    r"conventions(?:\.md)? \d|transfer-rules|\banchors [A-Z]?\d|moe-systems|field-20\d\d|\b[sS]hared/|\bW[123]\b|\(C\d|table 6\.2"
)
"""Pages, tables and labels that were never in the repository. A reader is sent to docs/ or to a paper."""
RETIRED = (
    "Belief Board Course Found Mirror Mode Placed Point Problem Pulse Swept Watch adopt as_asked believe due enter held star"
    " telling without_texts _bury _feed _wake"
)
"""Names that this project had made up where the field has its own: none of them comes back."""

# Hooks of a seam may have one name in every file that adds to it: name them here, with the seam.
HOOKS: set[str] = set()


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def doubled(root: Path) -> dict[str, list[str]]:
    """Public classes that are defined in more than one file, with those files."""
    found: dict[str, list[str]] = {}
    for path in files(root):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(path.relative_to(root).as_posix())
    return {name: where for name, where in found.items() if len(where) > 1}


def too_long(root: Path) -> dict[str, int]:
    """Files of more than MOST_LINES lines."""
    lengths = {p.relative_to(root).as_posix(): len(p.read_text(encoding="utf-8").splitlines()) for p in files(root)}
    return {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


def undescribed(root: Path) -> list[str]:
    """Folders with Python in them whose ``__init__.py`` does not say in a few lines what belongs there."""
    found = []
    for folder in sorted({path.parent for path in files(root)}):
        face = folder / "__init__.py"
        doc = ast.get_docstring(ast.parse(face.read_text(encoding="utf-8"))) if face.exists() else None
        if doc is None or len(doc.split()) < LEAST_WORDS:
            found.append(folder.relative_to(root).as_posix())
    return found


def imports(package: str) -> dict[str, set[str]]:
    """What each file of a package imports of it: inside functions and under TYPE_CHECKING as well."""
    graph = grimp.build_graph(package, cache_dir=None, exclude_type_checking_imports=False)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def circles(graph: Mapping[str, Iterable[str]]) -> list[set[str]]:
    """Sets of files each of which reaches every other (Tarjan, SIAM J. Comput. 1, 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            component = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(component)

    for node in graph:
        if node not in order:
            visit(node)
    return found


def names(paths: Iterable[Path]) -> dict[str, list[str]]:
    """Every dotted name of ``mue`` in the texts of these files and folders, with where it stands."""
    found: dict[str, list[str]] = {}
    for path in paths:
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            if file.suffix in (".json", ".pyc", ".so", ".png") or ".egg-info" in str(file):
                continue
            for name in set(NAME.findall(file.read_text(encoding="utf-8"))):
                found.setdefault(name, []).append(file.name)
    return found


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one, down to a class's methods and fields."""
    parts = name.split(".")
    here: object = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        try:
            here = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            if part in getattr(here, "__annotations__", {}):
                return True  # a field without a default; what is behind it is another class's
            if not hasattr(here, part):
                return False
            here = getattr(here, part)
    return True


def written(root: Path, texts: Mapping[str, str]) -> Path:
    """A folder with these files."""
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_there_is_a_house_to_look_at() -> None:
    assert len(files(SOURCE)) > 150 and SOURCE / "api.py" in files(SOURCE)
    assert len(imports("mue")) == len(files(SOURCE))


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_stay(module: str) -> None:
    face = importlib.import_module(module)
    assert set(PUBLIC[module].split()) <= set(face.__all__)
    assert len(face.__all__) == len(set(face.__all__)) and all(hasattr(face, name) for name in face.__all__)


def test_no_public_class_has_the_name_of_another(tmp_path: Path) -> None:
    assert set(doubled(SOURCE)) == HOOKS, doubled(SOURCE)
    one = "class Found: ...\nclass _Own: ...\ndef f():\n    class Inner: ..."
    wrong = written(tmp_path, {"a.py": one, "b.py": "class _Own: ...\nclass Other: ...", "folder/c.py": one})
    assert doubled(wrong) == {"Found": ["a.py", "folder/c.py"]}  # negative control


def test_no_file_is_longer_than_a_few_screens(tmp_path: Path) -> None:
    assert too_long(SOURCE) == {}
    wrong = written(tmp_path, {"a.py": "x = 1\n" * MOST_LINES, "b.py": "x = 1\n" * (MOST_LINES + 1)})
    assert too_long(wrong) == {"b.py": MOST_LINES + 1}  # negative control


def test_every_folder_says_what_belongs_there(tmp_path: Path) -> None:
    assert undescribed(SOURCE) == []
    said = f'"""{"word " * LEAST_WORDS}"""'
    texts = {"__init__.py": said, "a/__init__.py": '"""A few words."""', "b/c.py": "x = 1", "d/__init__.py": said}
    wrong = written(tmp_path, texts)
    assert undescribed(wrong) == ["a", "b"]  # negative control


def test_no_files_go_in_circles() -> None:
    assert circles(imports("mue")) == []


def test_control_circles_are_found_wherever_an_import_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "__init__.py": "",
        "top.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rounds.typed import x",
        "typed.py": "from rounds import top\nx = top",
        "late.py": "def f():\n    from rounds.folder import later",
        "folder/__init__.py": "",
        "folder/later.py": "import rounds.late",
        "straight.py": "from rounds import top, late",
    }
    written(tmp_path / "rounds", texts)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        found = circles(imports("rounds"))
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "rounds"]:
            del sys.modules[name]
    assert sorted(map(sorted, found)) == [["rounds.folder.later", "rounds.late"], ["rounds.top", "rounds.typed"]]


def test_every_name_that_is_named_exists(tmp_path: Path) -> None:
    """In documents, docstrings, messages and settings, where no checker looks."""
    named = names(ROOT / place for place in READ)
    stale = {n: where for n, where in named.items() if not n.startswith(tuple(NO_NAMES)) and not resolves(n)}
    assert stale == {}
    assert len(named) > 200 and {"mue.plan.transfer", "mue.Plan.load", "mue.shapes.routers.RouterKind"} <= set(named)
    texts = {
        "a.md": "see `mue:plan.nowhere` and mue:plan.plan.Inputs.rule",
        "b/c.py": "# mue:Plan.lode, mue:plan.plan.PlanData.rool",
    }
    wrong = {name: text.replace(":", ".") for name, text in texts.items()}  # (this file itself names none of them)
    found = names([written(tmp_path, wrong)])
    missing = {name.removeprefix("mue.") for name in found if not resolves(name)}
    assert missing == {"plan.nowhere", "Plan.lode", "plan.plan.PlanData.rool"} and len(found) == 4  # negative control


def texts(places: Iterable[Path]) -> dict[str, str]:
    """Every text in these files and folders, by path."""
    found = [file for place in places for file in ([place] if place.is_file() else sorted(place.rglob("*")))]
    kinds = {".py", ".md", ".toml", ".cpp", ".h", ".html", ".yml", ""}
    return {str(file): file.read_text(encoding="utf-8") for file in found if file.is_file() and file.suffix in kinds}


def test_nobody_cites_what_is_not_in_the_repository(tmp_path: Path) -> None:
    found = texts(ROOT / place for place in READ if place != ".ci")
    found.pop(str(Path(__file__)))
    assert {where: UNPUBLISHED.findall(text) for where, text in found.items() if UNPUBLISHED.search(text)} == {}
    assert len(found) > 500
    wrong = (
        "conventions 9",
        "conventions.md 11",
        "transfer-rules 1.3",
        "anchors B6",
        "anchors 1.2",
        "(W1)",
        "(C12)",
        "table 6.2's",
    )
    assert all(UNPUBLISHED.search(text) for text in wrong) and not UNPUBLISHED.search("W10, conventions of the base")


def test_retired_names_do_not_come_back(tmp_path: Path) -> None:
    def defined(root: Path) -> set[str]:
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files(root)]
        here = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)}
        return (here | {path.stem for path in files(root)}) & set(RETIRED.split())

    def spoken(paths: Iterable[Path]) -> set[str]:
        code = {span for text in texts(paths).values() for span in re.findall(r"`([\w.]+)`", text)}
        return {part for span in code for part in span.split(".")} & set(RETIRED.split())

    assert defined(SOURCE) == set()
    assert spoken(p for p in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")) if p.name != "LOG.md") == set()
    wrong = written(
        tmp_path, {"a.py": "class Course:\n    def held(self): ...", "pulse.py": "", "b.md": "the `x.Board` is"}
    )
    assert defined(wrong) == {"Course", "held"} and spoken([wrong]) == {"Board"}  # negative control
