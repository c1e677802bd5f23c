"""Test setup: 8 forced CPU devices, no silent rank promotion, key reuse is an error, shapes are checked."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
install_import_hook("dancegrpo_jax", "beartype.beartype")
