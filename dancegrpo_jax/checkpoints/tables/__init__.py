"""All conversion tables by the class name that a config.json gives."""

from dancegrpo_jax.checkpoints.tables.clip import AESTHETIC, CLIP, CLIP_TEXT, CLIP_VISION, OPEN_CLIP
from dancegrpo_jax.checkpoints.tables.flux import FLUX, T5
from dancegrpo_jax.checkpoints.tables.stable_diffusion import AUTOENCODER, UNET

TABLES = {
  table.name: table
  for table in (UNET, AUTOENCODER, FLUX, T5, CLIP_TEXT, CLIP_VISION, CLIP, OPEN_CLIP, AESTHETIC)
}
