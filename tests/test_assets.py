"""The shipped models: diffusers and transformers load the folders and compute what we compute."""

import pathlib

import jax
import numpy as np
import pytest

from dancegrpo_jax.assembly import sampling
from dancegrpo_jax.data import prompts
from dancegrpo_jax.evaluation import measures
from dancegrpo_jax.settings import config_file
from dancegrpo_jax.types import Example, Media

ROOT = pathlib.Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets"
PROMPTS = ["a red apple on a blue background", "a dog on a cyan background"]
STEPS = 20


def test_size():
  """A clone should not have to hold more than 44 MiB, 12 of them the model of videos."""
  files = [path for path in ASSETS.rglob("*") if path.is_file()]
  assert sum(path.stat().st_size for path in files) <= 44 * 2**20
  videos = [path for path in files if path.is_relative_to(ASSETS / "emoji-video")]
  assert sum(path.stat().st_size for path in videos) <= 12 * 2**20
  assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]


@pytest.fixture(scope="module")
def opened():
  overrides = [
    f"model.checkpoint={ASSETS / 'emoji-sd'}",
    f"reward.clip.checkpoint={ASSETS / 'emoji-clip'}",
  ]
  overrides += [f"evaluation.steps={STEPS}", "rollout.chunk=16", "evaluation.samples=2"]
  overrides += [f"evaluation.distractors={ASSETS / 'prompts/emoji_train.txt'}"]
  with sampling.opened(
    config_file.load(str(ROOT / "configs/emoji_clip.py"), overrides), "base"
  ) as value:
    yield value


def test_diffusers_samples_the_same_images(opened, monkeypatch):
  """Compares the whole path from the same initial latents.

  That is tokenizer, text encoder, UNet, DDIM to the end of the grid, and decoder.
  """
  diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
  pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
    str(ASSETS / "emoji-sd"), dtype=torch.float32
  )
  pipeline.set_progress_bar_config(disable=True)
  initial = np.random.default_rng(0).standard_normal((len(PROMPTS), 8, 8, 4)).astype(np.float32)
  expected = pipeline(
    PROMPTS,
    height=32,
    width=32,
    num_inference_steps=STEPS,
    guidance_scale=1.0,
    eta=0.0,
    output_type="np",
    latents=torch.from_numpy(initial.transpose(0, 3, 1, 2).copy()),
  ).images

  from dancegrpo_jax import programs
  from dancegrpo_jax.assembly import encoding
  from dancegrpo_jax.rl.policy import policy_of
  from dancegrpo_jax.rl.rollout import rollout

  config, model = opened.config, opened.model
  encode = encoding.encoder(model, opened.programs.encode)
  conditioning = encoding.conditioning(
    config, encode, [Example(i, p) for i, p in enumerate(PROMPTS)]
  )
  policy = policy_of(config, model.pipeline.prediction)._replace(steps=STEPS, window=0)
  params = {**model.frozen, **opened.weights}
  denoise = programs.guided(model.pipeline, 1.0)

  @jax.jit
  def sample(initial):
    rows = jax.numpy.arange(len(PROMPTS))
    return rollout(
      lambda x, time: denoise(params, x, time, conditioning, rows),
      model.pipeline.schedule(STEPS, 1.0),
      policy,
      initial,
      lambda i: initial,
    ).sample

  actual = np.asarray(model.pipeline.decode(params, sample(initial)).pixels)
  assert np.abs(actual - expected).max() <= 2 / 255
  assert np.abs(expected[0] - expected[1]).max() > 0.5  # two different pictures


def test_transformers_scores_the_same(opened):
  transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
  network = transformers.CLIPModel.from_pretrained(
    str(ASSETS / "emoji-clip"), dtype=torch.float32
  ).eval()
  tokenizer = transformers.CLIPTokenizer.from_pretrained(str(ASSETS / "emoji-clip"))
  pixels = np.random.default_rng(1).uniform(size=(2, 32, 32, 3)).astype(np.float32)
  mean = np.array([0.48145466, 0.4578275, 0.40821073])
  std = np.array([0.26862954, 0.26130258, 0.27577711])
  with torch.no_grad():
    images = torch.from_numpy(
      ((pixels - mean) / std).transpose(0, 3, 1, 2).astype(np.float32).copy()
    )
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=16, return_tensors="pt")
    out = network(input_ids=tokens.input_ids, pixel_values=images)
    expected = (out.image_embeds * out.text_embeds).sum(-1).numpy()
  reward, params = opened.model.rewards["clip"], opened.model.reward_params["clip"]
  text = opened.programs.features["clip"](
    params, reward.prepare([Example(i, p) for i, p in enumerate(PROMPTS)])
  )
  score = opened.programs.score["clip"]
  rows = np.tile(pixels, (8, 1, 1, 1))
  actual = np.asarray(score(params, Media(rows), text, np.arange(16) % 2)["clip"])
  np.testing.assert_allclose(actual[:2], expected, atol=2e-5)


def test_the_base_leaves_something_to_learn(opened):
  """Of the base model's samples, 25 % to 75 % are nearest to their own caption among 200."""
  pool = prompts.read_prompts(opened.config.evaluation.distractors)
  chosen = np.random.default_rng(0).choice(len(pool), 200, replace=False)  # any emoji, any colour
  result, _ = measures.measure(opened, opened.weights, [pool[i] for i in chosen], pool)
  assert 0.25 <= float(np.mean(result["clip/retrieval"])) <= 0.75


def test_the_base_of_videos_leaves_something_to_learn():
  """Of its clips, 25 % to 75 % are nearest to their own caption among 200, and about half move as
  their caption says, which the verifier judges.
  """
  overrides = [
    f"model.checkpoint={ASSETS / 'emoji-video'}",
    f"reward.clip.checkpoint={ASSETS / 'emoji-video-clip'}",
    f"reward.moving_emoji.subjects={ASSETS / 'emoji-video' / 'subjects.png'}",
    f"evaluation.distractors={ASSETS / 'prompts/moving_train.txt'}",
  ]
  config = config_file.load(str(ROOT / "configs/emoji_video_clip.py"), overrides)
  pool = prompts.read_prompts(config.evaluation.distractors)
  with sampling.opened(config, "base") as base:
    run = prompts.read_prompts(str(ASSETS / "prompts/moving_run.txt"))
    result, _ = measures.measure(base, base.weights, run, pool)
  assert 0.25 <= float(np.mean(result["clip/retrieval"])) <= 0.75
  assert 0.4 <= float(np.mean(result["moving_emoji/direction"])) <= 0.55
  assert float(np.mean(result["moving_emoji/mq"])) >= 0.8
