"""Command: `python -m dancegrpo_jax COMMAND ...` is `dancegrpo COMMAND ...`."""

import sys

from dancegrpo_jax.command import main

if __name__ == "__main__":
  sys.exit(main())
