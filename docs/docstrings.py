"""Docstrings as the reference of the site reads them: an extension of griffe (mkdocs.yml, handlers: python)."""

from __future__ import annotations

import re
from typing import Any

import griffe

SPHINX = re.compile(r":(?:attr|class|data|func|meth|mod):(?=`)")
SESSION = re.compile(r"^>>> .*?(?=\n\n|\Z)", flags=re.S | re.M)
TOGETHER = re.compile(r"^( +)(\w+(?:, \w+)+): ", flags=re.M)


def readable(docstring: str) -> str:
    """What stands in our docstrings and Markdown or griffe do not know.

    Sphinx's roles are code, a session is a fence, and "lr, eps: of Adam" describes two parameters.
    """

    def apart(match: re.Match[str]) -> str:
        *first, last = match[2].split(", ")
        return "".join(f"{match[1]}{name}: see `{last}`.\n" for name in first) + f"{match[1]}{last}: "

    text = TOGETHER.sub(apart, SPHINX.sub("", docstring))
    return SESSION.sub(lambda session: f"```pycon\n{session[0]}\n```", text)


class Readable(griffe.Extension):
    """Every docstring of the library, before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Every module below the package, every class and function."""
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """The package itself, which griffe does not count among its objects."""
        self.on_object(obj=pkg)
