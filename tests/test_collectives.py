"""What the compiled update sends between devices: kernels block by block, never samples, trajectories or optimizer state."""

import importlib.util
import re

import jax
import pytest
from golden_specs import ROOT

from dancegrpo_jax import inventory
from dancegrpo_jax.runtime import config as configs
from dancegrpo_jax.runtime import hlo, topologies
from dancegrpo_jax.runtime import mesh as meshes


def tiny_flux(devices: list) -> tuple[inventory.Inventory, jax.sharding.Mesh]:
  """FLUX's rules, scanned and rematerialised blocks, on a tiny network split over 8 devices."""
  whole = configs.load(str(ROOT / "configs" / "flux_hps.py"))
  words = ["mesh.data=1", "mesh.fsdp=8", "model.remat=True", "model.scan_blocks=True", "optimizer.updates_per_iteration=1"]
  config = configs.load(f"{ROOT / 'configs' / 'flux_hps.py'}:tiny", [*words, f"mesh.rules={whole.mesh.rules}"])
  config = inventory.without_weights(config)
  mesh = meshes.make_mesh(config.mesh, devices)
  return inventory.take(config, mesh, 400, 100), mesh


def compiled_update(taken: inventory.Inventory, mesh: jax.sharding.Mesh) -> hlo.Summary:
  (call,) = (call for call in taken.calls if call.name == "update")
  with jax.set_mesh(mesh):
    return hlo.summary(call.program.lower(*call.arguments).compile().as_text())


def gathered(summary: hlo.Summary) -> list[hlo.Collective]:
  """What collects pieces from other devices: all-gathers and all-to-alls."""
  return [c for c in summary.collectives if c.opcode in ("all-gather", "all-to-all", "ragged-all-to-all")]


def collecting(summary: hlo.Summary) -> list[hlo.Collective]:
  """`gathered`, and what may be the same in another form: between many TPUs an all-gather becomes an all-reduce of zeros."""
  return gathered(summary) + [c for c in summary.collectives if c.opcode == "all-reduce"]


def largest_block(model) -> int:
  """Parameters of the largest block of the denoiser, whose layers are stacked on axis 0."""
  trained = model.trainable["denoiser"]
  names = ("transformer_blocks", "single_transformer_blocks")
  return max(sum(leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(trained[name])) for name in names)


def check(summary: hlo.Summary, taken: inventory.Inventory) -> None:
  """The assertions, for any compiler."""
  collected = collecting(summary)
  assert collected and summary.unknown == 0
  largest = max(collected, key=lambda c: hlo.largest(c.shape))  # of several arrays sent at once, the largest
  assert hlo.largest(largest.shape) <= 4 * largest_block(taken.model), largest
  # of trajectories: their spatial shape, or a whole batch of them flattened, appears in nothing that is collected
  height, width, channels = taken.kept["trajectories"][0].sample.shape[1:]
  for c in collected:
    for _, dims in re.findall(r"([a-z]+\d+)\[([\d,]+)\]", c.shape):
      assert f"{height},{width},{channels}" not in dims and f"{channels},{height},{width}" not in dims, c


def test_the_update_gathers_kernels_alone():
  """On 8 CPU devices; the counterpart of the test below."""
  taken, mesh = tiny_flux(jax.devices())
  summary = compiled_update(taken, mesh)
  check(summary, taken)
  kernels = {leaf.shape[1:] for leaf in jax.tree.leaves(taken.model.trainable) if len(leaf.shape) == 3}
  kernels |= {leaf.shape for leaf in jax.tree.leaves(taken.model.trainable) if len(leaf.shape) < 3}
  biases = {shape[1:] for shape in {leaf.shape for leaf in jax.tree.leaves(taken.model.trainable)} if len(shape) == 2}
  for c in gathered(summary):
    (dims,) = re.findall(r"[a-z]+\d+\[([\d,]+)\]", c.shape)
    shape = tuple(map(int, dims.split(",")))
    assert shape in kernels | biases or shape[::-1] in kernels, c
  optimizer = jax.tree.leaves(taken.kept["optimizer"])
  split = [leaf for leaf in optimizer if not leaf.sharding.is_fully_replicated]
  assert sum(leaf.size for leaf in split) > 0.9 * sum(leaf.size for leaf in optimizer)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (requirements-tpu.txt)")
def test_the_tpu_compiler_gathers_no_trajectories():
  taken, mesh = tiny_flux(topologies.devices("v5e:2x4"))
  check(compiled_update(taken, mesh), taken)


@pytest.mark.full_size
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (requirements-tpu.txt)")
@pytest.mark.parametrize("words, topology", [((), "v6e:8x8"), (("optimizer.microbatch=64",), "v5p:4x4x4")])
def test_the_published_recipe_gathers_blocks_alone(words, topology):
  """FLUX.1-dev, every weight trained, on 64 chips: minutes of compiling."""
  devices = topologies.devices(topology)
  config = inventory.without_weights(configs.load(str(ROOT / "configs" / "flux_hps.py"), list(words)))
  mesh = meshes.make_mesh(config.mesh, devices)
  taken = inventory.take(config, mesh, 400, 100)
  check(compiled_update(taken, mesh), taken)
  optimizer = jax.tree.leaves(taken.kept["optimizer"])
  whole = sum(inventory.device_bytes(leaf) for leaf in optimizer if leaf.sharding.is_fully_replicated)
  assert whole < 0.01 * sum(map(inventory.device_bytes, optimizer))
