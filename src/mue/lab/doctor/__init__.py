"""What this machine offers to MoE layers: which backends are active, why others are not, how fast each is (``mue doctor``).

Here: the report, and the timing of expert compute that benchmarks/moe_layer.py shares. Not here: choosing a runner for a sweep
(``mue.lab.runners.calibrate``), and building the kernel (``mue.kernels.build``).
"""
