"""What the sd_*.py files share: DanceGRPO's recipe for Stable Diffusion v1.4 and its presets.

Presets:
  ""     The published code's recipe [C]: 512x512 pixels, DDIM with eta 1 in 50 steps, guidance 5,
         32 prompts with 16 samples each, all 49 stochastic steps, and 2 optimizer steps. It is for
         8 devices of 80 GB; any number that divides 8 works.
  1gpu   The same numbers on one GPU of 80 GB, in smaller chunks and microbatches: the same result,
         more slowly.
  v5e    The same numbers on 8 TPU v5e chips of 16 GB, or 8 larger ones. Parameters and optimizer
         are split over them, chunks and microbatches are smaller. Compiled for them, sd_hps takes
         11.8 GiB at most of a v5e and 12.6 of a v6e, before the state of the iteration's start was
         kept, which is 1.3 more. Nothing was run.
  paper  What the paper asks for where guidance is trained [P, section 3.3]: 1 optimizer step, and a
         random 60 % of the steps.
  tiny   Two iterations of a random network on a CPU, in a minute. It shows that everything fits
         together, and learns nothing.

Memory, computed from the numbers of parameters and not measured, in GB of 10^9 bytes. The rules
replicate, so that every device holds all of this:
  17.2  UNet of 859.5 M parameters in float32: weights 3.4, Adam's moments 6.9, gradients and their
        sum over microbatches 6.9
  10.3  the state before the iteration, which is kept while it has several optimizer steps
   0.4  text encoder, 123.1 M parameters in bfloat16, and autoencoder, 83.7 M
   1.7  latents of an iteration, 512 x 50 of 4x64x64 in float32; these are split over the devices
The reward's network is in each file. What is left of 80 GB is for activations. Compiled for one
H100, before that state was kept, sd_hps.py:1gpu took 25.4 GiB at most (the update, with
rematerialised blocks and fused attention, 32 rows with guidance; benchmarks/RESULTS.md). Nothing
was run. `optimizer.microbatch` and `rollout.chunk` change nothing but speed, memory and round-off.

Compute, as `plan` counts it: 0.80 TFLOP for a forward pass of one row, and 204 PFLOP an iteration,
without the rematerialised forward.

Weights: CompVis/stable-diffusion-v1-4 of the Hugging Face hub, 4.2 GB, which are fetched unless
they are cached. v1.5 and v2.1 work too, with --config.model.checkpoint=DIR_OR_ID (and for v2.1
--config.model.size="(768, 768)").

Prompts: 400 of this project. The paper's are those of HPDv2: run `python -m
dancegrpo_jax.data.hpdv2_prompts`, then use --config.data.prompts=tfds:hpdv2_prompts.
"""

from ml_collections import ConfigDict

from configs import common, random_networks

PRESETS = ("", "1gpu", "v5e", "paper", "tiny")
RANDOM_CLIP = "random:assets/random-clip"  # the network of the rewards of `tiny`
# Kernels `[.., in, out]` are split along `in`, see configs/flux.py. The rest (the layers at the
# ends, norms, biases and the autoencoder) is small, so it is not split.
SPLIT = (
  ("denoiser/(down_blocks|mid_block|up_blocks|time_embedding).*/kernel", ("...", "fsdp", None)),
  ("text_encoder/encoder/.*/kernel", ("...", "fsdp", None)),
  (".*", ()),
)
SPLIT_REWARDS = ((".*/encoder/.*/kernel", ("...", "fsdp", None)), (".*", ()))


def recipe(name: str, preset: str) -> ConfigDict:
  """The config of a run, without its reward.

  Args:
    name: the name of the run's file.
    preset: one of `PRESETS`.
  """
  config = common.get_config()
  config.name = name + (f"_{preset}" if preset else "")
  config.iterations = 300
  config.model.update(
    checkpoint="CompVis/stable-diffusion-v1-4",
    size=(512, 512),
    dtype="bfloat16",
    frozen_dtype="bfloat16",
    remat=True,
    scan_blocks=True,  # the text encoder and the reward
  )
  config.data.update(
    prompts="assets/prompts/general.txt",
    held_out="assets/prompts/general_held_out.txt",
    prompts_per_iteration=32,
  )
  config.sampler.update(
    kind="ddim",
    noise_level=1.0,
    steps=50,
    guidance_scale=5.0,
    # All 49 stochastic steps are trained, as in [C], which decodes a noisy last sample (std .02)
    # instead.
    last_step="ode",
  )
  config.rollout.update(samples_per_prompt=16, shared_noise=True, chunk=128)
  config.objective.update(clip_range=1e-4, timesteps="all")
  config.optimizer.update(
    learning_rate=1e-5,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=1e-4,
    updates_per_iteration=2,
    microbatch=128,
    microbatches_per_call=24,
  )
  config.advantage.clamp = 5.0
  config.evaluation.update(every=20, prompts=8, steps=50, samples=4)
  config.checkpoint.update(every=20, keep=2)
  if preset == "1gpu":
    config.rollout.chunk = 16
    config.optimizer.microbatch = 16
  elif preset == "v5e":
    config.rollout.chunk = 16
    config.optimizer.update(microbatch=16, microbatches_per_call=32)
    config.mesh.update(data=1, fsdp=-1, lanes=8, rules=SPLIT, reward_rules=SPLIT_REWARDS)
    # By plan an iteration takes 8 minutes on v6e and 23 on v5e. A state is 10.3 GB.
    config.checkpoint.every = 1
  elif preset == "paper":
    config.optimizer.updates_per_iteration = 1
    config.objective.update(timesteps="random", timestep_fraction=0.6)
  elif preset == "tiny":
    random_networks.shrink(config, "random:assets/random-sd")
    config.optimizer.microbatch = 48
  return config
