"""Makes a process keep the memory that the programs of a CPU give back.

On a CPU, XLA allocates a program's temporary memory at every call and frees it afterwards. glibc
returns blocks of that size to the kernel, which fills their pages with zeros when they are touched
again. A call that adds the gradient of one microbatch of configs/emoji_clip.py touches 178 000
pages (0.7 GB). That took 0.1 of its 0.65 s on two cores. GPUs and TPUs have allocators of their
own.
"""

import ctypes
import os
from collections.abc import Mapping

# The parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
# With any of these the user has decided how memory is allocated.
DECIDES = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep(environment: Mapping[str, str]) -> bool:
  """Tells glibc to take large blocks from its heap and to leave freed memory there.

  This has to happen before JAX starts its threads: with several arenas, a thread's large blocks do
  not come from the heap.

  Args:
    environment: in which the user may have decided otherwise, with one of `DECIDES`.

  Returns:
    Whether it was done. False on another C library, where memory is left as it is.
  """
  if any(environment.get(name) for name in DECIDES):
    return False
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
  if mallopt is None:
    return False
  settings = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}
  return all(mallopt(name, value) == 1 for name, value in settings.items())
