"""What kind of work a kernel does, by its name. Knows kernels of cuDNN, cuBLAS, CUTLASS and XLA."""

import re

# The first that is found holds. Names as the profiler gives them on an H100 with JAX 0.11 and CUDA
# 13.
_RULES = (
  ("attention", "flash|fmha|sdpa|attention"),
  ("copy", "nchwtonhwc|nhwctonchw"),  # of layouts, before cuDNN's name decides
  ("convolution", "conv(?!ert)|implicit_?gemm|fprop|dgrad|wgrad|winograd|cudnn"),
  ("product", r"gemm|nvjet|cutlass|cublas|matmul|\bdot[._]|_dot_|_dot$|xmma|splitk"),
  ("reduction", "reduc|softmax|norm"),
  ("copy", "memcpy|memset|transpose|concatenate|copy|(^|_)pad|slice|gather|scatter"),
  (
    "element-wise",
    "fusion|elementwise|loop_|wrapped_|add|multiply|convert|broadcast|select|iota|rng",
  ),
)
_PATTERNS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _RULES)


def kind_of(name: str) -> str:
  """One of `registry.KINDS`."""
  return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), "other")


def totals(kernels: list[tuple[str, float]]) -> dict[str, float]:
  """Sums of time by kind, from (name, time) pairs. Kinds that do not occur are left out."""
  found: dict[str, float] = {}
  for name, spent in kernels:
    kind = kind_of(name)
    found[kind] = found.get(kind, 0.0) + spent
  return found
