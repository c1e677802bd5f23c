"""HunyuanVideo's transformer at its published size against diffusers, with random weights.

All 12.8 billion parameters are written in bfloat16 in the published layout of files, 25.6 GB. They
need not fit in memory: both networks run their own forward pass, and each of its parts, as a block,
reads its weights when it is called and frees them afterwards. That takes a quarter of an hour on
two busy cores, 26 GB in the folder of temporary files (TMPDIR), and 8 GiB of memory. The numbers
are printed with

    python -m pytest -o addopts= -m full_size tests/parity/test_full_size_video.py -s

test_hunyuan_video.py has the same test at reduced width, in one piece.
"""

import functools
import json
import math
import re
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import test_tables
import torch
from diffusers import HunyuanVideoTransformer3DModel
from flax.traverse_util import unflatten_dict
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from test_hunyuan_video import SMALL, ours_in, their_output
from torch_parity import error

from dancegrpo_jax.checkpoints import weights
from dancegrpo_jax.checkpoints.reading import open_reader, planned, specs
from dancegrpo_jax.checkpoints.safetensors_io import write
from dancegrpo_jax.conversion.mapping import Mapping
from dancegrpo_jax.conversion.table import Spec
from dancegrpo_jax.conversion.tables.hunyuan_video import HUNYUAN_VIDEO
from dancegrpo_jax.conversion.transfer import import_slice
from dancegrpo_jax.models import hunyuan_video
from dancegrpo_jax.pipelines.networks import abstract_hunyuan_video

pytestmark = pytest.mark.full_size
PUBLISHED = test_tables.config("hunyuan-video")
INDEX = "diffusion_pytorch_model.safetensors.index.json"
BF16 = np.dtype(ml_dtypes.bfloat16)
POOL = 2**25  # random numbers, from which all tensors are cut
STEP = 26_539  # a prime: the cuts of 1264 tensors begin at different places of the pool

Inputs = tuple[torch.Tensor, ...]
Read = Callable[[str], dict]  # the name of a part -> its parameters


# ---- The files


@functools.cache
def pool() -> np.ndarray:
  return np.random.default_rng(0).standard_normal(POOL, np.float32)


@functools.cache
def scaled_pool(scale: float, mean: float) -> np.ndarray:
  return (mean + scale * pool()).astype(BF16)


def drawn(name: str, shape: tuple[int, ...], number: int) -> np.ndarray:
  """A tensor that differs from all others, and starts neither at 0 nor at 1.

  Matrices and kernels keep the variance of what passes through, scales are near 1, biases near 0.
  """
  if len(shape) > 1:
    numbers = scaled_pool(math.prod(shape[1:]) ** -0.5, 0.0)
  else:
    numbers = scaled_pool(0.1, float(name.endswith("weight")))
  start, size = STEP * number % POOL, math.prod(shape)
  if start + size > POOL:  # it goes on at the pool's start
    numbers = np.resize(numbers, start + size)
  return numbers[start : start + size].reshape(shape)


def write_checkpoint(folder: Path, config: dict, shard_size: str) -> None:
  """A network's folder in diffusers' layout, with diffusers' names and in shards as they cut them,
  drawn in bfloat16.
  """
  state = {name: value.bfloat16() for name, value in empty(config).state_dict().items()}
  pattern = "diffusion_pytorch_model{suffix}.safetensors"
  shards = split_torch_state_dict_into_shards(
    state, filename_pattern=pattern, max_shard_size=shard_size
  )
  numbers = {name: number for number, name in enumerate(state)}
  for file, names in shards.filename_to_tensors.items():
    content = {name: Spec(tuple(state[name].shape), BF16) for name in names}
    write(folder / file, content, lambda name: drawn(name, state[name].shape, numbers[name]))
  index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
  (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
  (folder / "config.json").write_text(json.dumps(config))


# ---- Our network


@functools.partial(jax.jit, static_argnums=0)
def call_part(part: nn.Module, params: dict, arguments: tuple):
  return part.apply({"params": params}, *arguments)


def our_velocity(
  network: hunyuan_video.HunyuanVideoTransformer3DModel, read: Read, arguments: tuple
) -> np.ndarray:
  """The network's own forward pass, in which every direct part of the network is a compiled call
  with the parameters that `read` gives for the part's name.
  """

  def call(next_call, args, kwargs, context):
    if not isinstance(context.module.parent, hunyuan_video.HunyuanVideoTransformer3DModel):
      return next_call(*args, **kwargs)
    assert context.method_name == "__call__" and not kwargs
    part, params = context.module.clone(parent=None, name=None), read(context.module.name)
    # Without the wait, the parameters of the next parts would be read while this one runs.
    return jax.block_until_ready(call_part(part, params, args))

  with nn.intercept_methods(call), jax.default_matmul_precision("highest"):
    return np.asarray(network.apply({}, *map(jnp.asarray, arguments)))


def read_parameter(
  path: str, spec: Spec, stacked: Mapping, read: Callable[..., np.ndarray]
) -> jax.Array:
  """A parameter of a network whose blocks are apart, from the files as a run reads them: of blocks
  that are stacked on axis 0, the slice of one block.
  """
  numbers = re.findall(r"blocks_(\d+)/", path)
  index = tuple(slice(int(number), int(number) + 1) for number in numbers)
  index += tuple(slice(0, size) for size in spec.shape)
  together = re.sub(r"blocks_\d+/", "blocks/", path)
  value = import_slice(stacked, together, index, read, spec.dtype)
  return jax.device_put(value.reshape(spec.shape))


def velocity_from(folder: Path, inputs: Inputs, dtype: jnp.dtype) -> np.ndarray:
  """Our velocity, with the parameters and the computation in one dtype."""
  config = weights.read_config(folder)
  network = hunyuan_video.from_json(config, dtype=dtype, param_dtype=dtype)
  abstract = abstract_hunyuan_video(network.clone(scan_blocks=True))
  targets, already_read = specs(abstract_hunyuan_video(network)), set()
  with open_reader(folder, stem=HUNYUAN_VIDEO.file) as reader:
    tensors, stacked = planned(folder, HUNYUAN_VIDEO, reader, abstract)

    def read(part: str) -> dict:
      wanted = {path: spec for path, spec in targets.items() if path.startswith(f"{part}/")}
      already_read.update(wanted)
      params = {
        path.removeprefix(f"{part}/"): read_parameter(path, spec, stacked, tensors.read)
        for path, spec in wanted.items()
      }
      return unflatten_dict(params, sep="/")

    velocity = our_velocity(network, read, ours_in(*inputs))
  assert already_read == set(targets)
  return velocity.astype(np.float32)


# ---- The reference


def empty(config: dict) -> HunyuanVideoTransformer3DModel:
  """The reference's network without values."""
  with torch.device("meta"):
    network = HunyuanVideoTransformer3DModel.from_config(config)
  assert not list(network.buffers())  # they would stay without values
  return network.eval()


def parts_of(network: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
  """The direct parts of a network by name; of a list of blocks, the blocks."""
  for name, part in network.named_children():
    if isinstance(part, torch.nn.ModuleList):
      yield from ((f"{name}.{k}", block) for k, block in part.named_children())
    else:
      yield name, part


def their_velocity(folder: Path, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
  """The velocity of the reference's own forward pass, with all in one dtype, in float32."""
  network = empty(json.loads((folder / "config.json").read_text()))
  files = json.loads((folder / INDEX).read_text())["weight_map"]

  def tensor(name: str) -> torch.Tensor:
    with safe_open(folder / files[name], "pt") as file:
      return file.get_tensor(name).to(dtype, copy=True)  # not the file's memory

  def fill(name: str, part: torch.nn.Module) -> None:
    state = {key: tensor(f"{name}.{key}") for key in part.state_dict()}
    part.load_state_dict(state, assign=True)

  for name, part in parts_of(network):
    part.register_forward_pre_hook(lambda part, _, name=name: fill(name, part))
    part.register_forward_hook(lambda part, *_: part.to("meta") and None)
  latents, model_time, text, lengths, pooled, guidance = inputs
  latents, text, pooled = (x.to(dtype) for x in (latents, text, pooled))
  return their_output(network, latents, model_time, text, lengths, pooled, guidance).float()


# ---- The tests


def inputs_of(config: dict) -> Inputs:
  """5 frames of 64x64 pixels, a text of 5 states in a row of 8, and a time that is no integer.

  Everything is representable in bfloat16 except for the time and the guidance.
  """
  generator = torch.Generator().manual_seed(0)
  channels, width = config["in_channels"], config["text_embed_dim"]
  shapes = (1, channels, 2, 8, 8), (1, 8, width), (1, config["pooled_projection_dim"])
  latents, text, pooled = (
    torch.randn(shape, generator=generator).bfloat16().float() for shape in shapes
  )
  return latents, torch.tensor([731.5]), text, torch.tensor([5]), pooled, torch.tensor([6.016])


class Cost(NamedTuple):
  """What a pass took.

  Attributes:
    seconds: by the clock.
    gib: the largest resident memory of the process since its start.
  """

  seconds: float
  gib: float


def costed(function: Callable, *arguments) -> tuple:
  """(what a function returns, what it took)."""
  start = time.perf_counter()
  result = function(*arguments)
  gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  return result, Cost(seconds=time.perf_counter() - start, gib=gib)


def test_parts_are_the_whole_network(tmp_path):
  """A small network by parts, against the same network in one piece: not a bit differs."""
  config = SMALL | {"num_layers": 2, "num_single_layers": 3, "num_refiner_layers": 2}
  write_checkpoint(tmp_path, config, "30KB")
  assert len(list(tmp_path.glob("*.safetensors"))) > 3
  inputs, network = inputs_of(config), hunyuan_video.from_json(config)
  params = weights.load(tmp_path, HUNYUAN_VIDEO, abstract_hunyuan_video(network))
  with jax.disable_jit(), jax.default_matmul_precision("highest"):
    by_parts = velocity_from(tmp_path, inputs, jnp.float32)
    whole = network.apply({"params": params}, *map(jnp.asarray, ours_in(*inputs)))
  np.testing.assert_array_equal(by_parts, whole)
  theirs = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path)
  wanted = their_output(theirs, *inputs)
  np.testing.assert_array_equal(their_velocity(tmp_path, inputs, torch.float32), wanted)
  assert error(by_parts, wanted) <= 5e-5


def test_transformer(scratch, measured):
  """One forward pass in float32 and one in bfloat16, of the same bfloat16 weights.

  The reference's own pass in bfloat16 says how far round-off alone takes one from float32.
  """
  _, written = costed(write_checkpoint, scratch, PUBLISHED, "5GB")
  # The published index has this length, and 6 shards give the files' published length.
  assert len((scratch / INDEX).read_text()) == 133_108
  with open_reader(scratch, stem=HUNYUAN_VIDEO.file) as reader:
    shapes = {name: spec.shape for name, spec in reader.specs.items()}
  inventory = test_tables.inventory("hunyuan-video")
  assert shapes == {name: spec.shape for name, spec in inventory.items()}
  assert sum(map(math.prod, shapes.values())) == 12_821_012_544

  inputs = inputs_of(PUBLISHED)
  half, of_half = costed(velocity_from, scratch, inputs, jnp.bfloat16)
  full, of_full = costed(velocity_from, scratch, inputs, jnp.float32)
  wanted, of_wanted = costed(their_velocity, scratch, inputs, torch.float32)
  their_half, of_their_half = costed(their_velocity, scratch, inputs, torch.bfloat16)
  measured("float32 against float32", error(full, wanted), 1e-4)
  measured("bfloat16 against float32", error(half, wanted), 0.03)
  measured("diffusers' bfloat16 against float32", error(their_half.numpy(), wanted), 0.03)
  for name, cost in {
    "files": written,
    "bfloat16": of_half,
    "float32": of_full,
    "diffusers' float32": of_wanted,
    "diffusers' bfloat16": of_their_half,
  }.items():
    measured(f"{name}, seconds", cost.seconds, math.inf)
    measured(f"{name}, GiB of memory at most since the start", cost.gib, 9.0)
