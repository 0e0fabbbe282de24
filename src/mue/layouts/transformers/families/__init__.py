"""Families of ``transformers`` that need more than observation: one file each, named by its ``model_type``.

Not here: words that several families share (``mue.layouts.observe.names``), and anything that observation settles.
"""
