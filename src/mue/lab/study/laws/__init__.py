"""Learning-rate laws that others fitted, one a file, as factors on the base's rate: what a study sets beside the rules.

A law of this kind knows sizes and tokens only and gives one rate for everything, so it is used on standard parametrization. Its
constants belong to other models, tokenizers and schedules; taken as a ratio to the tuned base only its exponents are left, which is
the kinder reading. Not here: rules, which say something of every role (``mue.rules``).
"""
