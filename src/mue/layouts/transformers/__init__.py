"""Models of the library ``transformers``: their configs, families, checkpoints on disk, shapes and routers.

Here: what only that library has; one file for each family that needs more than observation (``families``). Needs the ``hf``
extra once something is read or built. Not here: anything that is known by running a model (``mue.layouts.observe``).
"""
