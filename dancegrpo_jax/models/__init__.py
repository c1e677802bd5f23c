"""Linen networks, one file a network; parameter names follow the PyTorch modules that the
checkpoints come from.
"""
