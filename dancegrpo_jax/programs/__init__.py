"""What is compiled: the functions of an iteration, and those of single commands."""

from dancegrpo_jax.programs.iteration import Programs, build, encoder
from dancegrpo_jax.programs.jitted import compiled, embed, fit_step, init_adapters, program
from dancegrpo_jax.programs.sampling import guided

__all__ = [
  "Programs",
  "build",
  "compiled",
  "embed",
  "encoder",
  "fit_step",
  "guided",
  "init_adapters",
  "program",
]
