"""The recipe: GRPO on this folder's model, reward = share of the picture in the named colour."""

from configs import common

PRESETS = ("", "tiny", "lora")
# The layers that the preset `lora` adapts: both MLPs of every block.
TARGETS = r".*_mlp/fc(1|2)/kernel"


def get_config(preset: str = ""):
  """`""` all weights; `lora` adapters alone; `tiny` 4 iterations of few samples, for tests."""
  config = common.get_config()
  config.name = "own_family" + (f"_{preset}" if preset else "")
  config.iterations = 20
  config.model.update(
    family="own_family.family:FAMILY",
    checkpoint="examples/own_family/checkpoint",
    size=(16, 16),
    matmul_precision="highest",  # float32 on every device
  )
  config.data.update(
    prompts="examples/own_family/prompts.txt",
    held_out="examples/own_family/held_out.txt",
    prompts_per_iteration=12,
  )
  config.sampler.update(kind="dance", noise_level=0.7, steps=8)
  config.rollout.update(samples_per_prompt=16, chunk=192)
  config.reward.terms = (("own_family.reward:share_of_named_colour", 1.0),)
  config.objective.clip_range = 5e-3
  config.optimizer.update(learning_rate=5e-5, b2=0.98, updates_per_iteration=2, microbatch=96)
  # Where there are several devices along fsdp, they share the first layer of every MLP.
  config.mesh.rules = ((r"denoiser/.*_mlp/fc1/kernel", (None, "fsdp")), (".*", ()))
  config.evaluation.update(every=10, prompts=6, steps=10, samples=8)
  if preset == "lora":
    config.lora.update(rank=4, alpha=8.0, targets=TARGETS)
    config.optimizer.learning_rate = 4e-4
  if preset == "tiny":
    config.iterations = 4
    config.data.prompts_per_iteration = 4
    config.rollout.update(samples_per_prompt=4, chunk=16)
    config.optimizer.update(microbatch=16, updates_per_iteration=1)
    config.evaluation.update(every=2, prompts=4, steps=4, samples=2)
    config.checkpoint.every = 2
  return config
