"""HunyuanVideo on videos, by the published code's recipe [C], finetune_hunyuan_grpo.sh.

53 frames of 480x480 pixels at 8 frames a second, 32 prompts with 24 samples each, of which the 4
best and the 4 worst of a prompt are trained on, 2 optimizer steps, and 202 iterations. Sampler and
optimizer are in configs/hunyuan.py.

The published reward is VideoAlign's visual quality, which is not implemented yet. Until it is,
HPS-v2.1 stands in its place: the mean over 5 frames of each video. It judges pictures and says
nothing about motion. Its weights are a pickle, see configs/hunyuan_hps.py.

The published prompts are 50,000 lines of VidProM, whose licence is CC BY-NC 4.0 (arXiv 2403.06098).
The 400 here were written for this project, and each of them names a motion.

The recipe is for 32 devices of 80 GB or more. The samples of a prompt stay on one device, so that
choosing the best and the worst sends nothing between devices. With 64 chips, two chips compute each
sample together if mesh.tensor is 2:

    python -m dancegrpo_jax.plan --config=configs/hunyuan_videoalign.py --topology=v5p:4x4x4 \\
      --config.mesh.tensor=2

Compute, by arithmetic: a sample has 12600 image tokens and at most 256 of text, and a forward pass
of one sample takes 297 TFLOP; an iteration takes 7.2 EFLOP. Latents of an iteration are 42 GB in
float32 over all devices. What else is in memory is in configs/hunyuan.py.

Presets:
  ""    as above
  tiny  Two iterations of a random network on a CPU, with 5 frames, in a minute or two. It shows
        that everything fits together, and learns nothing.
"""

from configs import flux, hunyuan, random_networks

PRESETS = ("", "tiny")


def get_config(preset: str = ""):
  """The config; for the presets see above."""
  config = hunyuan.recipe("hunyuan_videoalign", preset)
  config.iterations = 202  # [C]
  config.model.update(frames=53, fps=8.0, size=(480, 480))  # [C]
  config.model.decode_batch = 1
  config.data.update(
    prompts="assets/prompts/video.txt",
    held_out="assets/prompts/video_held_out.txt",
    prompts_per_iteration=32,  # [C]: one for each of 32 GPUs
  )
  config.rollout.samples_per_prompt = 24  # [C]
  config.advantage.best_of = 8  # [C]
  config.optimizer.updates_per_iteration = 2  # [C]
  # One sample a device.
  config.rollout.chunk = 32
  config.optimizer.update(microbatch=32, microbatches_per_call=2)
  config.mesh.update(lanes=32, reward_rules=flux.SPLIT_REWARDS)
  config.reward.terms = (("hps", 1.0),)
  config.reward.hps.frames = "5"
  # 50 steps are what diffusers' HunyuanVideoPipeline takes. They are sampled with the time shift of
  # training, 5, and not with the 7 of the checkpoint's scheduler.
  config.evaluation.update(every=50, prompts=8, steps=50, samples=1)
  config.checkpoint.update(every=50, keep=2)  # [C] saves every 50 iterations
  if preset == "tiny":
    random_networks.shrink(config, "random:assets/random-hunyuan")
    config.model.update(frames=5, text_length=16)
    config.advantage.best_of = 2
    config.data.prompts_per_iteration = 8  # whole groups on each of up to 8 devices
    config.rollout.chunk = 32
    config.optimizer.microbatch = 8
    config.reward.hps.update(checkpoint=flux.RANDOM_CLIP, tokenizer="")
  return config
