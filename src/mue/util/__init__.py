"""The ground floor: what any of us needs and that knows nothing of plans, models or runs.

Here: error texts, tables as text, files (atomic writes, digests, locks), the registry, a user's object by name, a safetensors
header, a quantile. Standard library only. Not here: anything with one user (it lies beside that), and anything that needs torch.
"""
