"""Routers: which token goes to which experts, with which weights. One file each, found by name.

Here: what a router is given and promises (``base``), the routers, and the draws of those that draw. Not here: what numbers
and checks need to know of one (``mue.shapes.routers``), the losses that balance, and what is done with a routing.
"""
