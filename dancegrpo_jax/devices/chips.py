"""What one device offers: memory, peak, clock and network."""

import os
from typing import Any, NamedTuple

import jax

from dancegrpo_jax.devices import accelerator, gpu_topologies


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


# By device_kind. Memory: what libtpu 0.0.42.1 says is available when a program needs more. Peak and
# network: the tables of https://cloud.google.com/tpu/docs (v4 275 TFLOP/s and 2400 Gbit/s, v5e 197
# and 1600, v5p 459 and 4800, v6e 918 and 3584). Clock: peak / (2 cores x 4 units x 2 x 128**2) of
# v4 and v5p, (4 x 2 x 128**2) of v5e, (4 x 2 x 256**2) of v6e.
CHIPS = {
  "TPU v4": Chip("v4", 30.75 * 2**30, 275e12, 1.05e9, 300e9),
  "TPU v5 lite": Chip("v5e", 15.75 * 2**30, 197e12, 1.50e9, 200e9),
  "TPU v5": Chip("v5p", 95.74 * 2**30, 459e12, 1.75e9, 600e9),
  "TPU v6 lite": Chip("v6e", 31.25 * 2**30, 918e12, 1.75e9, 448e9),
}
# Peaks of GPUs by a part of their device_kind, of dense products in bfloat16, from NVIDIA's data
# sheets, which state twice as much with sparsity. The first match holds: an H100 of no other kind
# is the SXM's.
PEAKS = {
  "H100 PCIe": 756e12,
  "H100 NVL": 835e12,
  "H100": 989e12,
  "H200": 989e12,
  "A100": 312e12,
  "L40S": 362e12,
  "L4": 121e12,
}


def chip_of(device: Any) -> Chip:
  """What a device offers; zeros where that isn't known, as of a CPU.

  Of a GPU: the memory is what JAX has taken of it or will take, see devices/accelerator.py; there
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
