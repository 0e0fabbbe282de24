"""A plan in another training stack's own words: :func:`export` returns the text of a file.

Here: one file for each stack, with the names of its parameters and what writes its settings; what they share (rows, the frame of
a Python file, a stack's model without the stack). Not here: what a plan means for a tensor (``mue.model``).
"""

from mue.export.registry import STACKS, export
from mue.export.rows import ExportRow, rows

__all__ = ["STACKS", "ExportRow", "export", "rows"]
