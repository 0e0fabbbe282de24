"""The lab: a real trainer at small scale, with which claims are measured. It is an extra; the core knows nothing of it.

In the order in which data flows, each folder importing only those before it: ``data`` (text to batches), ``models``, ``train`` (one run),
``tasks`` (what it trains on), ``runners`` (many runs at once), ``report`` (pages and pictures), ``trained`` (what a
trained model is good for), ``sweep`` (a base's best values), ``per_role``
(each role's own), ``demo``. ``valley`` finds from numbers alone where a loss is lowest; ``doctor`` looks at the machine. Not here: what a
rule, a plan or a router is.
"""
