"""The models that the lab trains: ordinary torch modules that say what each of their parameters is.

Here: layers, the decoder made of them, a MoE block of stacked variants, and the ways in which operators are computed (``ops``)
and join the residual stream (``residual``): no model file knows of kernels or compilers. Not here: what a model is trained on
(``mue.lab.tasks``), routers and expert compute (``mue.moe``), the kernels themselves (``mue.kernels``).
"""
