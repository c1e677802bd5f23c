"""Command: makes the embedded models.

    python -m dancegrpo_jax.pretrain --config=configs/emoji_pretrain.py --stage=vae --workdir=runs/pretrain --out=assets

Stages: `vae` (autoencoder), `clip` (contrastive), `denoiser` (noise prediction; needs the vae's weights in --out), `all`.
A stage that was interrupted goes on from its last checkpoint when the command is repeated.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dancegrpo_jax import programs
from dancegrpo_jax.data import emoji, emoji_dataset, tokenizer
from dancegrpo_jax.diffusion import schedules
from dancegrpo_jax.models import autoencoder, clip, unet
from dancegrpo_jax.runtime import checkpoint, weights
from dancegrpo_jax.runtime import config as configs
from dancegrpo_jax.types import PyTree

FIELDS = ("params", "opt_state", "ema")  # of a stage's state
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # openai's pixel statistics
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Data(NamedTuple):
  """The pretraining split in memory: `images` uint8 [n, size, size, 3], `tokens` int32 [n, tokens], `pair` int32 [n]."""

  images: np.ndarray
  tokens: np.ndarray
  pair: np.ndarray


class Stage(NamedTuple):
  """What `fit` needs: initial parameters, `loss(params, batch, key)`, `batch(step)`, and `export(params)`."""

  name: str
  params: PyTree
  loss: Callable
  batch: Callable
  export: Callable


def to_signed(images: jax.Array) -> jax.Array:
  """uint8 pixels to [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def vae_stage(config, data: Data, out: Path) -> Stage:
  """AutoencoderKL: absolute error of pixels and of their differences, plus a small KL."""
  stage = config.vae
  network = autoencoder.from_json(stage.network.to_dict())

  def loss(params, batch, key):
    x = to_signed(batch["images"])
    mean, log_variance = network.apply({"params": params}, x, method="encode")
    latents = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
    error = network.apply({"params": params}, latents, method="decode") - x
    pixels = jnp.abs(error).mean()
    # Differences of neighbours: an absolute error alone leaves edges soft.
    edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).mean()
    return pixels + 0.5 * edges + stage.kl_weight * kl, {"pixels": pixels, "kl": kl}

  def batch(step: int) -> dict:
    rows = np.random.default_rng([config.seed, step]).choice(len(data.images), stage.batch, replace=False)
    return {"images": data.images[rows]}

  def export(params) -> None:
    latents = encode_all(network, params, data.images)
    config_json = {**stage.network.to_dict(), "scaling_factor": round(float(1 / latents.std()), 5)}
    save_component(out / "emoji-sd" / "vae", config_json, params)

  params = network.init(jax.random.key(config.seed), jnp.zeros((1, config.size, config.size, 3)))["params"]
  return Stage("vae", params, loss, batch, export)


def encode_all(network: autoencoder.AutoencoderKL, params: PyTree, images: np.ndarray, chunk: int = 256) -> np.ndarray:
  """Posterior means of all images, `[n, h, w, z]`, unscaled."""
  encode = programs.compiled(lambda p, x: network.apply({"params": p}, to_signed(x), method="encode")[0])
  padded = np.concatenate([images, np.zeros((-len(images) % chunk, *images.shape[1:]), np.uint8)])
  rows = [np.asarray(encode(params, padded[i : i + chunk])) for i in range(0, len(padded), chunk)]
  return np.concatenate(rows)[: len(images)]


def clip_stage(config, data: Data, out: Path) -> Stage:
  """CLIP: symmetric contrastive loss over a batch of distinct pairs (arXiv 2103.00020)."""
  stage = config.clip
  ids = token_ids(out / "emoji-sd" / "tokenizer")
  config_json = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": stage.projection_dim,
    "logit_scale_init_value": 2.6592,
    "text_config": {**stage.text.to_dict(), **ids, "model_type": "clip_text_model", "projection_dim": stage.projection_dim},
    "vision_config": {**stage.vision.to_dict(), "model_type": "clip_vision_model", "projection_dim": stage.projection_dim},
  }
  network = clip.Clip.from_json(config_json)
  first = np.concatenate([[0], np.flatnonzero(np.diff(data.pair)) + 1])
  variants = len(data.pair) // len(first)

  def loss(params, batch, key):
    noise_key, level_key = jax.random.split(key)
    x = batch["images"].astype(jnp.float32) / 255.0
    level = stage.pixel_noise * jax.random.uniform(level_key, (x.shape[0], 1, 1, 1))
    x = jnp.clip(x + level * jax.random.normal(noise_key, x.shape), 0.0, 1.0)
    x = (x - jnp.array(CLIP_MEAN).reshape(1, 1, 1, 3)) / jnp.array(CLIP_STD).reshape(1, 1, 1, 3)
    text, image, scale = network.apply({"params": params}, batch["tokens"], x)
    logits = jnp.minimum(scale, 100.0) * image @ text.T
    labels = jnp.arange(len(logits))
    value = sum(optax.softmax_cross_entropy_with_integer_labels(side, labels).mean() for side in (logits, logits.T)) / 2
    accuracy = (logits.argmax(1) == labels).mean()
    return value, {"accuracy": accuracy, "cosine": jnp.diag(image @ text.T).mean(), "scale": scale}

  def batch(step: int) -> dict:
    rng = np.random.default_rng([config.seed, 1, step])
    rows = rng.choice(first, stage.batch, replace=False) + rng.integers(variants, size=stage.batch)
    return {"images": data.images[rows], "tokens": data.tokens[rows]}

  def export(params) -> None:
    folder = out / "emoji-clip"
    save_component(folder, config_json, params)
    write_json(folder / "preprocessor_config.json", clip_preprocessor(config.size))
    write_tokenizer_files(folder)

  pixels = jnp.zeros((1, config.size, config.size, 3))
  params = network.init(jax.random.key(config.seed), jnp.asarray(data.tokens[:1]), pixels)["params"]
  return Stage("clip", params, loss, batch, export)


def denoiser_stage(config, data: Data, out: Path) -> Stage:
  """UNet and its text encoder together: mean squared error of the predicted noise (DDPM, arXiv 2006.11239)."""
  stage = config.denoiser
  ids = token_ids(out / "emoji-sd" / "tokenizer")
  text_json = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **stage.text.to_dict(), **ids}
  network, text = unet.from_json(stage.network.to_dict()), clip.ClipText.from_json(text_json)
  latents = scaled_latents(out / "emoji-sd" / "vae", data.images)
  empty = tokenizer.load_tokenizer(str(out / "emoji-sd" / "tokenizer"))([""])[0]
  alphas = jnp.asarray(schedules.alphas_cumprod(**{
    key: stage.scheduler[key] for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
  }), jnp.float32)  # fmt: skip

  def loss(params, batch, key):
    time_key, noise_key = jax.random.split(key)
    x0 = batch["latents"]
    # Stratified times: one from each of `batch` equal parts, which lowers the loss's variance.
    part = (jnp.arange(len(x0)) + jax.random.uniform(time_key, (len(x0),))) / len(x0)
    t = (part * len(alphas)).astype(jnp.int32)
    noise = jax.random.normal(noise_key, x0.shape)
    alpha = alphas[t].reshape(-1, 1, 1, 1)
    x = jnp.sqrt(alpha) * x0 + jnp.sqrt(1 - alpha) * noise
    context = text.apply({"params": params["text_encoder"]}, batch["tokens"])[0]
    predicted = network.apply({"params": params["unet"]}, x, t.astype(jnp.float32), context)
    return jnp.square(predicted - noise).mean(), {}

  def batch(step: int) -> dict:
    rng = np.random.default_rng([config.seed, 2, step])
    rows = rng.choice(len(latents), stage.batch, replace=False)
    dropped = rng.uniform(size=(stage.batch, 1)) < stage.caption_dropout
    return {"latents": latents[rows], "tokens": np.where(dropped, empty, data.tokens[rows])}

  def export(params) -> None:
    folder = out / "emoji-sd"
    save_component(folder / "unet", stage.network.to_dict(), params["unet"])
    save_component(folder / "text_encoder", text_json, params["text_encoder"])
    write_json(folder / "scheduler" / "scheduler_config.json", stage.scheduler.to_dict())
    write_json(folder / "model_index.json", model_index())

  keys = jax.random.split(jax.random.key(config.seed))
  context = jnp.zeros((1, config.tokens, stage.text.hidden_size))
  params = {
    "unet": network.init(keys[0], jnp.asarray(latents[:1]), jnp.zeros((1,)), context)["params"],
    "text_encoder": text.init(keys[1], jnp.asarray(data.tokens[:1]))["params"],
  }
  return Stage("denoiser", params, loss, batch, export)


def token_ids(folder: Path) -> dict:
  """vocab_size and the special ids that the towers' config.json carry, from a tokenizer folder."""
  vocab = json.loads((folder / "vocab.json").read_text())
  eos = vocab[tokenizer.EOS]
  return {"vocab_size": len(vocab), "bos_token_id": vocab[tokenizer.BOS], "eos_token_id": eos, "pad_token_id": eos}


def scaled_latents(folder: Path, images: np.ndarray) -> np.ndarray:
  """The data set as the denoiser sees it: posterior means times scaling_factor, float32."""
  config_json = weights.read_config(folder)
  network = autoencoder.from_json(config_json)
  abstract = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *images.shape[1:])))["params"]
  params = weights.load(folder, "AutoencoderKL", abstract)
  return encode_all(network, params, images) * config_json["scaling_factor"]


def save_component(folder: Path, config_json: dict, params: PyTree) -> None:
  """One network's folder, float16: half the size, and 1e-3 relative changes nothing that a sample shows."""
  name = config_json.get("_class_name") or config_json["architectures"][0]
  weights.save(folder, name, params, config_json, dtype=np.float16)


def write_json(path: Path, value: dict) -> None:
  """A JSON file and the folder above it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_tokenizer_files(folder: Path) -> None:
  """The captions' tokenizer: the same vocabulary for the text encoder and for CLIP."""
  captions = [emoji.caption(name, colour) for name in emoji.NAMES for colour in emoji.COLOURS]
  tokenizer.write_tokenizer(captions, str(folder))


def clip_preprocessor(size: int) -> dict:
  """preprocessor_config.json of the CLIP folder."""
  return {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": size, "width": size},
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "do_convert_rgb": True,
  }  # fmt: skip


def model_index() -> dict:
  """model_index.json of the pipeline folder."""
  return {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
  }


def fit(stage: Stage, config, workdir: Path, save_every: int = 400) -> PyTree:
  """Trains a stage to its last step and returns the averaged parameters; resumes from the workdir's checkpoint."""
  settings = config[stage.name]
  schedule = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, settings.warmup, settings.steps, 1e-5)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-4))
  step_fn = programs.fit_step(stage.loss, optimizer)
  state = (stage.params, optimizer.init(stage.params), jax.tree.map(jnp.copy, stage.params))
  folder, start = workdir / stage.name, 0
  if checkpoint.latest(folder) is not None:
    restored = checkpoint.restore(folder, dict(zip(FIELDS, jax.eval_shape(lambda: state))))
    start, state = restored.iteration, tuple(restored.state[name] for name in FIELDS)
  begin = time.monotonic()
  with checkpoint.Saver(folder, keep=1) as saver, (workdir / f"{stage.name}.jsonl").open("a") as log:
    for step in range(start, settings.steps):
      decay = min(settings.ema, (step + 1) / (step + 10))  # else the random start stays in the average for thousands of steps
      key = jax.random.fold_in(jax.random.key(config.seed + 1), step)
      state, metrics = step_fn(state, stage.batch(step), key, np.float32(decay))
      if step % 50 == 0 or step == settings.steps - 1:
        row = {"step": step, "seconds": round(time.monotonic() - begin, 1), **{k: float(v) for k, v in metrics.items()}}
        print(f"{stage.name}: " + "  ".join(f"{k} {v:.5g}" for k, v in row.items()), flush=True)
        print(json.dumps(row), file=log, flush=True)
      if (step + 1) % save_every == 0 or step == settings.steps - 1:
        saver.save(step + 1, dict(zip(FIELDS, state)), {"stage": stage.name})
  return state[2]


def load_data(config, font: str, workdir: Path, out: Path) -> Data:
  """The training split through its TFDS builder, which draws it into the workdir once; captions tokenised."""
  rows = emoji_dataset.load("train", data_dir=str(workdir / "tfds"), size=config.size, variants=config.variants, font=font)
  rows = [rows[i] for i in range(len(rows))]
  tokenize = tokenizer.load_tokenizer(str(out / "emoji-sd" / "tokenizer"))
  return Data(
    images=np.stack([row["image"] for row in rows]),
    tokens=tokenize([row["caption"].decode() for row in rows]),
    pair=np.array([row["pair"] for row in rows], np.int32),
  )


STAGES = {"vae": vae_stage, "clip": clip_stage, "denoiser": denoiser_stage}


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  parser.add_argument("--stage", default="all", choices=("all", *STAGES))
  parser.add_argument("--workdir", default="runs/pretrain", help="data set, checkpoints and logs")
  parser.add_argument("--out", default="assets", help="where emoji-sd/ and emoji-clip/ are written")
  parser.add_argument("--font", default=os.environ.get("EMOJI_FONT", emoji.FONT), help="NotoColorEmoji.ttf (CBDT build)")


def run(config, stage: str, workdir: Path, out: Path, font: str) -> None:
  """Trains and exports one stage, or all in their order.

  Raises:
    ConfigError: the font is missing or unfit, or an earlier stage's weights are.
  """
  try:
    emoji.check_font(font)
    workdir.mkdir(parents=True, exist_ok=True)
    write_tokenizer_files(out / "emoji-sd" / "tokenizer")
    data = load_data(config, font, workdir, out)
    for name in STAGES if stage == "all" else (stage,):
      chosen = STAGES[name](config, data, out)
      chosen.export(fit(chosen, config, workdir))
  except (ValueError, FileNotFoundError) as error:
    raise configs.ConfigError(str(error)) from error


def main(argv: list[str]) -> int:
  """Reads the flags and trains; returns the exit code, 2 for a mistake."""

  def command() -> None:
    line = configs.parse_argv(argv, "Make the embedded models.", add_flags)
    flags = line.flags
    run(line.config, flags.stage, Path(flags.workdir), Path(flags.out), flags.font)

  return configs.exit_on_mistake(command)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
