"""The model families of this package, by the name that `model.family` has for them."""

import difflib

from dancegrpo_jax import objects
from dancegrpo_jax.pipelines import flux, hunyuan_video, stable_diffusion
from dancegrpo_jax.pipelines.base import Family

FAMILIES = {
  "stable_diffusion": stable_diffusion.FAMILY,
  "flux": flux.FAMILY,
  "hunyuan_video": hunyuan_video.FAMILY,
}


def family_of(name: str) -> Family:
  """The family of this name, or the object that "module:object" names.

  Raises:
    ValueError: there is no such family or object, or the object is no `Family`; one line.
  """
  if name in FAMILIES:
    return FAMILIES[name]
  if not objects.is_named(name):
    close = difflib.get_close_matches(name, list(FAMILIES), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
      f"config.model.family = {name!r}: unknown; one of {', '.join(FAMILIES)}, or"
      f" module:object{hint}"
    )
  family = objects.load("model.family", name)
  if not isinstance(family, Family):
    raise ValueError(
      f"config.model.family = {name!r}: is a {type(family).__name__}; it must be a"
      " dancegrpo_jax.pipelines.base.Family"
    )
  return family
