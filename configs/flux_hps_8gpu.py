"""FLUX.1-dev with HPS-v2.1 as its reward, by the published code's recipe for 8 GPUs of 80 GB.

It differs from flux_hps.py:8gpu by 2 optimizer steps, a gradient clip of 0.01 and an average of the
weights (EMA), see below. Weights and commands are the same. The average is one more copy of the
transformer, 47.6 GB over all devices (computed, as in configs/flux.py). A device then has about 37
GB of weights and optimizer state, 12 of activations and 2 of the reward. The presets "" and "8gpu"
are the same here.

    python -m dancegrpo_jax.main --config=configs/flux_hps_8gpu.py --config.model.allow_pickle=true
"""

from configs import flux, flux_hps

PRESETS = flux.PRESETS


def get_config(preset: str = ""):
  """The config; for the presets see configs/flux.py."""
  config = flux_hps.get_config(preset or "8gpu")
  # The name of the file is that of the run flux_hps.py:8gpu, so this run has another. The presets
  # "" and "8gpu" are the same run.
  config.name = "flux_hps_8gpu_ema" + ("_tiny" if preset == "tiny" else "")
  config.optimizer.max_grad_norm = 0.01  # [C]
  config.ema.decay = 0.995  # [C]; used for evaluation, samples and export
  if preset != "tiny":
    config.optimizer.updates_per_iteration = 2  # [C]
  return config
