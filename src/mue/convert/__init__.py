"""A run or a checkpoint from one form of its plan to the other: forward multipliers, or folded into the weights.

Here: what becomes of each tensor, of optimizer state and of schedulers, in memory (``live``) and on disk. Not here: the
coefficient of every tensor (``mue.model.coefficients``), and what a fold is (``mue.plan.fold``).
"""
