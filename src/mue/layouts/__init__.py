"""Parameter layouts of model families, observed rather than listed: see :mod:`mue.layouts.observe.describe`."""
