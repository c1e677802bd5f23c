"""Chips that a program can be compiled for without having them: a TPU topology's devices out of libtpu; what a chip offers."""

import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax

from dancegrpo_jax.runtime import accelerator, gpu_topologies
from dancegrpo_jax.runtime.config import ConfigError


class Chip(NamedTuple):
  """What one device of a mesh offers.

  Attributes:
    name: as in a topology's name.
    memory: bytes of HBM that a program may use.
    flops: peak of bfloat16 products, FLOP/s; 0 where it isn't known.
    clock: of the matrix units, 1/s: what turns the compiler's cycles into seconds; 0 without any.
    network: bytes/s that a chip receives over all its links to other chips.
  """

  name: str
  memory: float
  flops: float
  clock: float
  network: float


# By device_kind. Memory: what libtpu 0.0.42.1 says is available when a program needs more. Peak and network: the tables of
# https://cloud.google.com/tpu/docs (v4 275 TFLOP/s and 2400 Gbit/s, v5e 197 and 1600, v5p 459 and 4800, v6e 918 and 3584).
# Clock: peak / (2 cores x 4 units x 2 x 128**2) of v4 and v5p, (4 x 2 x 128**2) of v5e, (4 x 2 x 256**2) of v6e.
CHIPS = {
  "TPU v4": Chip("v4", 30.75 * 2**30, 275e12, 1.05e9, 300e9),
  "TPU v5 lite": Chip("v5e", 15.75 * 2**30, 197e12, 1.50e9, 200e9),
  "TPU v5": Chip("v5p", 95.74 * 2**30, 459e12, 1.75e9, 600e9),
  "TPU v6 lite": Chip("v6e", 31.25 * 2**30, 918e12, 1.75e9, 448e9),
}
# Peaks of GPUs by a part of their device_kind, of dense products in bfloat16, from NVIDIA's data sheets,
# which state twice as much with sparsity. The first match holds: an H100 of no other kind is the SXM's.
PEAKS = {
  "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
}  # fmt: skip
# Examples of shapes: chips along the axes of the network, two of them (v5e, v6e) or three; multiples of a host's 2 x 2.
KNOWN = {"v4": "v4:4x4x4", "v5e": "v5e:2x4", "v5p": "v5p:4x4x4", "v6e": "v6e:8x8"}


def devices(topology: str) -> list:
  """The devices of a topology, as "v5p:4x4x4" or "h100:8". They can be compiled for and hold no data.

  Raises:
    ConfigError: the compiler is not installed, or does not know the topology.
  """
  card, _, count = topology.partition(":")
  if card in gpu_topologies.CARDS and re.fullmatch("[1-9][0-9]*", count):
    return gpu_topologies.devices(card, int(count))
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(f"--topology={topology}: needs the TPU compiler; pip install 'jax[tpu]=={jax.__version__}'")
  found = re.fullmatch(r"(\w+):\d+x\d+(x\d+)?", topology)
  known = ", ".join(KNOWN.values())
  if found is None or found[1] not in KNOWN:
    cards = " or ".join(f"{name}:8" for name in gpu_topologies.CARDS)
    raise ConfigError(f"--topology={topology}: unknown; CHIP:SHAPE with chips {', '.join(KNOWN)}, as {known}, or {cards}")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu asks Google Cloud's metadata server who it is, for minutes
  # Without these two it complains, as of an error, that it doesn't know what machine it is on. Any will do.
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is touched: others may use it, or plan at the same time
  from jax.experimental import topologies

  options = {"chip_config_name": "megacore"} if found[1] == "v4" else {}  # one device a chip, as it runs
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
  except (RuntimeError, ValueError) as error:
    reason = " ".join(str(error).split())[:200]
    raise ConfigError(f"--topology={topology}: libtpu refuses it ({reason}); shapes it knows are such as {known}") from error


def chip_of(device: Any) -> Chip:
  """What a device offers; zeros where that isn't known, as of a CPU.

  Of a GPU: the memory is what JAX has taken of it or will take, see runtime/accelerator.py; there
  are no times to be had, so clock and network are 0.
  """
  kind = device.device_kind
  if kind in CHIPS:
    return CHIPS[kind]
  if device.platform != "gpu":
    return Chip(kind, 0.0, 0.0, 0.0, 0.0)
  try:
    stats = device.memory_stats() or {}  # XLA_PYTHON_CLIENT_ALLOCATOR=platform has none
    memory = float(stats.get("bytes_limit", 0))
  except jax.errors.JaxRuntimeError:  # it isn't here: programs are only compiled for it
    cards = gpu_topologies.CARDS.values()
    share = float(os.environ.get(accelerator.VARIABLE, accelerator.SHARE))
    memory = share * next((card.memory for card in cards if card.kind == kind), 0)
  return Chip(kind, memory, gpu_peak(kind), 0.0, 0.0)


def gpu_peak(kind: str) -> float:
  """FLOP/s that a GPU of this device_kind can do in bfloat16, 0 where it isn't known."""
  return next((flops for name, flops in PEAKS.items() if name in kind), 0.0)
