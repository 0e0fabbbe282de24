"""Laws that other teams fitted to sweeps, one a file: a learning rate or a batch as a power of sizes and tokens.

A law gives one number for a whole model under standard parametrization, and holds for models like those it was fitted to: outside that
range it refuses. ``mue rules`` prints them beside the rules as what another team would set; a study takes one as a ratio of target to
base. Not here: rules, which say how every role's values move (``mue.rules``).
"""
