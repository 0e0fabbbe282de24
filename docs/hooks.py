"""What the site has beyond the pages of docs/: README, CHANGELOG and the notebook as pages, and a reference of the public names.

MkDocs calls the functions that begin with ``on_`` (mkdocs.yml, hooks). Links are written as the repository has them; here those that
leave docs/ are turned into links between pages of the site.
"""

from __future__ import annotations

import base64
import inspect
import json
import posixpath
import re
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "docs/tutorial.ipynb"
# file that is no page of docs/ → its page
OUTSIDE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", NOTEBOOK: "tutorial.md"}
# public module → its page; what stands on it follows from the module's __all__
REFERENCE = {name: f"reference/{name}.md" for name in ("mue", "mue.fold", "mue.moe")}
LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)#\s]+)((?:#[^)\s]*)?\))")


def for_site(text: str, file: str) -> str:
    """``text`` with its links as the site needs them.

    Args:
        text: Markdown. file: where it lies in the repository, as ``docs/rules.md``.
    """
    page = OUTSIDE.get(file) or posixpath.relpath(file, "docs")

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(file), match[2]))
        there = OUTSIDE.get(target) or posixpath.relpath(target, "docs")
        return match[1] + posixpath.relpath(there, posixpath.dirname(page) or ".") + match[3]

    return LINK.sub(link, text)


def reference(module: str) -> str:
    """A page with every class and function that a public module offers, from where it is defined."""
    face = import_module(module)
    lines = [f"# `{module}`", "", f"::: {module}", "    options: {members: false, show_root_heading: false}", ""]
    for name in sorted(face.__all__, key=str.lower):
        thing = inspect.unwrap(getattr(face, name))
        if inspect.isclass(thing) or inspect.isfunction(thing):
            lines += [
                f"::: {thing.__module__}.{thing.__qualname__}",
                f"    options: {{heading: {name}, toc_label: {name}}}",
            ]
    return "\n".join(lines) + "\n"


def notebook(data: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as a page: its words, its code, what that printed, and its pictures.

    Args:
        data: the notebook (nbformat 4), with outputs. name: of the page, without its ending; pictures are called after it.

    Returns:
        Markdown, and file → content of every picture.
    """
    lines, pictures = [], {}
    for cell in data["cells"]:
        source = "".join(cell["source"])
        lines.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                lines.append(f"```\n{''.join(output['text'])}```")
            else:
                file = f"{name}-{len(pictures) + 1}.png"
                pictures[file] = base64.b64decode(output["data"]["image/png"])
                lines.append(f"![What the code above draws]({file})")
    return "\n\n".join(lines) + "\n", pictures


def on_config(config: Any) -> Any:
    """Headings get the anchors that the forge gives them, so that one link works in both places."""
    from pymdownx.slugs import slugify

    config["mdx_configs"].setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not files of docs/."""
    from mkdocs.structure.files import File

    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in OUTSIDE}
    texts[NOTEBOOK], made = notebook(json.loads(texts[NOTEBOOK]), Path(NOTEBOOK).stem)
    pages = {page: for_site(texts[file], file) for file, page in OUTSIDE.items()}
    pages |= {page: reference(module) for module, page in REFERENCE.items()}
    for page, content in (*pages.items(), *made.items()):
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn the links of a page of docs/; those that were made here are turned already."""
    made = page.file.src_uri in {*OUTSIDE.values(), *REFERENCE.values()}
    return markdown if made else for_site(markdown, f"docs/{page.file.src_uri}")
