"""Three decoders as people write their own, each right or wrong in ways that a tired one would make it."""
