"""Numbers in, numbers out: from tuned values, two shapes and a rule to the values of every role; no torch.

Here: the transfer itself (``transfer`` is the page to start with), what a plan holds, its fold, its file and TOML form, and how
it is printed, explained and compared. Not here: the rules' tables (``mue.rules``), models (``mue.model``), and the class that
users hold, which reaches up to those (``mue.api.Plan``).
"""
