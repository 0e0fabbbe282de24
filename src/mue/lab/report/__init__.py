"""What people see of runs: one HTML page with its pictures (page, plots), tables and progress in the terminal.

Sections and figures that any report may have. What only a sweep, a per-role search or the demo has to show lies with those,
and nothing here decides or measures anything.
"""
