"""The checks of :func:`mue.check`, one file each: what it looks at, what it finds, and the line that mends it.

Not here: what several of them share (``mue.checks``).
"""
