"""What the compiled update sends between devices.

It sends kernels block by block, but never samples, trajectories or optimizer state.
"""

import importlib.util
import re
from math import prod

import jax
import pytest
from golden_specs import ROOT

from dancegrpo_jax.compilation import inventory
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.plan import hlo, topologies
from dancegrpo_jax.settings import config_file


def tiny_flux(devices: list) -> tuple[inventory.Inventory, jax.sharding.Mesh]:
  """FLUX's rules and scanned, rematerialised blocks, on a tiny network split over 8 devices."""
  whole = config_file.load(str(ROOT / "configs" / "flux_hps.py"))
  words = [
    "mesh.data=1",
    "mesh.fsdp=8",
    "model.remat=True",
    "model.scan_blocks=True",
    "optimizer.updates_per_iteration=2",  # so that all programs of an update are there
    "optimizer.microbatch=8",
  ]
  config = config_file.load(
    f"{ROOT / 'configs' / 'flux_hps.py'}:tiny", [*words, f"mesh.rules={whole.mesh.rules}"]
  )
  config = inventory.without_weights(config)
  mesh = sharding.make_mesh(config.mesh, devices)
  return inventory.take(config, mesh, 400, 100), mesh


def compiled_update(
  taken: inventory.Inventory, mesh: jax.sharding.Mesh
) -> tuple[hlo.Summary, list]:
  """The collectives of all its programs, and (shape, sharding) of the returned optimizer state."""
  found, returned = hlo.Summary([], 0.0, 0, {}), []
  for call in taken.calls:
    if call.name.startswith("update "):
      with jax.set_mesh(mesh):
        compiled = call.program.lower(*call.arguments).compile()
      summary = hlo.summary(compiled.as_text(), call.turns)
      collectives = [*found.collectives, *summary.collectives]
      found = found._replace(collectives=collectives, unknown=found.unknown + summary.unknown)
    if call.name == "update step":
      shapes = [leaf.shape for leaf in jax.tree.leaves(call.arguments[0].opt_state)]
      returned = jax.tree.leaves(compiled.output_shardings[0].opt_state)
  return found, list(zip(shapes, returned, strict=True))


def gathered(summary: hlo.Summary) -> list[hlo.Collective]:
  """Collectives that gather pieces of other devices: all-gathers and all-to-alls."""
  return [
    c for c in summary.collectives if c.opcode in ("all-gather", "all-to-all", "ragged-all-to-all")
  ]


def collecting(summary: hlo.Summary) -> list[hlo.Collective]:
  """`gathered`, and all-reduces.

  Between many TPUs an all-gather becomes an all-reduce with zeros.
  """
  return gathered(summary) + [c for c in summary.collectives if c.opcode == "all-reduce"]


def largest_block(model) -> int:
  """Number of parameters in the denoiser's largest block. Layers are stacked along axis 0."""
  trained = model.trainable["denoiser"]
  names = ("transformer_blocks", "single_transformer_blocks")
  return max(
    sum(leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(trained[name])) for name in names
  )


def unordered(shape: tuple[int, ...]) -> tuple[int, ...]:
  """A shape without its axes of length 1 and without the order of the others."""
  return tuple(sorted(n for n in shape if n > 1))


def parameter_shapes(tree) -> set[tuple[int, ...]]:
  """`unordered` shapes of all parameters, and of one layer of those that are stacked."""
  shapes = {leaf.shape for leaf in jax.tree.leaves(tree)}
  return {unordered(shape) for shape in shapes | {shape[1:] for shape in shapes}}


def is_parameter(dims: str, known: set[tuple[int, ...]]) -> bool:
  """Whether a shape is one of the parameters' shapes.

  Two neighbouring axes may be merged into one, such as devices and the piece of each device.
  """
  shape = tuple(map(int, dims.split(",")))
  joined = [(*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :]) for i in range(len(shape) - 1)]
  return any(unordered(form) in known for form in (shape, *joined))


def check(
  summary: hlo.Summary, optimizer: list, taken: inventory.Inventory, share: float = 0.05
) -> None:
  """The assertions, for any compiler.

  `share` of the optimizer's state may be whole on every device: norms, biases, and the first and
  last layers.
  """
  collected = collecting(summary)
  assert collected and summary.unknown == 0
  # Of several arrays that are sent at once, the largest.
  largest = max(collected, key=lambda c: hlo.largest(c.shape))
  assert hlo.largest(largest.shape) <= 4 * largest_block(taken.model), largest
  # All arrays as large as a sample's latents have the shape of a parameter or its gradient, so that
  # none is a trajectory, however it is packed.
  sample = prod(taken.kept["trajectories"][0].sample.shape[1:])
  known = parameter_shapes(taken.model.trainable)
  for c in collected:
    for dims in re.findall(r"[a-z]+\d+\[([\d,]+)\]", c.shape):
      assert prod(map(int, dims.split(","))) < sample or is_parameter(dims, known), c
  whole = sum(prod(shape) for shape, sharding in optimizer if sharding.is_fully_replicated)
  assert whole < share * sum(prod(shape) for shape, _ in optimizer)


def test_the_update_gathers_kernels_alone():
  """On 8 CPU devices; the next test does the same with the TPU compiler."""
  taken, mesh = tiny_flux(jax.devices())
  summary, optimizer = compiled_update(taken, mesh)
  check(summary, optimizer, taken)
  known = parameter_shapes(taken.model.trainable)
  for c in gathered(summary):  # also the small ones
    (dims,) = re.findall(r"[a-z]+\d+\[([\d,]+)\]", c.shape)
    assert is_parameter(dims, known), c
  sample = prod(taken.kept["trajectories"][0].sample.shape[1:])
  packed = hlo.Collective("all-gather", f"bf16[3,{sample}]", 0, 1.0, "")  # the check would find it
  with pytest.raises(AssertionError, match="bf16"):
    check(summary._replace(collectives=[*summary.collectives, packed]), optimizer, taken)


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed (requirements-tpu.txt)",
)
def test_the_tpu_compiler_gathers_no_trajectories():
  taken, mesh = tiny_flux(topologies.devices("v5e:2x4"))
  check(*compiled_update(taken, mesh), taken)


@pytest.mark.full_size
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed (requirements-tpu.txt)",
)
@pytest.mark.parametrize("topology", ["v6e:8x8", "v5p:4x4x4"])
def test_the_published_recipe_gathers_blocks_alone(topology):
  """All weights of FLUX.1-dev are trained, on 64 chips. Compiling takes minutes."""
  devices = topologies.devices(topology)
  config = inventory.without_weights(config_file.load(str(ROOT / "configs" / "flux_hps.py")))
  mesh = sharding.make_mesh(config.mesh, devices)
  taken = inventory.take(config, mesh, 400, 100)
  check(*compiled_update(taken, mesh), taken, share=0.01)
