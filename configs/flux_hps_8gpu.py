"""FLUX.1-dev, reward = HPS-v2.1, the published code's recipe for 8 GPUs of 80 GB: 2 optimizer
steps, gradient clip 0.01, EMA.

What differs from flux_hps.py:8gpu stands below; weights and commands are the same. The average is
one more copy of the transformer, 47.6 GB over all devices (computed, as in configs/flux.py): about
37 GB a device for weights and optimizer, 12 for activations, 2 for the reward. The presets "" and
"8gpu" are the same here.

    python -m dancegrpo_jax.main --config=configs/flux_hps_8gpu.py --config.model.allow_pickle=true
"""

from configs import flux, flux_hps

PRESETS = flux.PRESETS


def get_config(preset: str = ""):
  """Presets: see configs/flux.py."""
  config = flux_hps.get_config(preset or "8gpu")
  # Not the file's name, which is that of flux_hps.py:8gpu; "" and "8gpu" are one run.
  config.name = "flux_hps_8gpu_ema" + ("_tiny" if preset == "tiny" else "")
  config.optimizer.max_grad_norm = 0.01  # [C]
  config.ema.decay = 0.995  # [C]; used for evaluation, samples and export
  if preset != "tiny":
    config.optimizer.updates_per_iteration = 2  # [C]
  return config
