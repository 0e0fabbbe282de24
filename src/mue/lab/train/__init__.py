"""One run from its plan to its result: settings and key, task, session, schedule, checkpoint, and several sessions as one program.

Here: how a step is taken, what is written of it, how a run goes on where it was interrupted. A run is a folder of files that anybody may read.
Not here: what is trained on (``mue.lab.tasks``), which processes train (``mue.lab.runners``), which runs are worth training
(``mue.lab.sweep``).
"""
