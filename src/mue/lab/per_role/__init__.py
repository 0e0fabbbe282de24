"""Multipliers per role, tuned on the base after its sweep: the search (search, pure), what it may turn (space), its statistics
(stats), and the command from its file to its folder (tune, report).

What a per-role table means to a plan belongs to ``mue.plan.per_role``; how its runs are trained to ``mue.lab.runners``.
"""
