"""Sweeps and laws that others published, beside what our rules predict for them.

Here: one file for each source (``steplaw``, ``marin``) that turns what its owner publishes into the same cells, what laws and
rules say of a change (``laws``), and the statistics. Not here: any data of others. ``python benchmarks/public_runs.py`` is the command.
"""
