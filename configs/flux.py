"""What the flux_*.py files share: DanceGRPO's recipe for FLUX.1-dev and its presets.

Presets:
  ""    The published code's recipe [C] for 16 GPUs: 720x720 pixels, the dance SDE at level 0.3 in
        16 steps, time shift 3, embedded guidance 3.5, 16 prompts with 12 samples each, a random
        60 % of the 15 stochastic steps (9), and 3 optimizer steps. Any number of devices that
        divides 64 computes the same; the memory that each then needs is below. 64 TPU chips take
        three rows of a microbatch each; benchmarks/RESULTS.md says how that fits.
  8gpu  The same recipe on eight GPUs of 80 GB: 8 samples a device in a chunk, 4 rows in a
        microbatch.
  tiny  Two iterations of a random network on a CPU, in a minute or two. It shows that everything
        fits together, and learns nothing.

Memory, computed from the numbers of parameters and not measured, in GB of 10^9 bytes. All devices
together hold this, split over mesh.fsdp:
  238.0  transformer of 11.90 B parameters in float32: weights 47.6, Adam's moments 95.2, gradients
         and their sum 95.2
    9.5  T5-XXL, 4.76 B parameters in bfloat16
    1.6  latents of an iteration: 192 x 16 of 16x90x90 in float32
CLIP-L and the reward's network, see each file, are split too. Every device holds the autoencoder as
a whole, 0.2 for 83.8 M parameters in bfloat16, and activations. With rematerialised blocks these
are 0.9 for the stored inputs of the 57 blocks, and as an estimate 2 for the block at work, for each
of a device's rows of a microbatch. On 16 devices with 12 rows that is 16 + 35 a device; with 8gpu
and 4 rows, 31 + 12. While an iteration has several optimizer steps the state before it is kept as
well, another 143 over all devices. Compiled for eight H100, before that state was kept, 8gpu took
34.0 GiB at most (the update; benchmarks/RESULTS.md). On one device of 80 GB the recipe does not
fit, and a run says so before it reads any weights: use LoRA.

Compute: about 37 TFLOP a forward pass of one row (2025 image and 512 text tokens), so 0.4 EFLOP an
iteration, with the rematerialised forward and the recomputed old log-probs.

Weights: black-forest-labs/FLUX.1-dev of the Hugging Face hub, 34 GB. Accept the licence on its page
and run `hf auth login` once; then they are fetched unless they are cached. FLUX.1-schnell works
too, with --config.model.checkpoint=black-forest-labs/FLUX.1-schnell and
--config.model.text_length=256; it has no guidance input.

Prompts: 400 of this project. The paper's are those of HPDv2: run `python -m
dancegrpo_jax.data.hpdv2_prompts`, then use --config.data.prompts=tfds:hpdv2_prompts.
"""

from ml_collections import ConfigDict

from configs import common, random_networks

PRESETS = ("", "8gpu", "tiny")
RANDOM_CLIP = "random:assets/random-clip"  # the network of the rewards of `tiny`
# Kernels `[.., in, out]` are split along `in`. A TPU stores the last axis in lanes of 128, and
# gathers narrower pieces (3072 over 64 chips are 48) as a sum with zeros, which is twice the bytes.
# With this split v5e and v6e gather; v5p still sums (libtpu 0.0.42.1, 64 chips). The scales of
# norms and the layers at the ends of the network are small, so they are not split.
SPLIT = (
  ("denoiser/(single_)?transformer_blocks/.*/kernel", ("...", "fsdp", None)),
  ("denoiser/(single_)?transformer_blocks/.*/bias", ("...", "fsdp")),
  ("denoiser/(context_embedder|norm_out|time_text_embed)/.*kernel", ("fsdp", None)),
  ("text_encoder_2/encoder/block/.*/kernel", ("...", "fsdp", None)),
  ("text_encoder_2/shared/embedding", (None, "fsdp")),
  ("text_encoder/encoder/.*/kernel", ("...", "fsdp", None)),
  (".*", ()),
)
# What LoRA adapts: the projections of image tokens [C]. The single blocks, where text and image are
# one sequence, have layers of the same names. They are adapted too, as they are by peft's targets
# to_q, to_k, to_v and to_out.0.
ADAPTED = r"(single_)?transformer_blocks.*/attn/to_(q|k|v|out_0)/kernel"
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
    family="flux",
    checkpoint="black-forest-labs/FLUX.1-dev",
    size=(720, 720),  # latents 16x90x90, 2025 tokens
    dtype="bfloat16",
    frozen_dtype="bfloat16",
    remat=True,
    scan_blocks=True,
    text_length=512,
  )
  config.data.update(
    prompts="assets/prompts/general.txt",
    held_out="assets/prompts/general_held_out.txt",
    prompts_per_iteration=16,
  )
  config.sampler.update(
    kind="dance",
    noise_level=0.3,
    steps=16,
    shift=3.0,  # constant; 0 would be the checkpoint's, which grows with the resolution
    guidance_scale=1.0,  # one forward pass a step, because the model is guidance-distilled
    embedded_guidance=3.5,
    last_step="ode",  # 15 of 16 steps are stochastic
  )
  config.rollout.update(samples_per_prompt=12, shared_noise=True, chunk=64)
  config.objective.update(clip_range=1e-4, timesteps="random", timestep_fraction=0.6)  # 9 of 15
  config.optimizer.update(
    learning_rate=1e-5,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=1e-4,
    max_grad_norm=1.0,
    updates_per_iteration=3,
    microbatch=192,
    microbatches_per_call=2,  # 5 s on 64 TPU v5p chips, by plan
  )
  config.advantage.clamp = 5.0
  config.mesh.update(data=1, fsdp=-1, lanes=64, rules=SPLIT, reward_rules=SPLIT_REWARDS)
  # 28 steps are what diffusers' FluxPipeline takes.
  config.evaluation.update(every=20, prompts=8, steps=28, samples=4)
  config.checkpoint.update(every=20, keep=2)
  if preset == "8gpu":
    config.mesh.lanes = 8  # one lane a device
    config.optimizer.update(microbatch=32, microbatches_per_call=8)
  elif preset == "tiny":
    random_networks.shrink(config, "random:assets/random-flux")
    config.model.text_length = 16
  return config
