"""The methods, one file each: a function from a lens, or from tensors, to a small frozen result.

The methods themselves are `attnlens.rollout`, `sinks`, `profile`, `head_types` and `ablate`; their
results and settings are imported from the files here.
"""
