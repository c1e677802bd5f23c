"""FLUX through the whole loop, and its export.

A short run with stacked, rematerialised and sharded blocks.
"""

import json

import jax
import numpy as np
import pytest
from tiny_checkpoint import relative_error, tiny_config, write_flux

from dancegrpo_jax import train
from dancegrpo_jax.assembly import loading, sampling
from dancegrpo_jax.checkpoints import chosen
from dancegrpo_jax.convert import folders
from dancegrpo_jax.devices import sharding


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(config, workdir) after two iterations on 4 x 2 devices.

  The blocks' kernels are split along their last axis.
  """
  folder = write_flux(tmp_path_factory.mktemp("flux") / "base")
  config = tiny_config(
    None,
    model__family="flux",
    model__checkpoint=str(folder),
    model__text_length=8,
    model__scan_blocks=True,
    model__remat=True,
    sampler__kind="flow",
    sampler__shift=0.0,
    sampler__noise_level=0.7,
    reward__terms=(("compressibility", 1.0),),
    iterations=2,
    mesh__data=4,
    mesh__fsdp=2,
    optimizer__updates_per_iteration=2,
    optimizer__microbatch=8,
    optimizer__learning_rate=1e-4,
    evaluation__every=0,
    mesh__rules=(("denoiser/.*transformer_blocks/.*kernel", (None, None, "fsdp")), (".*", ())),
  )
  workdir = tmp_path_factory.mktemp("run") / "flux"
  train.run(config, workdir)
  return config, workdir


def restored(config, workdir) -> tuple:
  """(trained weights, base weights)."""
  pipeline, mesh = loading.build_pipeline(config), sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    model = loading.load(config, pipeline, {}, mesh)
    return sampling.restore(config, model, chosen.find(str(workdir))), model.trainable


def test_the_first_ratio_is_one_and_the_weights_move(run):
  config, workdir = run
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert len(rows) == 2 and all(
    np.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in rows
  )
  assert all(
    row["reward/failed"] == 0 and row["reward/std"] > 0 and row["ratio/drift_max"] == 0
    for row in rows
  )
  trained, base = restored(config, workdir)
  kernel = base["denoiser"]["transformer_blocks"]["attn"]["to_q"]["kernel"]
  assert kernel.shape == (2, 16, 16) and kernel.sharding.spec == jax.P(None, None, "fsdp")
  assert 0 < relative_error(trained, base) < 0.1
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(trained), jax.tree.leaves(base), strict=True
  ):
    assert not np.array_equal(a, b), path


def test_export_loads_in_diffusers(run, tmp_path):
  from diffusers import FluxPipeline, FluxTransformer2DModel

  config, workdir = run
  folders.export(config, str(workdir), tmp_path / "out", "pipeline", "")
  network, info = FluxTransformer2DModel.from_pretrained(
    tmp_path / "out" / "transformer", output_loading_info=True
  )
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
  trained, _ = restored(config, workdir)
  stacked = trained["denoiser"]["single_transformer_blocks"]["proj_mlp"]["kernel"]
  for i, block in enumerate(network.single_transformer_blocks):
    np.testing.assert_array_equal(block.proj_mlp.weight.detach().numpy().T, stacked[i])
  pipe = FluxPipeline.from_pretrained(tmp_path / "out")
  assert (
    type(pipe.tokenizer_2).__name__ == "T5Tokenizer" and pipe.scheduler.config.use_dynamic_shifting
  )
