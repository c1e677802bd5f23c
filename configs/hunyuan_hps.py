"""HunyuanVideo as a text-to-image model, one frame a sample, with HPS-v2.1 as its reward.

The published code has no such recipe: the sampler and the optimizer are those of its videos
(configs/hunyuan.py), and prompts, samples, size, the 3 optimizer steps of an iteration and the 300
iterations are those of its FLUX (configs/flux.py). A frame of 720x720 pixels is 2025 tokens, as
FLUX's image is. Compute, by arithmetic: 35 TFLOP a forward pass of one row.

`model.template` is the text around a prompt that the language model sees. `image` is what Tencent's
own code takes for one frame; `video` is what diffusers take by default.

The reward adds 2.0 GB a device, computed and not measured. Its weights are a pickle, which is read
by torch's weights_only loader, and only if it is allowed:

    hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir checkpoints/HPSv2
    python -m dancegrpo_jax.main --config=configs/hunyuan_hps.py --config.model.allow_pickle=true

Presets:
  ""    For 16 GPUs of 80 GB, or 64 TPU chips. Any number of devices that divides 64 computes the
        same.
  8gpu  The same recipe on eight GPUs of 80 GB, 4 rows a device in a microbatch.
  lora  Adapters of rank 128 and a learning rate of 3e-4, which are those of the published code's
        FLUX, on 1, 2, 4 or 8 GPUs of 80 GB. Every device holds the transformer in bfloat16, 25.6
        GB, and adapters of 157 M parameters, 3.1 GB with their moments and gradients.
  tiny  Two iterations of a random network on a CPU, in a minute or two. It shows that everything
        fits together, and learns nothing.
"""

from configs import flux, hunyuan, random_networks

PRESETS = ("", "8gpu", "lora", "tiny")


def get_config(preset: str = ""):
  """The config; for the presets see above."""
  config = hunyuan.recipe("hunyuan_hps", preset)
  config.iterations = 300
  config.model.update(frames=1, size=(720, 720), template="image")
  config.data.update(
    prompts="assets/prompts/general.txt",
    held_out="assets/prompts/general_held_out.txt",
    prompts_per_iteration=16,
  )
  config.rollout.update(samples_per_prompt=12, chunk=64)
  config.optimizer.update(updates_per_iteration=3, microbatch=192, microbatches_per_call=2)
  config.mesh.update(lanes=64, reward_rules=flux.SPLIT_REWARDS)
  config.reward.terms = (("hps", 1.0),)
  # 50 steps are what diffusers' HunyuanVideoPipeline takes.
  config.evaluation.update(every=20, prompts=8, steps=50, samples=4)
  config.checkpoint.update(every=20, keep=2)
  if preset == "8gpu":
    config.mesh.lanes = 8  # one lane a device
    config.optimizer.update(microbatch=32, microbatches_per_call=8)
  elif preset == "lora":
    config.lora.update(rank=128, alpha=256.0, targets=flux.ADAPTED)
    config.optimizer.update(learning_rate=3e-4, microbatch=8, microbatches_per_call=4)
    config.rollout.chunk = 8
    whole = ((".*", ()),)  # on every device
    config.mesh.update(data=-1, fsdp=1, lanes=8, rules=whole, reward_rules=whole)
  elif preset == "tiny":
    random_networks.shrink(config, "random:assets/random-hunyuan")
    config.model.text_length = 16
    config.reward.hps.update(checkpoint=flux.RANDOM_CLIP, tokenizer="")
  return config
