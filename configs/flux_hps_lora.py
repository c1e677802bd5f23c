r"""FLUX.1-dev with LoRA, reward = HPS-v2.1, by the published code's recipe.

Rank 128, alpha 256, learning rate 3e-4 and 12 steps, on 1, 2, 4 or 8 GPUs of 80 GB. The preset 1gpu
is the same with fewer pictures and steps in an evaluation.

Memory, computed from the numbers of parameters and not measured, in GB of 10^9 bytes. The rules
replicate, so that every device holds all of this:
  33.3  transformer of 11.90 B parameters and T5-XXL of 4.76 B in bfloat16, frozen: 23.8 + 9.5
   3.0  adapters of 190 layers, 149.4 M parameters in float32: 0.6, Adam's moments 1.2, gradients
        and their sum 1.2
   1.8  adapters and moments before the iteration, kept while it has several optimizer steps
   2.4  CLIP-L's text tower, autoencoder and HPS-v2.1's ViT-H/14 in bfloat16
   1.2  latents of an iteration, 192 x 12 of 16x90x90 in float32; split over the devices
    12  activations of a microbatch of 8 rows with rematerialised blocks, on one device: 7 are
        stored, 5 is an estimate for the block at work
The base model has no gradient. Compiled for one H100, 1gpu takes 38.4 GiB at most (the update;
benchmarks/RESULTS.md). With unfused attention an earlier version's update took 56.4 GiB
on such a card. The preset v5e splits what is frozen and the adapters over 16 TPU v5e chips of 16 GB
(`plan`, benchmarks/RESULTS.md).

For weights and prompts see configs/flux.py and configs/flux_hps.py. The second command writes a
file for diffusers' `load_lora_weights`:

    python -m dancegrpo_jax.main --config=configs/flux_hps_lora.py --config.model.allow_pickle=true
    python -m dancegrpo_jax.convert export --config=configs/flux_hps_lora.py \
      --checkpoint=runs/flux_hps_lora --out=lora
"""

from configs import flux, flux_hps

PRESETS = ("", "1gpu", "v5e", "tiny")


def get_config(preset: str = ""):
  """The config; `preset` is "", "1gpu" or "v5e" (see above), or "tiny" (see configs/flux.py)."""
  config = flux_hps.get_config("tiny" if preset == "tiny" else "")
  config.name = "flux_hps_lora" + (f"_{preset}" if preset else "")
  config.lora.update(
    rank=128,  # [C]
    alpha=256.0,  # [C]
    targets=flux.ADAPTED,
  )
  config.optimizer.learning_rate = 3e-4  # [C]
  if preset == "tiny":
    config.lora.update(rank=4, alpha=8.0)
  else:
    config.sampler.steps = 12  # [C]; 6 of 11 stochastic steps are trained
    config.optimizer.updates_per_iteration = 2  # [C]
    config.rollout.chunk = 8
    config.optimizer.update(microbatch=8, microbatches_per_call=4)
    config.mesh.update(data=-1, fsdp=1, lanes=8, rules=((".*", ()),), reward_rules=((".*", ()),))
  if preset == "1gpu":
    config.evaluation.update(prompts=4, steps=20)  # so that one call samples them in half a minute
  elif preset == "v5e":
    config.rollout.chunk = 16
    config.optimizer.update(microbatch=16, microbatches_per_call=8)
    config.evaluation.steps = 20  # a call of the sampler then takes 26 s by plan
    rules = (("lora/.*", ("...", "fsdp", None)), *flux.SPLIT)
    config.mesh.update(data=1, fsdp=-1, lanes=16, rules=rules, reward_rules=flux.SPLIT_REWARDS)
    config.checkpoint.every = 3  # by plan.py an iteration takes 7 minutes
  return config
