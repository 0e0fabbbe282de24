"""The lab: a real trainer at small scale, with which claims are measured. It is an extra; the core knows nothing of it.

In the order in which data flows, each folder importing those before it: ``data`` (text to batches), ``models``, ``train`` (one run),
``tasks`` (what it trains on), ``runners`` (many runs at once), ``valley`` (where a loss is lowest), ``report``, ``sweep``, ``per_role``,
``demo``; ``doctor`` looks at the machine. Not here: what a rule, a plan or a router is.
"""
