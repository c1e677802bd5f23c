"""FLUX.1-dev, reward = HPS-v2.1, LoRA by the published code's recipe: rank 128, alpha 256, rate
3e-4, 12 steps. 1 to 8 GPUs.

The devices are of 80 GB each; 2 and 4 do as well. The preset 1gpu is the same with fewer pictures
in an evaluation.

Memory, computed from the parameter counts and not measured (GB of 10^9 bytes, on every device: the
rules replicate):
  transformer 11.90 B parameters and T5-XXL 4.76 B in bfloat16, frozen: 23.8 + 9.5                                      33.3
  adapters, 149.4 M parameters of 190 layers, float32: 0.6, Adam's moments 1.2, gradients and their sum 1.2              3.0
  CLIP-L's text tower, autoencoder and HPS-v2.1's ViT-H/14 in bfloat16                                                   2.4
  latents of an iteration, 192 x 12 of 16x90x90 in float32, split over the devices                                       1.2
  activations of a microbatch of 8 rows with rematerialised blocks on one device: 7 stored, 5 an
  estimate for the block 12
The base's gradient doesn't exist. Compiled for one H100, 1gpu takes 38.4 GiB at most (the update;
benchmarks/RESULTS.md). With unfused attention an earlier version's update was seen to take 56.4 GiB
on such a card. The preset v5e splits what is frozen and the adapters over 16 TPU v5e chips of 16 GB
(`plan`, benchmarks/RESULTS.md).

Weights and prompts: configs/flux.py and configs/flux_hps.py. The result is a file for diffusers'
`load_lora_weights`:

    python -m dancegrpo_jax.main --config=configs/flux_hps_lora.py --config.model.allow_pickle=true
    python -m dancegrpo_jax.convert export --config=configs/flux_hps_lora.py
    --checkpoint=runs/flux_hps_lora --out=lora
"""

from configs import flux, flux_hps

PRESETS = ("", "1gpu", "v5e", "tiny")


def get_config(preset: str = ""):
  """Presets: "1gpu" and "v5e" as above, "tiny" as in configs/flux.py."""
  config = flux_hps.get_config("tiny" if preset == "tiny" else "")
  config.name = "flux_hps_lora" + (f"_{preset}" if preset else "")
  config.lora.update(
    rank=128,  # [C]
    alpha=256.0,  # [C]
    # The image stream's projections [C]. The single blocks, which hold both streams, have layers of
    # the same names: with peft's targets to_q, to_k, to_v and to_out.0 they are adapted too.
    targets=r"(single_)?transformer_blocks.*/attn/to_(q|k|v|out_0)/kernel",
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
