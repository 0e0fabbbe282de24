"""The lab: a real trainer at small scale (models, data, training, sweeps, reports)."""
