"""The embedded default: emoji Stable Diffusion, reward = emoji-CLIP cosine. 2 CPU cores, 10 minutes, no downloads."""

from configs import common


def get_config(preset: str = ""):
  """`""` the 10-minute run; `tiny` 6 iterations of few samples, for tests; `broad` all training pairs, hours of CPU or a GPU."""
  config = common.get_config()
  config.name = "emoji_clip" + (f"_{preset}" if preset else "")
  config.iterations = 60
  config.data.prompts_per_iteration = 8
  config.sampler.steps = 8
  config.rollout.update(samples_per_prompt=16, chunk=128)
  config.optimizer.update(learning_rate=2e-4, warmup_steps=40, b2=0.98, updates_per_iteration=4, microbatch=128)
  config.objective.clip_range = 1e-3
  config.evaluation.update(every=20, distractors="assets/prompts/emoji_train.txt")
  config.checkpoint.every = 20
  if preset == "tiny":
    config.iterations = 6
    config.data.prompts_per_iteration = 4
    config.rollout.update(samples_per_prompt=4, chunk=16)
    config.optimizer.update(microbatch=16, updates_per_iteration=1, warmup_steps=0)
    config.evaluation.update(every=3, prompts=4, steps=5)
    config.checkpoint.every = 3
  if preset == "broad":
    config.iterations = 2000
    config.data.prompts = "assets/prompts/emoji_train.txt"
    config.data.prompts_per_iteration = 32
    config.rollout.chunk = 512
  return config


PRESETS = ("", "tiny", "broad")
