"""Which parameter of a torch model is what: its role, the meaning of its axes, its fan-in.

Here: the table a model declares, or, for models of ``transformers``, the one that is observed (``observe`` knows models by running
them, ``transformers`` the library's configs and checkpoints, ``of_model`` asks whichever holds); what ``mue inspect`` shows.
Not here: what a plan says of a parameter (``mue.model``), and roles themselves (``mue.rules.roles``).
"""
