"""What models are trained on: one task, one file, registered by the name that ``[run] task`` says.

Here: which model a task builds, what it reads, its loss and what guessing costs (``mue.lab.train.task`` has the seam). ``language`` is
what the lab is for; ``order`` is a tiny one to start from.
Not here: models (``mue.lab.models``), text on disk (``mue.lab.data``), and how a step is taken (``mue.lab.train``).
"""
