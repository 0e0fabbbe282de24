"""Rightly wired models of many families, and the faults that are seeded into them: what ``mue.check`` is tried on."""
