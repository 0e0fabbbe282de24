"""The one sweep of a base, shared by any number of workers on any number of machines.

What is asked for (spec, sampler, samplers), where its state lives (state: the folder, the storage, the trials in it), who
works on it (worker, heartbeat), what came of it (result, tuned, report) and what is seen of it as it goes (listener, display,
metric_sinks). How a run is trained belongs to ``mue.lab.runners``, what losses say of a valley to ``mue.lab.valley``.
"""
