"""Pretrains FLUX's transformer together with its two text encoders."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax.data import t5_tokenizer
from dancegrpo_jax.models import clip, flux, t5
from dancegrpo_jax.pretrain import shared, vae
from dancegrpo_jax.pretrain.shared import Data, Stage
from dancegrpo_jax.types import PyTree


class Networks(NamedTuple):
  """The networks that are trained, by their folders."""

  transformer: flux.FluxTransformer2DModel
  text_encoder: clip.ClipText
  text_encoder_2: t5.T5Encoder


def flow_stage(config: ConfigDict, data: Data, out: Path) -> Stage:
  """FLUX's transformer and its text encoders: the mean squared error of the velocity (rectified
  flow, arXiv 2209.03003).

  Times are logit-normal, as those that FLUX was trained with (arXiv 2403.03206, section 3.1).

  Args:
    config: of pretraining.
    data: the training split.
    out: the folder of the models; emoji-sd/vae is read, and emoji-flux is written.
  """
  stage, folder = config.flow, out / "emoji-flux"
  words = _write_tokenizers(folder, data.captions, stage.text_length)
  latents = vae.scaled_latents(out / "emoji-sd" / "vae", data.images)
  jsons = _config_jsons(stage, folder)
  networks = Networks(
    transformer=flux.from_json(jsons["transformer"]),
    text_encoder=clip.ClipText.from_json(jsons["text_encoder"]),
    text_encoder_2=t5.from_json(jsons["text_encoder_2"]),
  )

  def loss(params, batch, key):
    return _loss(networks, params, batch, key)

  def batch(step: int) -> dict:
    rng = np.random.default_rng([config.seed, 3, step])
    rows = rng.choice(len(latents), stage.batch, replace=False)
    return {"latents": latents[rows], "tokens": data.tokens[rows], "words": words[rows]}

  def export(params) -> None:
    for name, config_json in jsons.items():
      shared.save_component(folder / name, config_json, params[name])
    # FluxPipeline needs shift_factor, which Stable Diffusion's autoencoders don't have.
    vae_json, vae_params = vae.load_vae(out / "emoji-sd" / "vae", data.images.shape[1:])
    shared.save_component(folder / "vae", {**vae_json, "shift_factor": 0.0}, vae_params)
    shared.write_json(folder / "scheduler" / "scheduler_config.json", stage.scheduler.to_dict())
    shared.write_json(folder / "model_index.json", flux_index())

  first = {"latents": latents[:1], "tokens": data.tokens[:1], "words": words[:1]}
  params = _initial_params(networks, stage, jax.random.key(config.seed), first)
  return Stage(name="flow", params=params, loss=loss, batch=batch, export=export)


def _write_tokenizers(folder: Path, captions: list[str], length: int) -> np.ndarray:
  """Writes both tokenizers, and returns the captions' tokens for T5, int32 `[n, length]`."""
  shared.write_tokenizer_files(folder / "tokenizer")
  t5_folder = str(folder / "tokenizer_2")
  t5_tokenizer.write_t5_tokenizer(shared.all_captions(), t5_folder, length)
  return t5_tokenizer.load_t5_tokenizer(t5_folder)(captions, length)


def _config_jsons(stage: ConfigDict, folder: Path) -> dict[str, dict]:
  """config.json of every network that is trained, by its folder."""
  return {
    "transformer": stage.network.to_dict(),
    "text_encoder": shared.text_encoder_json(stage.pooler, folder / "tokenizer"),
    "text_encoder_2": {
      "architectures": ["T5EncoderModel"],
      "model_type": "t5",
      **stage.text.to_dict(),
      "vocab_size": len(t5_tokenizer.vocabulary(shared.all_captions())),
    },
  }


def _loss(
  networks: Networks, params: PyTree, batch: dict, key: jax.Array
) -> tuple[jax.Array, dict]:
  """The loss of a batch of latents `[n, h, w, z]`, tokens and words."""
  time_key, noise_key = jax.random.split(key)
  x0 = batch["latents"]
  # The margin keeps the normal quantiles finite.
  t = jax.nn.sigmoid(jax.scipy.stats.norm.ppf(shared.stratified(time_key, len(x0), margin=1e-3)))
  noise = jax.random.normal(noise_key, x0.shape)
  share = t.reshape(-1, 1, 1, 1)
  x = (1 - share) * x0 + share * noise
  pooled = networks.text_encoder.apply({"params": params["text_encoder"]}, batch["tokens"])[1]
  states = networks.text_encoder_2.apply({"params": params["text_encoder_2"]}, batch["words"])
  velocity = networks.transformer.apply(
    {"params": params["transformer"]}, x, 1000 * t, states, pooled
  )
  return jnp.square(velocity - (noise - x0)).mean(), {}


def _initial_params(
  networks: Networks, stage: ConfigDict, key: jax.Array, first: dict[str, np.ndarray]
) -> dict[str, PyTree]:
  """Random parameters of every network; `first` is a batch of one sample."""
  keys = jax.random.split(key, 3)
  latent, tokens, words = (jnp.asarray(first[name]) for name in ("latents", "tokens", "words"))
  states = jnp.zeros((1, stage.text_length, stage.text.d_model))
  pooled = jnp.zeros((1, stage.pooler.hidden_size))
  variables = {
    "transformer": shared.initial(
      networks.transformer, keys[0], latent, jnp.zeros((1,)), states, pooled
    ),
    "text_encoder": shared.initial(networks.text_encoder, keys[1], tokens),
    "text_encoder_2": shared.initial(networks.text_encoder_2, keys[2], words),
  }
  params = {name: value["params"] for name, value in variables.items()}
  params["transformer"] = without_modulation(params["transformer"])
  return params


def without_modulation(params: PyTree) -> PyTree:
  """FLUX's parameters with every block an identity at first: the layers that make shifts, scales
  and gates are 0 (adaLN-Zero, arXiv 2212.09748), and so is the last projection.
  """

  def is_zero(path: tuple) -> bool:
    names = [str(entry.key) for entry in path]
    is_modulation = names[-2] == "linear" and names[-3].startswith("norm")
    return is_modulation or names[:-1] == ["proj_out"]

  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.zeros_like(x) if is_zero(path) else x, params
  )


def flux_index() -> dict:
  """model_index.json of the FLUX folder."""
  return {
    "_class_name": "FluxPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
  }
