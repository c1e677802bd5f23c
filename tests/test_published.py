"""Every key of a scheduler_config.json is used, refused or harmless, and the grid is diffusers'."""

import inspect
import json

import numpy as np
import pytest
from tiny_checkpoint import ROOT

from dancegrpo_jax import published
from dancegrpo_jax.pipelines import flow_match, stable_diffusion
from dancegrpo_jax.pipelines.stable_diffusion import _schedule as sd_schedule
from dancegrpo_jax.pipelines.stable_diffusion import read_scheduler

diffusers = pytest.importorskip("diffusers")

EMOJI = json.loads((ROOT / "assets/emoji-sd/scheduler/scheduler_config.json").read_text())
KEYS = published.Keys(used={"a": 1, "_kind": "x"}, neutral={"b": (None, 2)}, harmless={"c": "why"})
# Schedulers of diffusion models that a Stable Diffusion folder may name.
CLASSES = (
  "DDIMScheduler",
  "PNDMScheduler",
  "DDPMScheduler",
  "EulerDiscreteScheduler",
  "EulerAncestralDiscreteScheduler",
  "DPMSolverMultistepScheduler",
  "DPMSolverSinglestepScheduler",
  "UniPCMultistepScheduler",
  "DEISMultistepScheduler",
  "HeunDiscreteScheduler",
  "LMSDiscreteScheduler",
  "KDPM2DiscreteScheduler",
  "LCMScheduler",
)


def test_reading():
  with pytest.raises(ValueError, match="^file lacks b, c$"):
    published.read("file", {"a": 1}, published.Keys(used=dict.fromkeys("abc", published.REQUIRED)))
  assert published.read("file", {"b": None, "c": 5, "_note": 1}, KEYS) == {"a": 1, "_kind": "x"}
  assert published.read("file", {"a": 3, "_kind": "y", "b": 2}, KEYS) == {"a": 3, "_kind": "y"}
  assert published.read("file", {"off": None}, KEYS) == {"a": 1, "_kind": "x"}
  with pytest.raises(ValueError) as caught:
    published.read("folder/file.json", {"a": True, "b": 3, "d": [1], "c": 0}, KEYS)
  assert str(caught.value) == (
    "folder/file.json has what is not implemented: a = True (implemented: an integer); b = 3"
    " (implemented: None or 2); d = [1] (an unknown key)"
  )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CLASSES)
def test_what_diffusers_saves_is_read(name, tmp_path):
  """Each scheduler with its defaults and this project's chain, as save_pretrained writes it."""
  scheduler = getattr(diffusers, name).from_config(
    {key: value for key, value in EMOJI.items() if key != "_class_name"}
  )
  scheduler.save_pretrained(tmp_path)
  given = json.loads((tmp_path / "scheduler_config.json").read_text())
  assert given["_class_name"] == name and len(given) > 8
  assert read_scheduler(given)["beta_end"] == EMOJI["beta_end"]


@pytest.mark.parametrize(
  "keys, scheduler",
  [
    (stable_diffusion.SCHEDULER, "DDIMScheduler"),
    (flow_match.SCHEDULER, "FlowMatchEulerDiscreteScheduler"),
  ],
)
def test_defaults_are_diffusers(keys, scheduler):
  """Of the keys that are used; and a default of diffusers is never refused."""
  parameters = inspect.signature(getattr(diffusers, scheduler).__init__).parameters
  theirs = {name: p.default for name, p in parameters.items() if name != "self"}
  used = {name: value for name, value in keys.used.items() if name != "_class_name"}
  assert used == {name: theirs[name] for name in used}
  published.read("file", theirs, keys)
  assert keys.used["_class_name"] == scheduler


GRIDS = {
  "defaults": {},
  "the emoji model": EMOJI,
  "zero terminal SNR": EMOJI
  | {
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
  },
  "zero terminal SNR, leading": {
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "beta_schedule": "scaled_linear",
  },
  "linspace": EMOJI | {"timestep_spacing": "linspace"},
  "cosine": {"beta_schedule": "squaredcos_cap_v2", "steps_offset": 3},
  "a short chain": {"num_train_timesteps": 200, "beta_end": 0.05},
}


@pytest.mark.parametrize("steps", [1, 7, 8, 50])
@pytest.mark.parametrize("name", GRIDS)
def test_the_grid_is_that_of_diffusers(name, steps):
  given = GRIDS[name]
  theirs = diffusers.DDIMScheduler.from_config(given)
  theirs.set_timesteps(steps)
  times = theirs.timesteps.numpy()
  alpha_bar = theirs.alphas_cumprod.double().numpy()[times]
  ours = sd_schedule(read_scheduler(given), steps, 0.0)
  np.testing.assert_array_equal(ours.model_time[:-1], times)
  np.testing.assert_allclose(ours.alpha[:-1], np.sqrt(alpha_bar), atol=2e-5)
  np.testing.assert_allclose(ours.sigma[:-1], np.sqrt(1 - alpha_bar), atol=2e-5)
  if "zero" in name and "leading" not in name:
    assert ours.alpha[0] == 0 and ours.sigma[0] == 1
  final = float(theirs.final_alpha_cumprod)
  np.testing.assert_allclose(ours.alpha[-1], np.sqrt(final), atol=2e-5)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr needs prediction_type 'v_predic"),
    ({"prediction_type": "sample"}, "prediction_type 'sample' is not one of epsilon, v_prediction"),
    ({"trained_betas": [0.1, 0.2]}, r"trained_betas = \[0.1, 0.2\] \(implemented: None\)"),
    ({"thresholding": True}, r"thresholding = True \(implemented: False\)"),
    ({"use_karras_sigmas": True}, "use_karras_sigmas = True"),
    ({"timestep_spacing": "karras"}, "spacing is 'karras'"),
    ({"my_own_key": 1}, r"my_own_key = 1 \(an unknown key\)"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is of a rectified-flow model"),
  ],
)
def test_what_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    sd_schedule(read_scheduler(EMOJI | changes), 8, 0.0)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"shift_terminal": 0.02}, r"shift_terminal = 0.02 \(implemented: None or False\)"),
    ({"use_karras_sigmas": True}, "use_karras_sigmas = True"),
    ({"my_own_key": 1}, r"my_own_key = 1 \(an unknown key\)"),
    ({"_class_name": "DDIMScheduler"}, "DDIMScheduler is of a diffusion model"),
  ],
)
def test_what_flux_refuses(changes, message):
  with pytest.raises(ValueError, match=message):
    flow_match.read_scheduler(changes)


def test_the_message_is_one_line():
  with pytest.raises(ValueError) as caught:
    read_scheduler({"one": 1, "two": 2})
  assert "\n" not in str(caught.value) and "one = 1" in str(caught.value)
