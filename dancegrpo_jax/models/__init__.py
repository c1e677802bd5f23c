"""The networks, as linen modules.

The names of their parameters follow the PyTorch modules that the checkpoints come from.
"""
