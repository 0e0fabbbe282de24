"""Ten models of others' code, on which ``mue inspect --propose`` is measured: what builds each, and what its parameters are."""
