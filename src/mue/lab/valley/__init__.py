"""The loss over log2(lr): fit its valley (fit), say how sure that is, ask for the run that tells most (search), give up hopeless runs.

Pure functions of losses, in numpy: nothing here trains, reads a file or knows of a sweep's storage. Who asks, and where the
trials are kept, belongs to ``mue.lab.sweep``; pictures of valleys to ``mue.lab.report``.
"""

from mue.lab.valley.fit import Valley, fit_valley
from mue.lab.valley.window import LossPoint

__all__ = ["LossPoint", "Valley", "fit_valley"]
