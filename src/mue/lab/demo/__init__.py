"""``mue demo``: the whole way on real text in minutes, from ``demo.toml`` to a report. It calls the lab and the plan as anyone
could, and holds no method of its own: whatever is of use elsewhere lies below.
"""
