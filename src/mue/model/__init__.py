"""A plan on your torch model: whether it is the planned one, what each tensor gets, and the init and groups made of that.

Here: the match of shapes and multipliers, one plan per tensor (its own fan-in, its fold), init, optimizer groups, clipping that
knows of the fold. Not here: which parameter is what (``mue.layouts``), runs and checkpoints in another form (``mue.convert``),
other stacks' files (``mue.export``), and whether training goes as planned (``mue.checks``).
"""
