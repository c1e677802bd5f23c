"""Models for tests of whole programs.

`write_models` makes the smallest folders that the networks allow: a Stable Diffusion folder in
diffusers' layout (32x32 pixels, 8x8 latents) and a CLIP folder in transformers' layout. Every
tensor is random, also those that training starts at zero or one: a last layer of zeros would hide
whatever comes before it. `toy_programs` has the programs of a run with a network of a few lines,
which compiles quickly.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dancegrpo_jax import programs
from dancegrpo_jax.assembly import loading
from dancegrpo_jax.assembly.encoding import as_examples
from dancegrpo_jax.checkpoints import weights
from dancegrpo_jax.checkpoints.networks import abstract_params
from dancegrpo_jax.data import llama_tokenizer, t5_tokenizer, tokenizer
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.diffusion import schedules
from dancegrpo_jax.pipelines import templates
from dancegrpo_jax.pipelines.base import Pipeline
from dancegrpo_jax.pretrain import stages
from dancegrpo_jax.programs import update_calls
from dancegrpo_jax.rl.state import init_state
from dancegrpo_jax.settings import config_file
from dancegrpo_jax.types import Conditioning, Media

ROOT = Path(__file__).parent.parent
PROMPTS = tuple(
  f"a {colour} {thing}" for thing in ("cat", "apple", "boat", "house") for colour in ("red", "blue")
)
SIZE, TOKENS = 32, 8  # pixels; length of a tokenised prompt

TOWER = {
  "hidden_size": 16,
  "intermediate_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "layer_norm_eps": 1e-5,
  "hidden_act": "quick_gelu",
}
UNET = {
  "_class_name": "UNet2DConditionModel",
  "in_channels": 4,
  "out_channels": 4,
  "block_out_channels": (16, 32),
  # attention only in the middle, which is quick to compile
  "down_block_types": ("DownBlock2D",) * 2,
  "up_block_types": ("UpBlock2D",) * 2,
  "layers_per_block": 1,
  "cross_attention_dim": 16,
  "attention_head_dim": 2,
  "norm_num_groups": 8,
  "norm_eps": 1e-5,
  "act_fn": "silu",
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "sample_size": 8,
}
VAE = {
  "_class_name": "AutoencoderKL",
  "in_channels": 3,
  "out_channels": 3,
  "down_block_types": ("DownEncoderBlock2D",) * 3,
  "up_block_types": ("UpDecoderBlock2D",) * 3,
  "block_out_channels": (8, 8, 8),
  "layers_per_block": 1,
  "latent_channels": 4,
  "norm_num_groups": 4,
  "act_fn": "silu",
  "sample_size": SIZE,
  "scaling_factor": 0.5,
}
SCHEDULER = {
  "_class_name": "DDIMScheduler",
  "num_train_timesteps": 1000,
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "set_alpha_to_one": False,
  "steps_offset": 1,
  "clip_sample": False,
  "prediction_type": "epsilon",
  "timestep_spacing": "leading",
}


FLUX = {
  "_class_name": "FluxTransformer2DModel",
  "patch_size": 1,
  "in_channels": 16,
  "num_layers": 2,
  "num_single_layers": 2,
  "attention_head_dim": 8,
  "num_attention_heads": 2,
  "joint_attention_dim": 24,
  "pooled_projection_dim": 16,
  "guidance_embeds": True,
  "axes_dims_rope": (2, 2, 4),
}
FLUX_VAE = VAE | {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159}
T5 = {
  "architectures": ["T5EncoderModel"],
  "model_type": "t5",
  "d_model": 24,
  "d_kv": 8,
  "d_ff": 40,
  "num_layers": 2,
  "num_heads": 2,
  "feed_forward_proj": "gated-gelu",
  "layer_norm_epsilon": 1e-6,
  "tie_word_embeddings": False,
  "pad_token_id": 0,
}
# FLUX.1-dev's scheduler.
FLOW = {
  "_class_name": "FlowMatchEulerDiscreteScheduler",
  "base_image_seq_len": 256,
  "base_shift": 0.5,
  "max_image_seq_len": 4096,
  "max_shift": 1.15,
  "num_train_timesteps": 1000,
  "shift": 3.0,
  "use_dynamic_shifting": True,
}


HUNYUAN_VIDEO = {
  "_class_name": "HunyuanVideoTransformer3DModel",
  "in_channels": 4,
  "out_channels": 4,
  "num_attention_heads": 2,
  "attention_head_dim": 16,
  "num_layers": 1,
  "num_single_layers": 1,
  "num_refiner_layers": 1,
  "mlp_ratio": 4.0,
  "patch_size": 2,
  "patch_size_t": 1,
  "qk_norm": "rms_norm",
  "guidance_embeds": True,
  "text_embed_dim": 16,
  "pooled_projection_dim": 16,
  "rope_theta": 256.0,
  "rope_axes_dim": (4, 6, 6),
}
VIDEO_VAE = {
  "_class_name": "AutoencoderKLHunyuanVideo",
  "in_channels": 3,
  "out_channels": 3,
  "latent_channels": 4,
  "down_block_types": ("HunyuanVideoDownBlock3D",) * 3,
  "up_block_types": ("HunyuanVideoUpBlock3D",) * 3,
  "block_out_channels": (8, 8, 8),
  "layers_per_block": 1,
  "norm_num_groups": 2,
  "act_fn": "silu",
  "scaling_factor": 0.5,
  "spatial_compression_ratio": 4,
  "temporal_compression_ratio": 4,
  "mid_block_add_attention": True,
}
LLAMA = {
  "architectures": ["LlamaModel"],
  "model_type": "llama",
  "hidden_size": 16,
  "intermediate_size": 32,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 512,
  "rms_norm_eps": 1e-5,
  "rope_theta": 5e5,
  "hidden_act": "silu",
}
# HunyuanVideo's scheduler.
VIDEO_FLOW = FLOW | {"shift": 7.0, "use_dynamic_shifting": False}


class Folders(NamedTuple):
  """Where the tiny models are.

  A diffusers folder, a CLIPModel folder, and a file with the 8 prompts of `PROMPTS`.
  """

  model: Path
  clip: Path
  prompts: Path


def draw(abstract, seed: int):
  """Random values for all tensors of a tree; their size keeps activations near 1."""
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
  """Writes a network's folder: config.json and safetensors in float32."""
  name = config_json.get("_class_name") or config_json["architectures"][0]
  weights.save(folder, name, draw(abstract_params(config_json), seed), config_json)


def write_models(root: Path) -> Folders:
  """Writes both folders and the prompts file under `root`."""
  model, clip, prompts = folders = Folders(
    root / "tiny-sd", root / "tiny-clip", root / "prompts.txt"
  )
  for folder in (model / "tokenizer", clip):
    tokenizer.write_tokenizer(list(PROMPTS), str(folder), length=TOKENS, size=560)
  text = {**TOWER, "max_position_embeddings": TOKENS, **stages.token_ids(model / "tokenizer")}
  write_network(model / "unet", UNET, seed=1)
  write_network(model / "vae", VAE, seed=2)
  write_network(
    model / "text_encoder",
    {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **text},
    seed=3,
  )
  stages.write_json(model / "scheduler" / "scheduler_config.json", SCHEDULER)
  stages.write_json(model / "model_index.json", stages.model_index())
  vision = {**TOWER, "image_size": SIZE, "patch_size": 8, "num_channels": 3}
  both = {
    "text_config": {**text, "projection_dim": 12},
    "vision_config": {**vision, "projection_dim": 12},
  }
  write_network(
    clip,
    {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 12, **both},
    seed=4,
  )
  stages.write_json(clip / "preprocessor_config.json", stages.clip_preprocessor(SIZE))
  prompts.write_text("\n".join(PROMPTS) + "\n")
  return folders


def write_flux(folder: Path, scheduler: dict = FLOW, **transformer) -> Path:
  """Writes a FLUX folder in diffusers' layout and returns it.

  The transformer's config gets the given changes.
  """
  tokenizer.write_tokenizer(list(PROMPTS), str(folder / "tokenizer"), length=TOKENS, size=560)
  t5_tokenizer.write_t5_tokenizer(list(PROMPTS), str(folder / "tokenizer_2"), length=TOKENS)
  text = {**TOWER, "max_position_embeddings": TOKENS, **stages.token_ids(folder / "tokenizer")}
  write_network(folder / "transformer", FLUX | transformer, seed=1)
  write_network(folder / "vae", FLUX_VAE, seed=2)
  write_network(
    folder / "text_encoder",
    {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **text},
    seed=3,
  )
  vocabulary = len(t5_tokenizer.vocabulary(list(PROMPTS)))
  write_network(folder / "text_encoder_2", T5 | {"vocab_size": vocabulary}, seed=4)
  stages.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
  stages.write_json(folder / "model_index.json", stages.flux_index())
  return folder


def write_hunyuan_video(folder: Path, **transformer) -> Path:
  """Writes a HunyuanVideo folder in diffusers' layout and returns it.

  The transformer's config gets the given changes.
  """
  texts = [templates.NAMED["video"].filled(prompt) for prompt in PROMPTS]
  llama_tokenizer.write_llama_tokenizer(texts, str(folder / "tokenizer"))
  # diffusers ask for 77 tokens of CLIP.
  tokenizer.write_tokenizer(list(PROMPTS), str(folder / "tokenizer_2"), length=77, size=560)
  text = {**TOWER, "max_position_embeddings": 77, **stages.token_ids(folder / "tokenizer_2")}
  write_network(folder / "transformer", HUNYUAN_VIDEO | transformer, seed=1)
  write_network(folder / "vae", VIDEO_VAE, seed=2)
  ids = llama_tokenizer.special_ids(str(folder / "tokenizer"))
  write_network(folder / "text_encoder", LLAMA | ids, seed=3)
  write_network(
    folder / "text_encoder_2",
    {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **text},
    seed=4,
  )
  stages.write_json(folder / "scheduler" / "scheduler_config.json", VIDEO_FLOW)
  stages.write_json(folder / "model_index.json", stages.hunyuan_video_index())
  return folder


def overrides(folders: Folders | None = None, **changes) -> list[str]:
  """configs/emoji_clip.py:tiny as flags, with the tiny models and further reduced.

  `changes` are by dotted key, with `__` for the dot.
  """
  values = {
    "data.prompts_per_iteration": 4,
    "rollout.samples_per_prompt": 4,
    "rollout.chunk": 16,
    "sampler.steps": 4,
    "evaluation.steps": 2,
    "evaluation.prompts": 2,
    "optimizer.microbatch": 16,
    "optimizer.updates_per_iteration": 1,
    "optimizer.warmup_steps": 0,
    "objective.timesteps": "all",
    "logging.tensorboard": False,
    "sampler.window.size": 0,
  }
  if folders:
    values |= {
      "model.checkpoint": folders.model,
      "reward.clip.checkpoint": folders.clip,
      "data.prompts": folders.prompts,
    }
  values |= {key.replace("__", "."): value for key, value in changes.items()}
  return [f"{key}={value}" for key, value in values.items()]


def tiny_config(folders: Folders | None = None, **changes):
  """The config of `overrides`."""
  return config_file.load(
    f"{ROOT / 'configs' / 'emoji_clip.py'}:tiny", overrides(folders, **changes)
  )


# Changes of `tiny_config` for clips of 9 frames that are not square. Latents are [3, 4, 8, 4].
VIDEO = {
  "model__family": "hunyuan_video",
  "model__size": (16, 32),
  "model__frames": 9,
  "model__text_length": 8,
  "sampler__kind": "flow",
  "sampler__shift": 0.0,
  "sampler__embedded_guidance": 6.0,
  "reward__terms": (("compressibility", 1.0),),
  "reward__compressibility__frames": "first",
}


def video_config(folder: Path | str, **changes):
  """The tiny config on a HunyuanVideo folder, with the checkpoint's time shift."""
  return tiny_config(None, **(VIDEO | {"model__checkpoint": str(folder)} | changes))


TOY_SHAPE = (4, 4, 2)


def toy_pipeline() -> Pipeline:
  """A pipeline that needs no files.

  The denoiser has one hidden layer, tokens are letters, and the grid is Stable Diffusion's.
  """

  def denoise(params, x, time, rows):
    weights = params["denoiser"]
    hidden = (
      x.reshape(len(x), -1) @ weights["first"]
      + rows @ weights["prompt"]
      + jnp.sin(time[:, None] / 99) * weights["time"]
    )
    return (jnp.tanh(hidden) @ weights["last"]).reshape(x.shape)

  def schedule(steps: int, shift: float) -> schedules.Schedule:
    numbers = {
      key: SCHEDULER[key]
      for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "steps_offset")
    }
    return schedules.diffusion_schedule(steps, spacing="leading", set_alpha_to_one=False, **numbers)

  return Pipeline(
    prepare=lambda examples: np.array(
      [[ord(letter) for letter in f"{example.prompt:8.8}"] for example in examples], np.int32
    ),
    encode=lambda params, tokens: jnp.sin(tokens.astype(jnp.float32)),
    denoise=denoise,
    decode=lambda params, latents: Media(jax.nn.sigmoid(jnp.repeat(latents[..., :1], 3, axis=-1))),
    schedule=schedule,
    prediction="epsilon",
    latent_shape=TOY_SHAPE,
    sample_shape=(*TOY_SHAPE[:2], 3),
    components={},
  )


class Toy(NamedTuple):
  """A toy run on one mesh: its programs and their arguments."""

  mesh: Any
  compiled: programs.Programs
  trainable: Any
  conditioning: Any
  new_state: Any  # () -> TrainState; the update donates it


def toy_programs(devices, **changes) -> Toy:
  """The programs of `tiny_config` around the toy pipeline, on these devices.

  The config has 4 prompts x 4 samples, and 4 steps, unless `changes` say otherwise.
  """
  config, pipeline = tiny_config(mesh__data=len(devices), **changes), toy_pipeline()
  mesh = sharding.make_mesh(config.mesh, devices)
  size = int(np.prod(TOY_SHAPE))
  rng = np.random.default_rng(0)
  with jax.set_mesh(mesh):
    whole = sharding.replicated(mesh)
    drawn = {
      name: rng.standard_normal(shape) / np.sqrt(shape[0])
      for name, shape in {
        "first": (size, 32),
        "prompt": (8, 32),
        "time": (1, 32),
        "last": (32, size),
      }.items()
    }
    params = {
      "denoiser": {
        name: jax.device_put(value.astype(np.float32), whole) for name, value in drawn.items()
      }
    }
    model = loading.Model(pipeline, {}, params, {}, {}, jax.tree.map(lambda _: whole, params))
    shardings = loading.state_shardings(config, model, len(PROMPTS), mesh)
    compiled = programs.build(config, pipeline, {}, mesh, shardings)
    init = init_state(config, len(PROMPTS), shardings)
    prompts = list(PROMPTS[: config.data.prompts_per_iteration])
    positive = compiled.encode({}, pipeline.prepare(as_examples(prompts)))
    negative = (
      None
      if config.sampler.guidance_scale == 1
      else compiled.encode({}, pipeline.prepare(as_examples([""] * len(prompts))))
    )
  return Toy(
    mesh,
    compiled,
    params,
    Conditioning(positive, negative),
    lambda: init(jax.tree.map(jnp.copy, params)),
  )


def update_of(
  run: programs.Programs,
  state: Any,
  frozen: Any,
  reference: Any,
  conditioning: Any,
  ids: Any,
  rollouts: tuple,
  *rest: Any,
  most: int = 0,
  stop: Callable[[], bool] = lambda: False,
) -> Any:
  """Updates as an iteration of the loop does: by "deal", and by the calls of `update_calls.run`.

  Args:
    run: the programs.
    state: the state before the update.
    frozen, reference, conditioning: arguments of the programs.
    ids: ids of the prompts.
    rollouts: the rollouts, one for each chunk.
    rest: advantage, weight, chosen, iteration.
    most: the largest number of microbatches of one call; 0 stands for all.
    stop: called between two calls; True stops the update.

  Returns:
    (state, metrics), or None where `stop` returned True.
  """
  dealt = run.update["deal"](state.trainable, rollouts, ids, *rest)
  inputs = update_calls.Inputs(frozen, reference, conditioning)
  return update_calls.run(run.update, state, inputs, dealt, most, stop)


def shapes_of(arguments: Any) -> Any:
  """Shapes and dtypes of arrays, and shardings of those on devices."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
    arguments,
  )


def noting(run: programs.Programs, seen: dict) -> programs.Programs:
  """The programs, where those of the update store the shapes of their arguments in `seen`."""

  def noted(name: str, program: Callable) -> Callable:
    def call(*arguments):
      seen[name] = shapes_of(arguments)
      return program(*arguments)

    return call

  return run._replace(update={name: noted(name, each) for name, each in run.update.items()})


def moves_between_devices(text: str) -> list[list[int]]:
  """Shapes that a compiled program moves between devices unchanged, thus without sums."""
  moves = re.findall(
    r"= (.*?) (?:all-gather|all-to-all|collective-permute|collective-broadcast)[\w.-]*\(", text
  )
  return [
    [int(n) for n in dims.split(",") if n]
    for move in moves
    for dims in re.findall(r"\[([\d,]*)\]", move)
  ]


def assert_trees_equal(actual, expected) -> None:
  """Asserts the same structure, and the same bits everywhere."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))


def relative_error(actual, expected) -> float:
  """max |a - b| / max |b| over all leaves of two trees together."""
  pairs = [
    (np.asarray(a, np.float64), np.asarray(b, np.float64))
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)))
  ]
  return max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(b).max() for _, b in pairs)
