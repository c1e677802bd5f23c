r"""FLUX.1-dev with LoRA and HPS-v2.1 as its reward, by the recipe of the published code.

The rank is 128, alpha 256, the learning rate 3e-4, and samples have 12 steps. The recipe runs on 1,
2, 4 or 8 GPUs of 80 GB each. The preset 1gpu is the same with fewer pictures in an evaluation.

Memory of every device, because the rules replicate, in GB of 10^9 bytes. It is computed from the
parameter counts and not measured:

  frozen transformer 11.90 B and T5-XXL 4.76 B parameters in bfloat16: 23.8 + 9.5       33.3
  adapters, 149.4 M parameters of 190 layers in float32                                  3.0
    weights 0.6, Adam's moments 1.2, gradients and their sum 1.2
  CLIP-L's text tower, autoencoder and HPS-v2.1's ViT-H/14 in bfloat16                   2.4
  latents of an iteration, 192 x 12 of 16x90x90 in float32, split over the devices       1.2
  activations of a microbatch of 8 rows with rematerialised blocks on one device        12
    stored inputs of blocks 7, an estimated 5 for the block that is computed

The base model has no gradient. Compiled for one H100, 1gpu takes 38.4 GiB at most (the update;
benchmarks/RESULTS.md). With unfused attention, the update of an earlier version took 56.4 GiB on
such a card. The preset v5e splits the frozen networks and the adapters over 16 TPU v5e chips of 16
GB (`plan`, benchmarks/RESULTS.md).

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
    # The projections of image tokens [C]. The single blocks, where text and image are one
    # sequence, have layers of the same names. They are adapted too, as they are by peft's targets
    # to_q, to_k, to_v and to_out.0.
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
