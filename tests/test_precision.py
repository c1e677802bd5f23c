"""model.matmul_precision applies to all products and convolutions of all programs.

Gradients and loops are included.
"""

from collections import Counter

import jax
import pytest
from tiny_checkpoint import tiny_config

from dancegrpo_jax.compilation import inventory
from dancegrpo_jax.devices import sharding


def precisions(jaxpr) -> Counter:
  """Counts products and convolutions by requested precision, in all loops and branches."""
  found = Counter()
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
      asked = eqn.params["precision"]
      found[str(asked[0]) if isinstance(asked, tuple) else str(asked)] += 1
    for value in eqn.params.values():
      for item in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(item, "jaxpr", item)
        if hasattr(inner, "eqns"):
          found += precisions(inner)
  return found


@pytest.mark.parametrize("precision, asked", [("highest", "HIGHEST"), ("default", "None")])
def test_every_product_asks_for_it(tiny_models, precision, asked):
  changes = {"model__matmul_precision": precision, "optimizer__updates_per_iteration": 3}
  config = inventory.without_weights(tiny_config(tiny_models, **changes))
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  with jax.set_mesh(mesh):
    calls = inventory.take(config, mesh, 8, 0).calls
    found = {
      call.name: precisions(call.program.trace(*call.arguments).jaxpr.jaxpr) for call in calls
    }
  networks = ("encode", "rollout", "sample", "decode", "features clip", "score clip")
  for name in (*networks, "update remember", "update accumulate"):
    assert set(found[name]) == {asked} and found[name][asked] > 3, (name, found[name])
  assert all(set(kinds) <= {asked} for kinds in found.values())
  # forward and backward
  assert found["update accumulate"][asked] > 2.5 * found["rollout"][asked]


def test_what_the_user_set_in_jax_holds_where_the_config_says_default(tiny_models):
  config = inventory.without_weights(tiny_config(tiny_models, model__matmul_precision="default"))
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  with jax.set_mesh(mesh), jax.default_matmul_precision("tensorfloat32"):
    decode = next(
      call for call in inventory.take(config, mesh, 8, 0).calls if call.name == "decode"
    )
    assert set(precisions(decode.program.trace(*decode.arguments).jaxpr.jaxpr)) == {"HIGH"}
