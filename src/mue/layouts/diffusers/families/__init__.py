"""Classes of ``diffusers`` that need more than observation: one file each, under the class's name.

Not here: words that several classes share (``mue.layouts.observe.names``), keywords of a forward (``mue.layouts.diffusers.inputs``).
"""
