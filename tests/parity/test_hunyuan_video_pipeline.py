"""HunyuanVideo from a folder against diffusers' HunyuanVideoPipeline on the same files.

Compares text states, a whole deterministic sampling, and pixels.
"""

import json
import pathlib

import jax
import numpy as np
import pytest
import tiny_checkpoint
import torch
from diffusers import HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tiny_checkpoint import PROMPTS, relative_error, write_hunyuan_video

from dancegrpo_jax.assembly import sampling
from dancegrpo_jax.assembly.encoding import as_examples
from dancegrpo_jax.pipelines import templates
from dancegrpo_jax.rl import rng
from dancegrpo_jax.types import Conditioning

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZE, STEPS = tiny_checkpoint.VIDEO["model__size"], 12


def video_config(folder, **changes):
  """The tiny config on a HunyuanVideo folder, for samples of 8 clips."""
  values = {"evaluation__steps": STEPS, "rollout__chunk": 8}
  return tiny_checkpoint.video_config(folder, **(values | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_hunyuan_video(tmp_path_factory.mktemp("hunyuan"))


def sampled(folder, prompts=PROMPTS[:2], **changes) -> tuple:
  """Samples two prompts from the same noise by diffusers and by us.

  diffusers get no argument but the prompts, the size, the steps, the guidance and the noise.
  """
  config = video_config(folder, **changes)
  with sampling.opened(config, "base") as opened, jax.default_matmul_precision("highest"):
    model, run = opened.model, opened.programs
    rows = run.encode(model.frozen, model.pipeline.prepare(as_examples(list(prompts))))
    numbers, owners = np.arange(8, dtype=np.int32), np.arange(8, dtype=np.int32) % 2
    conditioning = Conditioning(rows, None)
    latents = run.sample(model.trainable, model.frozen, conditioning, numbers, owners, np.int32(5))
    pixels = run.decode(model.frozen, latents).pixels
    stream = rng.derive(rng.stream(0, "evaluation"), np.int32(5))
    noise = rng.initial_noise(
      stream, 0, numbers, numbers, shared=True, shape=model.pipeline.latent_shape
    )
    ours = jax.device_get((latents, pixels, rows))
  pipe = HunyuanVideoPipeline.from_pretrained(folder)
  pipe.set_progress_bar_config(disable=True)
  theirs = pipe(
    [prompts[owner] for owner in owners],
    height=config.model.size[0],
    width=config.model.size[1],
    num_frames=config.model.frames,
    num_inference_steps=config.evaluation.steps,
    guidance_scale=config.sampler.embedded_guidance,
    latents=torch.from_numpy(np.moveaxis(np.asarray(noise), -1, 1).copy()),
    output_type="latent",
  ).frames
  latents = np.moveaxis(theirs.numpy(), 1, -1)
  with torch.no_grad():
    decoded = pipe.vae.decode(theirs / pipe.vae.config.scaling_factor).sample
    text, pooled, mask = pipe.encode_prompt(list(prompts))
  pixels = (np.moveaxis(decoded.numpy(), 1, -1) / 2 + 0.5).clip(0, 1)
  return ours, (latents, pixels, (text.numpy(), pooled.numpy(), mask.numpy()))


def check(ours, theirs) -> None:
  """Checks text, latents and pixels.

  Text is held to the bound of a network, latents to the bound of a trajectory, and pixels to a
  quarter of an 8-bit step.
  """
  text, pooled, mask = theirs[2]
  rows = ours[2]
  length = rows["text"].shape[1]
  np.testing.assert_array_equal(rows["lengths"], mask.sum(1))
  assert mask[:, length:].sum() == 0
  valid = np.arange(length)[None, :, None] < rows["lengths"][:, None, None]
  errors = (
    relative_error(rows["text"] * valid, text[:, :length] * valid),
    relative_error(rows["pooled"], pooled),
    relative_error(ours[0], theirs[0]),
  )
  pixels = theirs[1] if ours[1].ndim == 5 else theirs[1][:, 0]
  shift = np.abs(ours[1] - pixels).max()
  print("text {:.1e}, pooled {:.1e}, latents {:.1e}, pixels {:.1e}".format(*errors, shift))
  assert max(errors[:2]) <= 1e-4 and errors[2] <= 1e-3 and shift <= 1 / 1024
  assert np.ptp(pixels, axis=0).mean() > 0.05  # different noise gives different clips


@pytest.mark.parametrize("scan", [False, True])
def test_sampling(folder, scan):
  """Euler steps with the scheduler's shift of 7 and embedded guidance."""
  check(*sampled(folder, model__scan_blocks=scan))


def test_clips_that_are_decoded_in_tiles(folder):
  """21 frames are more than a tile."""
  check(*sampled(folder, model__frames=21, evaluation__steps=2))


def test_one_frame_is_an_image(folder):
  ours, theirs = sampled(folder, model__frames=1, evaluation__steps=2)
  assert ours[1].shape == (8, *SIZE, 3)
  check(ours, theirs)


def test_without_guidance_as_an_input(tmp_path):
  folder = write_hunyuan_video(tmp_path, guidance_embeds=False)
  check(*sampled(folder, evaluation__steps=2))


def test_the_shipped_model():
  """Emoji that move: what `configs/emoji_video_clip.py` trains, as diffusers sample it."""
  prompts = "a red apple moving left on a blue background", "a star growing on a green background"
  changes = dict(model__size=(32, 32), model__frames=9, model__text_length=16)
  check(*sampled(ROOT / "assets" / "emoji-video", prompts, evaluation__steps=20, **changes))


def test_the_templates():
  """The one for videos is diffusers' default, and 95 tokens long before the prompt."""
  video = templates.NAMED["video"]
  assert video.text == DEFAULT_PROMPT_TEMPLATE["template"]
  assert video.tokens == DEFAULT_PROMPT_TEMPLATE["crop_start"] == 95


def test_the_tokens_before_the_prompt_are_counted(folder):
  """The tiny tokenizer has one token a word, as the published one in these texts."""
  config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
  assert config["padding_side"] == "right"
  with sampling.opened(video_config(folder), "base") as opened:
    inputs = opened.model.pipeline.prepare(as_examples(["a red cat", ""]))
  assert inputs["llama"].shape == (2, 95 + 8)
  np.testing.assert_array_equal(inputs["lengths"], [4, 1])  # three words, and <|eot_id|>
