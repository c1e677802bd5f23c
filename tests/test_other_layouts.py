"""Files in the layouts of other programs become the same tensors as diffusers' own converters make
of them: names and shapes of the published networks, and random values.
"""

import gzip
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from dancegrpo_jax.checkpoints.networks import TABLES
from dancegrpo_jax.conversion.mapping import plan
from dancegrpo_jax.conversion.table import Spec, expected_sources
from dancegrpo_jax.conversion.transfer import import_tree

with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  import torch
  from diffusers.loaders import single_file_utils

FIXTURES = Path(__file__).parent / "fixtures" / "tensors"
F32 = np.dtype(np.float32)


def published(name: str) -> dict[str, Spec]:
  """The tensors of a published network, each with one input channel: that is enough to tell the
  outputs of layers apart, and small.
  """
  with gzip.open(FIXTURES / f"{name}.tsv.gz", "rt") as lines:
    pairs = [line.rstrip("\n").split("\t") for line in lines]
  shapes = {tensor: json.loads(shape) for tensor, shape in pairs}
  return {
    tensor: Spec((shape[0], *([1] * (len(shape) - 1))), F32) for tensor, shape in shapes.items()
  }


def drawn(specs: dict[str, Spec]) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {name: rng.standard_normal(spec.shape, np.float32) for name, spec in specs.items()}


def converted(table: str, own: dict[str, Spec], prefix: str = "") -> tuple[dict, dict]:
  """A file in the other layout of a network, and the tensors that its table makes of it."""
  dialect = TABLES[table].dialects[0].table(own)
  file = drawn(expected_sources(dialect, own))
  mapping = plan(dialect, {name: Spec(x.shape, F32) for name, x in file.items()}, own)
  ours = import_tree(mapping, lambda name, index: file[name][index])
  return {f"{prefix}{name}": torch.tensor(value) for name, value in file.items()}, ours


def assert_same(ours: dict[str, np.ndarray], theirs: dict) -> None:
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    np.testing.assert_array_equal(value, theirs[name].numpy(), err_msg=name)


@pytest.mark.parametrize("name", ["sd14-unet", "sd21-unet"])
def test_the_first_releases_unet(name):
  config = json.loads((FIXTURES / f"{name}.json").read_text())
  file, ours = converted("UNet2DConditionModel", published(name), "model.diffusion_model.")
  assert len(file) == 686
  assert_same(ours, single_file_utils.convert_ldm_unet_checkpoint(file, config))


@pytest.mark.parametrize("name", ["sd14-vae", "flux-vae"])
def test_the_first_releases_autoencoder(name):
  """FLUX's has no 1x1 convolutions around the latents."""
  config = json.loads((FIXTURES / f"{name}.json").read_text())
  file, ours = converted("AutoencoderKL", published(name), "first_stage_model.")
  assert_same(ours, single_file_utils.convert_ldm_vae_checkpoint(file, config))


def test_open_clips_text_encoder():
  own = {
    k: v for k, v in published("sd21-text.published").items() if not k.endswith("position_ids")
  }
  prefix = "cond_stage_model.model."
  file, ours = converted("CLIPTextModel", own, prefix)
  more = {
    f"{prefix}text_projection": torch.zeros(1024, 1024),
    f"{prefix}logit_scale": torch.ones(()),
  }
  theirs = single_file_utils.convert_open_clip_checkpoint(None, file | more, prefix)
  theirs.pop("text_projection.weight", None)  # of CLIPTextModelWithProjection
  assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell"])
def test_black_forest_labs_transformer(name):
  """Two blocks of each kind, as wide as the published ones."""
  blocks = ("transformer_blocks.", "single_transformer_blocks.")
  own = {
    tensor: spec
    for tensor, spec in published(name).items()
    if not tensor.startswith(blocks) or int(tensor.split(".")[1]) < 2
  }
  file, ours = converted("FluxTransformer2DModel", own, "model.diffusion_model.")
  assert_same(ours, single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(file))
