"""Roles by the flow of values through one forward pass: for any torch model, without a config and without a name.

A pass is recorded as a graph (``graph``), every value is followed to the next matrix (``follow``), what a matrix or a vector is for
is read off (``matrices``, ``vectors``), and each parameter gets a verdict, sure or with a doubt.
"""
