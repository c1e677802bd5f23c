"""GRPO post-training for image and video generators in JAX: DanceGRPO (arXiv 2505.07818)."""

__version__ = "0.1.0"
