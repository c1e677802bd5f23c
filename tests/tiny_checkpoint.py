"""Checkpoint folders as small as the networks allow, with random weights: what the tests of whole runs load.

`write_models` makes a Stable Diffusion folder in diffusers' layout (32x32 pixels, 8x8 latents) and a CLIP folder in transformers'
layout. Every tensor is drawn, those that training starts at zero or one too: a network whose last layer is zero would
hide whatever comes before it.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dancegrpo_jax import pretrain
from dancegrpo_jax.convert.shapes import abstract_params
from dancegrpo_jax.data import tokenizer
from dancegrpo_jax.runtime import config as configs
from dancegrpo_jax.runtime import weights

ROOT = Path(__file__).parent.parent
PROMPTS = tuple(f"a {colour} {thing}" for thing in ("cat", "apple", "boat", "house") for colour in ("red", "blue"))
SIZE, TOKENS = 32, 8  # pixels; length of a tokenised prompt

TOWER = {
  "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "layer_norm_eps": 1e-5,
  "hidden_act": "quick_gelu",
}  # fmt: skip
UNET = {
  "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32),
  "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
  "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 2, "norm_num_groups": 8, "norm_eps": 1e-5,
  "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "sample_size": 8,
}  # fmt: skip
VAE = {
  "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "down_block_types": ("DownEncoderBlock2D",) * 3,
  "up_block_types": ("UpDecoderBlock2D",) * 3, "block_out_channels": (8, 8, 8), "layers_per_block": 1, "latent_channels": 4,
  "norm_num_groups": 4, "act_fn": "silu", "sample_size": SIZE, "scaling_factor": 0.5,
}  # fmt: skip
SCHEDULER = {
  "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
  "beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False,
  "prediction_type": "epsilon", "timestep_spacing": "leading",
}  # fmt: skip


class Folders(NamedTuple):
  """Where the tiny models lie: a diffusers folder, a CLIPModel folder, and a prompts file with the 8 of `PROMPTS`."""

  model: Path
  clip: Path
  prompts: Path


def draw(abstract, seed: int):
  """Random values for every tensor of a tree, of a size that keeps activations near 1."""
  rng, values = np.random.default_rng(seed), {}
  for path, leaf in sorted(flatten_dict(abstract, sep="/").items()):
    noise = rng.standard_normal(leaf.shape)
    if path.endswith("kernel"):
      noise = noise / np.sqrt(np.prod(leaf.shape[:-1]))
    elif path.endswith("scale"):
      noise = 1.0 + 0.1 * noise
    else:
      noise = (0.5 if path.endswith("embedding") else 0.1) * noise
    values[path] = jnp.asarray(noise, jnp.float32)
  return unflatten_dict(values, sep="/")


def write_network(folder: Path, config_json: dict, seed: int) -> None:
  """One network's folder: config.json and safetensors, float32."""
  name = config_json.get("_class_name") or config_json["architectures"][0]
  weights.save(folder, name, draw(abstract_params(config_json), seed), config_json)


def write_models(root: Path) -> Folders:
  """Writes both folders and the prompts file under `root`."""
  model, clip, prompts = folders = Folders(root / "tiny-sd", root / "tiny-clip", root / "prompts.txt")
  for folder in (model / "tokenizer", clip):
    tokenizer.write_tokenizer(list(PROMPTS), str(folder), length=TOKENS, size=560)
  text = {**TOWER, "max_position_embeddings": TOKENS, **pretrain.token_ids(model / "tokenizer")}
  write_network(model / "unet", UNET, seed=1)
  write_network(model / "vae", VAE, seed=2)
  write_network(model / "text_encoder", {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **text}, seed=3)
  pretrain.write_json(model / "scheduler" / "scheduler_config.json", SCHEDULER)
  pretrain.write_json(model / "model_index.json", pretrain.model_index())
  vision = {**TOWER, "image_size": SIZE, "patch_size": 8, "num_channels": 3}
  both = {"text_config": {**text, "projection_dim": 12}, "vision_config": {**vision, "projection_dim": 12}}
  write_network(clip, {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 12, **both}, seed=4)
  pretrain.write_json(clip / "preprocessor_config.json", pretrain.clip_preprocessor(SIZE))
  prompts.write_text("\n".join(PROMPTS) + "\n")
  return folders


def tiny_config(folders: Folders, **changes):
  """configs/emoji_clip.py:tiny on the tiny models, a quarter of its steps, with `changes` by dotted key (`__` for the dot)."""
  config = configs.load(str(ROOT / "configs" / "emoji_clip.py") + ":tiny")
  values = {
    "model.checkpoint": str(folders.model), "reward.clip.checkpoint": str(folders.clip), "data.prompts": str(folders.prompts),
    "data.prompts_per_iteration": 4, "rollout.samples_per_prompt": 4, "rollout.chunk": 16, "sampler.steps": 4,
    "evaluation.steps": 2, "evaluation.prompts": 2, "optimizer.microbatch": 16, "optimizer.updates_per_iteration": 1,
    "optimizer.warmup_steps": 0, "objective.timesteps": "all", "logging.tensorboard": False,
  }  # fmt: skip
  values |= {key.replace("__", "."): value for key, value in changes.items()}
  with config.unlocked():
    for key, value in values.items():
      section, _, field = key.rpartition(".")
      target = config
      for part in filter(None, section.split(".")):
        target = target[part]
      assert field in target, key
      target[field] = value
  return config.lock()


def assert_trees_equal(actual, expected) -> None:
  """Same structure, and the same bits everywhere."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))


def relative_error(actual, expected) -> float:
  """max |a - b| / max |b| over all leaves of two trees together."""
  pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(*map(jax.tree.leaves, (actual, expected)))]
  return max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(b).max() for _, b in pairs)
