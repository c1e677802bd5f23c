"""The embedded video model: moving emoji from a small HunyuanVideo, with the cosine of a CLIP that
sees contact sheets as its reward. It runs on a CPU and downloads nothing.

The verifier `moving_emoji`, which measures clips in closed form, is watched and never trained on.
"""

from configs import common

PRESETS = ("", "tiny")


def get_config(preset: str = ""):
  """The config.

  Args:
    preset: "" for the run of 8 minutes; "tiny" for 6 iterations with few samples, for tests.
  """
  config = common.get_config()
  config.name = "emoji_video_clip" + (f"_{preset}" if preset else "")
  config.iterations = 30
  config.model.update(family="hunyuan_video", checkpoint="assets/emoji-video")
  config.model.update(size=(32, 32), frames=9, fps=8.0, text_length=16)
  config.model.matmul_precision = "highest"  # float32 on every device
  config.data.prompts = "assets/prompts/moving_run.txt"
  config.data.held_out = "assets/prompts/moving_held_out.txt"
  # Each sample trains a random 4 of the 7 policy steps.
  config.sampler.update(kind="dance", noise_level=0.7, steps=8)
  config.rollout.update(samples_per_prompt=8, chunk=128)
  config.reward.clip.update(checkpoint="assets/emoji-video-clip", frames="sheet")
  config.reward.watch = tuple(f"moving_emoji/{part}" for part in ("vq", "mq", "ta", "direction"))
  config.optimizer.update(
    learning_rate=5e-5, warmup_steps=20, b2=0.98, updates_per_iteration=4, microbatch=64
  )
  config.objective.clip_range = 5e-3
  config.evaluation.update(
    every=10, prompts=16, samples=8, distractors="assets/prompts/moving_train.txt"
  )
  config.checkpoint.every = 10
  if preset == "tiny":
    config.iterations = 6
    config.data.prompts_per_iteration = 4
    config.rollout.update(samples_per_prompt=4, chunk=16)
    config.optimizer.update(microbatch=16, updates_per_iteration=1, warmup_steps=0)
    config.evaluation.update(every=3, prompts=4, steps=5)
    config.checkpoint.every = 3
  return config
