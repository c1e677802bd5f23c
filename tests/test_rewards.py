"""Rewards: CLIP, Python functions and their errors, and the size of a JPEG.

CLIP is compared with transformers, path by path, and the size of a JPEG with PIL.
"""

import io
import sys

import jax
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from PIL import Image
from tiny_checkpoint import PROMPTS, tiny_config
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from dancegrpo_jax.assembly import loading, reward_builders
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.rewards import kinds
from dancegrpo_jax.rewards.base import Networks, Reward, RewardKind
from dancegrpo_jax.types import Example, Media

EXAMPLES = [Example(i, text) for i, text in enumerate(PROMPTS[:4])]


def built(name: str, **section) -> Reward:
  """A reward that needs no files."""
  return kinds.kind_of(name).build(
    name, ConfigDict(section), reward_builders.FILES, Networks(dtype="float32")
  )


def pictures(height: int, width: int) -> np.ndarray:
  """Smooth waves with some noise, uint8 `[4, height, width, 3]`.

  An image processor for 8-bit images takes them without rounding.
  """
  rng = np.random.default_rng(height)
  y, x = np.mgrid[:height, :width]
  waves = [[np.sin(x / (3 + i) + y / (5 + c) + i) for c in range(3)] for i in range(4)]
  values = (
    128 + 90 * np.array(waves).transpose(0, 2, 3, 1) + rng.normal(0, 10, (4, height, width, 3))
  )
  return np.clip(np.round(values), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def clip(tiny_models):
  """`(pixels) -> scores` and `(pixels) -> embeddings` of our CLIP reward with its weights."""
  config = tiny_config(tiny_models)
  mesh = sharding.make_mesh(config.mesh)
  rewards = reward_builders.build_rewards(config)
  model = loading.load(config, loading.build_pipeline(config), rewards, mesh)
  reward, params = rewards["clip"], model.reward_params["clip"]
  assert reward.kind == "device" and reward.name == "clip"
  with jax.default_matmul_precision("highest"):
    text = jax.jit(reward.features)(params, reward.prepare(EXAMPLES))
    score = jax.jit(lambda pixels: reward.score(params, Media(pixels), text)["clip"])
    embed = jax.jit(lambda pixels: reward.embed(params, Media(pixels)))
    yield score, embed


@pytest.fixture(scope="module")
def reference(tiny_models):
  """The same from transformers' processor, tokenizer and model in the same folder."""
  model = CLIPModel.from_pretrained(tiny_models.clip).eval()
  processor = CLIPImageProcessor.from_pretrained(tiny_models.clip)
  tokens = CLIPTokenizer.from_pretrained(tiny_models.clip)(
    list(PROMPTS[:4]), padding="max_length", return_tensors="pt"
  )

  @torch.no_grad()
  def run(images: np.ndarray):
    pixels = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")[
      "pixel_values"
    ]
    output = model(input_ids=tokens["input_ids"], pixel_values=pixels)
    return (output.image_embeds * output.text_embeds).sum(-1).numpy(), output.image_embeds.numpy()

  return run


@pytest.mark.parametrize(
  "size, tolerance",
  [
    # the tower's own size: nothing is resized, so that only float32 round-off is left
    ((32, 32), 1e-5),
    ((48, 80), 5e-4),  # PIL resizes in 8 bits: half a level of 255 in each pass
    ((120, 70), 5e-4),
    ((64, 64), 5e-4),
  ],
)
def test_clip_score_is_that_of_transformers(clip, reference, size, tolerance):
  score, embed = clip
  images = pictures(*size)
  pixels = np.float32(images) / 255
  expected, embeddings = reference(images)
  actual = np.asarray(score(pixels))
  # The scores tell images apart.
  assert actual.shape == (4,) and actual.dtype == np.float32 and np.ptp(expected) > 50 * tolerance
  np.testing.assert_allclose(actual, expected, atol=tolerance)
  np.testing.assert_allclose(embed(pixels), embeddings, atol=tolerance)
  np.testing.assert_allclose(np.linalg.norm(embed(pixels), axis=1), 1.0, rtol=1e-5)


def test_clip_fails_with_its_image(clip):
  """Pixels that are not finite score NaN; the other images keep their scores."""
  score, _ = clip
  pixels = np.float32(pictures(32, 32)) / 255
  expected = np.asarray(score(pixels))
  pixels[2, 0, 0, 0] = np.nan
  actual = np.asarray(score(pixels))
  assert np.isnan(actual[2])
  np.testing.assert_array_equal(np.delete(actual, 2), np.delete(expected, 2))


# A Python function.


def brightness(pixels, prompts, metadata):
  assert len(prompts) == len(metadata) == len(pixels)
  return [image.mean() + (extra or {}).get("bonus", 0) for image, extra in zip(pixels, metadata)]


def of_one_argument(pixels):
  return pixels.mean((1, 2, 3))


def of_wrong_shape(pixels, prompts, metadata):
  return [0.0]


def test_python_function_gets_what_it_needs():
  reward = built(f"{__name__}:brightness")
  assert reward.kind == "host" and reward.components == {}
  pixels = np.stack([np.full((4, 4, 3), value, np.float32) for value in (0.2, 0.7)])
  examples = [Example(0, "a"), Example(1, "b", metadata={"bonus": 5})]
  (scores,) = reward.score(Media(pixels), examples).values()
  assert scores.dtype == np.float32
  np.testing.assert_allclose(scores, [0.2, 5.7], rtol=1e-6)


def test_python_function_of_a_video():
  reward = built(f"{__name__}:brightness")
  (scores,) = reward.score(
    Media(np.full((2, 3, 4, 4, 3), 0.5, np.float32), 8.0), EXAMPLES[:2]
  ).values()
  np.testing.assert_allclose(scores, [0.5, 0.5])


@pytest.mark.parametrize(
  "name, words",
  [
    ("no_such_module_here:f", ["no_such_module_here", "importable"]),
    (f"{__name__}:no_such_function", ["no_such_function", "module:object"]),
    (f"{__name__}:of_one_argument", ["of_one_argument", "(pixels, prompts, metadata)"]),
  ],
)
def test_python_function_that_can_t_be_used(name, words):
  with pytest.raises(ValueError) as error:
    built(name)
  text = str(error.value)
  assert (
    "\n" not in text
    and text.startswith("config.reward.terms")
    and all(word in text for word in words)
  ), text
  with pytest.raises(ConfigError, match="config.reward.terms"):  # the error that a command prints
    reward_builders.build_rewards(tiny_config(reward__terms=((name, 1.0),)))


@pytest.mark.parametrize(
  "source, words",
  [
    ("score = 1", ["score", "(pixels, prompts, metadata)"]),
    ("import no_such_dependency\ndef score(a, b, c): pass", ["no_such_dependency"]),
    ("def score(a, b, c): return a\nthis is no python", ["line 2"]),
    ("raise RuntimeError('no GPU here')", ["no GPU here"]),
  ],
)
def test_module_that_can_t_be_used(tmp_path, monkeypatch, source, words):
  """Any error in the user's module becomes one line about the config, before anything runs."""
  (tmp_path / "scorer_of_a_user.py").write_text(source)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "scorer_of_a_user", raising=False)
  with pytest.raises(ValueError) as error:
    built("scorer_of_a_user:score")
  text = str(error.value)
  assert text.startswith("config.reward.terms") and all(word in text for word in words), text


A_KIND = RewardKind(build=lambda name, section, files, networks: built("compressibility"))
NOTHING = 3.0


def test_the_type_of_an_object_decides():
  assert kinds.kind_of(f"{__name__}:A_KIND") is A_KIND
  assert kinds.kind_of("compressibility").section == "compressibility"
  for name, words in {
    f"{__name__}:NOTHING": "is a float; it must be a function of",
    f"{__name__}:Image": "is a module",
    f"{__name__}:Reward": "is a type",
    "clop": "unknown reward; one of clip, hps",
  }.items():
    with pytest.raises(ValueError, match=words) as error:
      kinds.kind_of(name)
    assert "\n" not in str(error.value)


def test_python_function_must_score_every_sample():
  reward = built(f"{__name__}:of_wrong_shape")
  with pytest.raises(ValueError, match=r"a list of 1 \(float\) for 4 samples"):
    reward.score(Media(np.zeros((4, 2, 2, 3), np.float32)), EXAMPLES)


# JPEG size.


@pytest.mark.parametrize("quality, sign", [(95, -1.0), (30, 1.0)])
def test_compressibility_is_the_size_of_a_jpeg(quality, sign):
  images = pictures(32, 48)
  sizes = []
  for image in images:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
    sizes.append(len(buffer.getvalue()) / 1000)
  pixels = np.float32(images) / 255
  (scores,) = (
    built("compressibility", quality=quality, sign=sign).score(Media(pixels), EXAMPLES).values()
  )
  np.testing.assert_allclose(scores, sign * np.float32(sizes), rtol=1e-6)
  pixels[1, 3, 3, 1] = np.inf
  (scores,) = (
    built("compressibility", quality=quality, sign=sign).score(Media(pixels), EXAMPLES).values()
  )
  assert np.isnan(scores[1]) and np.isfinite(np.delete(scores, 1)).all()
