"""Stock diffusion transformers of the ``diffusers`` library, observed as the families of ``transformers`` are.

A model is built again at a tiny size from the keywords of its class, and watched on a few random images.
"""
