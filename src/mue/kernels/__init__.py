"""Native kernels for CPUs, of any transformer: how the library is built, found and loaded, norms, and whole sublayers.

Here: C++ (``csrc``) and the Python that hands tensors to it. Each function computes or says None; who takes what instead is
decided by its caller. Not here: when a kernel is worth it (``mue.lab.models.ops``), and routing (``mue.moe.backends``).
"""
