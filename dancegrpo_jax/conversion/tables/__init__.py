"""Conversion tables: which tensors of a published file are which parameters."""
