"""FLUX from a folder against diffusers' FluxPipeline on the same files.

Compares text states, a whole deterministic sampling, and pixels.
"""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from tiny_checkpoint import FLOW, PROMPTS, ROOT, TOKENS, relative_error, tiny_config, write_flux

from dancegrpo_jax.assembly import loading, sampling
from dancegrpo_jax.assembly.encoding import as_examples
from dancegrpo_jax.data.t5_tokenizer import load_t5_tokenizer
from dancegrpo_jax.data.tokenizer import load_tokenizer
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.pipelines import flow_match, flux
from dancegrpo_jax.pipelines.base import ModelSettings
from dancegrpo_jax.rl import rng
from dancegrpo_jax.types import Conditioning

SIZE, STEPS = (32, 48), 30  # not square: latents are [8, 12, 4], with 24 tokens
SCHNELL = FLOW | {"shift": 1.0, "use_dynamic_shifting": False}


def flux_config(folder, **changes):
  """The tiny config on a FLUX folder, with the checkpoint's time shift."""
  values = {
    "model__family": "flux",
    "model__checkpoint": str(folder),
    "model__size": SIZE,
    "model__text_length": TOKENS + 3,
    "sampler__kind": "flow",
    "sampler__shift": 0.0,
    "evaluation__steps": STEPS,
    "reward__terms": (("compressibility", 1.0),),
    "rollout__chunk": 8,
  }
  return tiny_config(None, **(values | changes))


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
  return write_flux(tmp_path_factory.mktemp("flux") / "dev")


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
  return write_flux(tmp_path_factory.mktemp("flux") / "schnell", SCHNELL, guidance_embeds=False)


def their_pipeline(folder) -> FluxPipeline:
  pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
  pipe.set_progress_bar_config(disable=True)
  return pipe


def sampled(folder, steps: int, guidance: float, **changes) -> tuple:
  """Samples two prompts from the same noise by diffusers and by us.

  Returns (our latents and pixels, diffusers' latents and pixels), and our conditioning.
  """
  config = flux_config(
    folder, evaluation__steps=steps, sampler__embedded_guidance=guidance, **changes
  )
  with sampling.opened(config, "base") as opened, jax.default_matmul_precision("highest"):
    model, run = opened.model, opened.programs
    rows = run.encode(model.frozen, model.pipeline.prepare(as_examples(list(PROMPTS[:2]))))
    numbers, owners = np.arange(8, dtype=np.int32), np.arange(8, dtype=np.int32) % 2
    conditioning = Conditioning(rows, None)
    latents = run.sample(model.trainable, model.frozen, conditioning, numbers, owners, np.int32(5))
    pixels = run.decode(model.frozen, latents).pixels
    stream = rng.derive(rng.stream(0, "evaluation"), np.int32(5))
    noise = rng.initial_noise(
      stream, 0, numbers, numbers, shared=True, shape=model.pipeline.latent_shape
    )
    ours = jax.device_get((latents, pixels, rows))
  pipe = their_pipeline(folder)
  noise = torch.from_numpy(np.ascontiguousarray(np.asarray(noise).transpose(0, 3, 1, 2)))
  size = config.model.size
  options = {
    "height": size[0],
    "width": size[1],
    "num_inference_steps": steps,
    "guidance_scale": guidance,
    "max_sequence_length": config.model.text_length,
    "latents": pipe._pack_latents(noise, *noise.shape),
  }
  prompts = [PROMPTS[owner] for owner in owners]
  packed = pipe(prompts, output_type="latent", **options).images
  theirs = pipe._unpack_latents(packed, *size, pipe.vae_scale_factor).numpy().transpose(0, 2, 3, 1)
  return ours, (
    theirs,
    pipe(prompts, output_type="np", **options).images,
    pipe.encode_prompt(list(PROMPTS[:2]), None, max_sequence_length=config.model.text_length),
  )


def check(ours, theirs) -> None:
  """Checks text, latents and pixels.

  Text is held to the bound of a network, latents to the bound of a trajectory, and pixels to a
  quarter of an 8-bit step.
  """
  text, pooled, _ = (x.detach().numpy() for x in theirs[2])
  errors = (
    relative_error(ours[2]["text"], text),
    relative_error(ours[2]["pooled"], pooled),
    relative_error(ours[0], theirs[0]),
  )
  shift = np.abs(ours[1] - theirs[1]).max()
  print("text {:.1e}, pooled {:.1e}, latents {:.1e}, pixels {:.1e}".format(*errors, shift))
  assert max(errors[:2]) <= 1e-4 and errors[2] <= 1e-3 and shift <= 1 / 1024
  assert np.ptp(theirs[1], axis=0).mean() > 0.05  # different noise gives different images


@pytest.mark.parametrize("scan", [False, True])
def test_guidance_distilled_sampling(dev, scan):
  """30 Euler steps with dynamic shift and embedded guidance."""
  check(*sampled(dev, STEPS, 3.5, model__scan_blocks=scan))


def test_guidance_is_what_the_model_is_told(dev):
  check(*sampled(dev, 4, 1.0))


def test_the_shipped_model():
  """assets/emoji-flux, which diffusers loads as it is."""
  check(
    *sampled(ROOT / "assets" / "emoji-flux", 20, 3.5, model__size=(32, 32), model__text_length=12)
  )


def test_few_steps_without_guidance(schnell):
  check(*sampled(schnell, 4, 3.5))


def test_an_own_shift_instead_of_the_schedulers(dev):
  """sampler.shift = 3 is diffusers' constant shift."""
  theirs = FlowMatchEulerDiscreteScheduler.from_config(FLOW | {"use_dynamic_shifting": False})
  theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 16, 16))
  ours = loading.build_pipeline(flux_config(dev)).schedule(16, 3.0)
  np.testing.assert_allclose(ours.sigma, theirs.sigmas.numpy(), atol=1e-6)
  np.testing.assert_allclose(ours.model_time[:-1], theirs.timesteps.numpy(), rtol=1e-6)


@pytest.mark.parametrize("size", [(256, 256), (1024, 1024), (720, 1280)])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_shift_by_resolution(size, kind):
  """The grids that diffusers makes for FLUX.1-dev at these sizes."""
  config, tokens = FLOW | {"time_shift_type": kind}, size[0] // 16 * (size[1] // 16)
  theirs = FlowMatchEulerDiscreteScheduler.from_config(config)
  theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 50, 50), mu=calculate_shift(tokens))
  k = flow_match.scheduler_shift(flow_match.read_scheduler(config), tokens)
  ours = flow_match.schedules.flow_schedule(50, k)
  np.testing.assert_allclose(ours.sigma, theirs.sigmas.numpy(), atol=1e-6)
  np.testing.assert_allclose(ours.model_time[:-1], theirs.timesteps.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"model__size": (36, 32)},
      r"model.size = \(36, 32\): height and width must be multiples of 8",
    ),
    (
      {"model__frozen_dtype": "float16"},
      "model.frozen_dtype = 'float16': T5's activations overflow it; use 'bfloat16'",
    ),
  ],
)
def test_mistakes_of_the_config(dev, changes, message):
  with pytest.raises(ConfigError, match=message):
    loading.build_pipeline(flux_config(dev, **changes))


@pytest.mark.parametrize(
  "file, change, message",
  [
    (
      "transformer/config.json",
      {"joint_attention_dim": 20},
      "joint_attention_dim 20 is not T5's d_model 24",
    ),
    (
      "transformer/config.json",
      {"in_channels": 64},
      "in_channels / 4 16 is not the autoencoder's latent_channels 4",
    ),
    (
      "scheduler/scheduler_config.json",
      {"use_karras_sigmas": True},
      "has what is not implemented: use_karras_sigmas = True",
    ),
    ("scheduler/scheduler_config.json", {"time_shift_type": "cubic"}, "time_shift_type is 'cubic'"),
  ],
)
def test_mistakes_of_the_folder(dev, file, change, message):
  jsons = {key: json.loads((dev / path).read_text()) for key, path in flux.FILES.items()}
  tokenizers = {
    "tokenizer": load_tokenizer(str(dev / "tokenizer")),
    "tokenizer_2": load_t5_tokenizer(str(dev / "tokenizer_2")),
  }
  name = next(key for key, value in flux.FILES.items() if value == file)
  with pytest.raises(ValueError, match=message):
    flux.build(
      jsons | {name: jsons[name] | change},
      tokenizers,
      ModelSettings(size=SIZE, dtype="float32", frozen_dtype="float32"),
      text_length=8,
      guidance=3.5,
    )


def test_a_folder_without_its_t5_tokenizer(dev, tmp_path):
  (tmp_path / "folder").mkdir()
  for path in dev.iterdir():
    if path.name != "tokenizer_2":
      (tmp_path / "folder" / path.name).symlink_to(path)
  with pytest.raises(
    ConfigError,
    match="the folder lacks tokenizer_2/tokenizer.json, tokenizer_2/tokenizer_config.json",
  ):
    loading.build_pipeline(flux_config(tmp_path / "folder"))
