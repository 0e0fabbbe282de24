"""The samplers of ``[sweep] sampler``, each a file of its own that registers itself in ``mue.lab.sweep.sampler.SAMPLERS``.

A sampler proposes points from trials and is pure; claiming, training and counting them is the worker's affair. What one of
them computes, beyond turning trials into its words and back, lies elsewhere (the valley search in ``mue.lab.valley``).
"""
