"""Ways to compute routed experts: one numerics in C++ on a CPU, in torch's grouped products on CUDA, in plain torch anywhere.

Here: one file for each way (its forward, its backward, and why it refuses), what makes an operator of such a pair, and the
native parts of routers. Not here: which way is taken (``mue.moe.experts``), and the C++ itself (``mue.kernels``).
"""
