"""Pretrains HunyuanVideo's transformer together with its two text encoders."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax.data import llama_tokenizer, moving_emoji, tokenizer
from dancegrpo_jax.models import clip, decoder_lm, hunyuan_video
from dancegrpo_jax.pipelines import templates
from dancegrpo_jax.pipelines.hunyuan_video import SKIPPED_LAYERS
from dancegrpo_jax.pretrain import flow, shared, vae
from dancegrpo_jax.pretrain.shared import Data, Stage
from dancegrpo_jax.types import PyTree

TEMPLATE = templates.NAMED["video"]


class Networks(NamedTuple):
  """The networks that are trained, by their folders."""

  transformer: hunyuan_video.HunyuanVideoTransformer3DModel
  text_encoder: decoder_lm.DecoderLM
  text_encoder_2: clip.ClipText


def video_stage(config: ConfigDict, data: Data, out: Path) -> Stage:
  """The transformer and its text encoders: the mean squared error of the velocity (rectified flow,
  arXiv 2209.03003).

  A share of the captions names another motion than the clip has, at random. The model then follows
  the caption's motion in a part of its samples only, so that a reward has something to teach.

  Args:
    config: of pretraining.
    data: the training split.
    out: the folder of the models; the folder vae inside `config.folder` is read, and the rest of it
      is written.
  """
  stage, folder = config.video, out / config.folder
  words = _Words(folder, stage.text_length)
  latents = vae.scaled_latents(folder / "vae", data.images)
  jsons = _config_jsons(stage, folder)
  networks = Networks(
    transformer=hunyuan_video.from_json(jsons["transformer"]),
    text_encoder=_language_model(jsons["text_encoder"], every_layer=False),
    text_encoder_2=clip.ClipText.from_json(jsons["text_encoder_2"]),
  )

  def loss(params, batch, key):
    return _loss(networks, words.crop, params, batch, key)

  def batch(step: int) -> dict:
    rng = np.random.default_rng([config.seed, 4, step])
    rows = rng.choice(len(latents), stage.batch, replace=False)
    scenes = [moving_emoji.scene_of(data.captions[row]) for row in rows]
    wrong = rng.uniform(size=len(rows)) < stage.random_motion
    motions = rng.choice(list(moving_emoji.MOTIONS), len(rows))
    captions = [
      moving_emoji.caption(scene._replace(motion=str(motion)) if is_wrong else scene)
      for scene, motion, is_wrong in zip(scenes, motions, wrong, strict=True)
    ]
    return {"latents": latents[rows], **words(captions)}

  def export(params) -> None:
    for name, config_json in jsons.items():
      shared.save_component(folder / name, config_json, params[name])
    shared.write_json(folder / "scheduler" / "scheduler_config.json", stage.scheduler.to_dict())
    shared.write_json(folder / "model_index.json", hunyuan_video_index())

  first = {"latents": latents[:1], **words(data.captions[:1])}
  params = _initial_params(networks, jsons, words.crop, jax.random.key(config.seed), first)
  return Stage(name="video", params=params, loss=loss, batch=batch, export=export)


class _Words:
  """Both tokenizers of the folder, of which Llama's is written first."""

  def __init__(self, folder: Path, length: int):
    splits = ("train", "held_out")
    scenes = [scene for split in splits for scene in moving_emoji.scenes(split)]
    texts = [TEMPLATE.filled(moving_emoji.caption(scene)) for scene in scenes]
    llama_tokenizer.write_llama_tokenizer(texts, str(folder / "tokenizer"))
    self._llama = llama_tokenizer.load_llama_tokenizer(str(folder / "tokenizer"))
    self._clip = tokenizer.load_tokenizer(str(folder / "tokenizer_2"))
    self._length = length
    self.crop = self._llama.lengths([TEMPLATE.before])[0]

  def __call__(self, captions: list[str]) -> dict[str, np.ndarray]:
    """The captions' tokens for both encoders, and how many of Llama's are the caption's."""
    ids = self._llama([TEMPLATE.filled(caption) for caption in captions], self.crop + self._length)
    return {
      "llama": np.maximum(ids, 0),
      "lengths": (ids >= 0).sum(1).astype(np.int32) - self.crop,
      "clip": self._clip(captions),
    }


def _language_model(config_json: dict, every_layer: bool) -> decoder_lm.DecoderLM:
  """The language model as it is used, or with the layers and the norm that only its file has."""
  layers = config_json["num_hidden_layers"]
  return decoder_lm.from_json(
    config_json,
    layers=layers if every_layer else layers - SKIPPED_LAYERS,
    final_norm=every_layer,
  )


def _config_jsons(stage: ConfigDict, folder: Path) -> dict[str, dict]:
  """config.json of every network that is trained, by its folder."""
  return {
    "transformer": stage.network.to_dict(),
    "text_encoder": {
      "architectures": ["LlamaModel"],
      "model_type": "llama",
      **stage.text.to_dict(),
      **llama_tokenizer.special_ids(str(folder / "tokenizer")),
    },
    "text_encoder_2": shared.text_encoder_json(stage.pooler, folder / "tokenizer_2"),
  }


def _loss(
  networks: Networks, crop: int, params: PyTree, batch: dict, key: jax.Array
) -> tuple[jax.Array, dict]:
  """The loss of a batch of latents `[n, f, h, w, z]` and tokens."""
  time_key, noise_key = jax.random.split(key)
  x0 = batch["latents"]
  # Logit-normal times, as in flow.py. The margin keeps the normal quantiles finite.
  t = jax.nn.sigmoid(jax.scipy.stats.norm.ppf(shared.stratified(time_key, len(x0), margin=1e-3)))
  noise = jax.random.normal(noise_key, x0.shape)
  share = t.reshape(-1, 1, 1, 1, 1)
  x = (1 - share) * x0 + share * noise
  language_model = {k: v for k, v in params["text_encoder"].items() if k != "norm"}
  states = networks.text_encoder.apply({"params": language_model}, batch["llama"])[:, crop:]
  pooled = networks.text_encoder_2.apply({"params": params["text_encoder_2"]}, batch["clip"])[1]
  velocity = networks.transformer.apply(
    {"params": params["transformer"]}, x, 1000 * t, states, batch["lengths"], pooled
  )
  return jnp.square(velocity - (noise - x0)).mean(), {}


def _initial_params(
  networks: Networks, jsons: dict[str, dict], crop: int, key: jax.Array, first: dict
) -> dict[str, PyTree]:
  """Random parameters of every network; `first` is a batch of one sample."""
  keys = jax.random.split(key, 3)
  tokens = {name: jnp.asarray(value) for name, value in first.items()}
  states = jnp.zeros((1, first["llama"].shape[1] - crop, jsons["text_encoder"]["hidden_size"]))
  pooled = jnp.zeros((1, jsons["text_encoder_2"]["hidden_size"]))
  variables = {
    "transformer": shared.initial(
      networks.transformer,
      keys[0],
      *(tokens["latents"], jnp.zeros((1,)), states, tokens["lengths"], pooled),
    ),
    "text_encoder": shared.initial(
      _language_model(jsons["text_encoder"], every_layer=True), keys[1], tokens["llama"]
    ),
    "text_encoder_2": shared.initial(networks.text_encoder_2, keys[2], tokens["clip"]),
  }
  params = {name: value["params"] for name, value in variables.items()}
  params["transformer"] = flow.without_modulation(params["transformer"])
  return params


def hunyuan_video_index() -> dict:
  """model_index.json of a HunyuanVideo folder.

  The tokenizer is of transformers' general class, because its LlamaTokenizerFast drops spaces since
  version 5, see data/llama_tokenizer.py.
  """
  return {
    "_class_name": "HunyuanVideoPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "LlamaModel"],
    "text_encoder_2": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
  }
