"""NVIDIA GPUs that programs are compiled for on a machine without one: XLA is told in text what it
would ask the card.

The compiler is the one in JAX's CUDA plugin, which needs neither a driver nor a card. It can't try
kernels out, so that the choice among several, and the memory that a convolution works in, may be
others on a card.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import jax

from dancegrpo_jax.errors import ConfigError

CUDNN = 91900  # the version that JAX is told of, 9.19


class Card(NamedTuple):
  """A kind of GPU.

  Attributes:
    kind: JAX's device_kind of it.
    capability: compute capability.
    cores: streaming multiprocessors.
    memory: bytes.
    bandwidth: of its memory, bytes/s.
    cache: bytes of its second-level cache.
    clock: GHz.
  """

  kind: str
  capability: tuple[int, int]
  cores: int
  memory: int
  bandwidth: int
  cache: int
  clock: float


# What XLA reads off such a card, and writes into a topology's target_config.
CARDS = {
  "h100": Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 84929347584, 3352320000000, 52428800, 1.98)
}


def devices(card: str, count: int) -> list[jax.Device]:
  """`count` GPUs of one machine. They can be compiled for and hold no data.

  From then on JAX believes in this process that its driver knows such a card.

  Raises:
    ConfigError: JAX's CUDA plugin is not installed.
  """
  if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
    remedy = f"pip install 'jax[cuda13]=={jax.__version__}'"
    raise ConfigError(f"--topology={card}:{count}: needs the compiler for NVIDIA GPUs; {remedy}")
  from jax._src.cudnn import fused_attention_stablehlo
  from jax.experimental import topologies

  for name, answer in driver_answers(CARDS[card].capability).items():
    setattr(fused_attention_stablehlo, name, answer)
  description = topologies.get_topology_desc(
    platform="cuda",
    topology_name=card,
    target_config=target_config(CARDS[card]),
    topology=f"1x1x{count}",
  )
  return list(description.devices)


def driver_answers(capability: tuple[int, int]) -> dict[str, Callable]:
  """What JAX's attention asks of the driver, answered for a card with this compute capability.

  Returns:
    By name, functions for the module `jax._src.cudnn.fused_attention_stablehlo`.
  """

  def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))

  return {
    "check_cudnn_version": lambda: CUDNN,
    "check_compute_capability": lambda least: capability >= numbers(least),
    "is_cuda_compute_capability_equal": lambda other: capability == numbers(other),
  }


def target_config(card: Card) -> str:
  """A card as XLA's GpuTargetConfigProto in text. What isn't the card's own is the same for compute
  capability 9.0 at large: https://docs.nvidia.com/cuda/cuda-c-programming-guide, appendix on
  compute capabilities.
  """
  major, minor = card.capability
  return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {card.cores}
  device_memory_size: {card.memory}
  memory_bandwidth: {card.bandwidth}
  l2_cache_size: {card.cache}
  clock_rate_ghz: {card.clock}
  fpus_per_core: 128
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
runtime_version {{ major: 13 minor: 0 }}
dnn_version_info {{ major: 9 minor: 19 }}
platform_name: "CUDA"
device_description_str: "{card.kind}"
"""
