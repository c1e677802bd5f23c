"""NVIDIA GPUs that programs can be compiled for on a machine without one.

The compiler in JAX's CUDA plugin needs neither a driver nor a card, if it gets a description of the
card. It cannot time kernels then, so a card may get other kernels, and convolutions that work in
more memory.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.experimental import topologies

from dancegrpo_jax.errors import ConfigError

CUDNN = 91900  # the version of cuDNN to compile for, 9.19


class Card(NamedTuple):
  """A kind of GPU.

  Attributes:
    kind: JAX's device_kind.
    capability: compute capability.
    cores: streaming multiprocessors.
    memory: bytes.
    bandwidth: bandwidth of the memory, bytes/s.
    cache: bytes of the second-level cache.
    clock: GHz.
  """

  kind: str
  capability: tuple[int, int]
  cores: int
  memory: int
  bandwidth: int
  cache: int
  clock: float


# The values that XLA reads from such a card and writes into a topology's target_config.
CARDS = {
  "h100": Card(
    kind="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    cores=132,
    memory=84_929_347_584,
    bandwidth=3_352_320_000_000,
    cache=52_428_800,
    clock=1.98,
  )
}


def devices(card: str, count: int) -> list[jax.Device]:
  """GPUs of one machine. Programs can be compiled for them, but they hold no data.

  From then on, JAX's attention in this process behaves as with a driver for such a card.

  Args:
    card: one of `CARDS`.
    count: number of GPUs.

  Raises:
    ConfigError: JAX's CUDA plugin is not installed.
  """
  if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
    remedy = f"pip install 'jax[cuda13]=={jax.__version__}'"
    raise ConfigError(f"--topology={card}:{count}: needs the compiler for NVIDIA GPUs; {remedy}")
  # A private module: only plans for GPUs should depend on it.
  from jax._src.cudnn import fused_attention_stablehlo

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
  """Stand-ins for the functions with which JAX's attention queries the driver.

  Args:
    capability: the compute capability that they report.

  Returns:
    The functions by their names in the module `jax._src.cudnn.fused_attention_stablehlo`.
  """

  def parsed(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))

  return {
    "check_cudnn_version": lambda: CUDNN,
    "check_compute_capability": lambda least: capability >= parsed(least),
    "is_cuda_compute_capability_equal": lambda other: capability == parsed(other),
  }


def target_config(card: Card) -> str:
  """A card as XLA's GpuTargetConfigProto, in text.

  The constants are the same for all cards of compute capability 9.0:
  https://docs.nvidia.com/cuda/cuda-c-programming-guide, appendix on compute capabilities.
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
