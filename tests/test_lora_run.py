"""LoRA through whole runs.

What is trained, saved and averaged; what does not change; and the reference of the KL penalty.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import relative_error, tiny_config, update_of, write_flux

from dancegrpo_jax import programs, train
from dancegrpo_jax.assembly import encoding, loading, sampling
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.data import prompts
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.rl.state import init_state
from dancegrpo_jax.training.session import reference_of

TARGETS = r".*attn.*/to_(q|k|v|out_0)/kernel"
LORA = {
  "lora__rank": 4,
  "lora__alpha": 6.0,
  "lora__targets": TARGETS,
  "iterations": 2,
  "ema__decay": 0.5,
  "evaluation__every": 0,
  "optimizer__learning_rate": 1e-2,
  "optimizer__updates_per_iteration": 2,
  "optimizer__microbatch": 8,
  "model__frozen_dtype": "bfloat16",
  "reward__terms": (("compressibility", 1.0),),
}


def flux_config(folder, **changes):
  """A run with stacked, rematerialised blocks and adapters that are split over devices."""
  values = {
    "model__family": "flux",
    "model__checkpoint": str(folder),
    "model__text_length": 8,
    "model__scan_blocks": True,
    "model__remat": True,
    "sampler__kind": "flow",
    "sampler__shift": 0.0,
    "sampler__noise_level": 0.7,
    "mesh__data": 4,
    "mesh__fsdp": 2,
    "mesh__rules": (
      ("denoiser/.*transformer_blocks/.*kernel", (None, None, "fsdp")),
      ("lora/.*/b", (None, None, "fsdp")),
      (".*", ()),
    ),
  }
  return tiny_config(None, **(values | LORA | changes))


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
  return write_flux(tmp_path_factory.mktemp("flux") / "base")


@pytest.fixture(scope="module", params=["sd", "flux"])
def run(request, tiny_models, flux_folder, tmp_path_factory):
  """(config, workdir) after two iterations with a KL penalty and averaged weights."""
  changes = {"objective__kl__weight": 0.1}
  if request.param == "sd":
    config = tiny_config(tiny_models, **LORA, **changes)
  else:
    config = flux_config(flux_folder, objective__kl__mode="velocity_mse", **changes)
  workdir = tmp_path_factory.mktemp("run") / request.param
  train.run(config, workdir)
  return config, workdir


def loaded(config) -> loading.Model:
  pipeline, mesh = loading.build_pipeline(config), sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    return loading.load(config, pipeline, {}, mesh)


def test_only_adapters_are_trained_saved_and_averaged(run):
  config, workdir = run
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert len(rows) == 2 and all(
    np.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in rows
  )
  assert all(
    row["kl"] > 0 and row["ratio/drift_max"] == 0 and row["optimizer/skipped_total"] == 0
    for row in rows
  )
  model = loaded(config)
  assert set(model.trainable) == {"lora"} and all(
    x.dtype == "float32" for x in jax.tree.leaves(model.trainable)
  )
  assert all(x.dtype == "bfloat16" for x in jax.tree.leaves(model.frozen["denoiser"]))
  folder = store._find(workdir / "checkpoints", None)
  fields = store._read_metadata(folder)["fields"]
  adapters = {f"lora/{path}" for path in fields["trainable"]}
  assert set(fields) == {"step", "skipped", "trainable", "opt_state", "ema"} and len(
    fields["ema"]
  ) == len(fields["trainable"])
  assert all("/lora/" in path and path.endswith(("/a", "/b")) for path in adapters)
  moments = [path for path in fields["opt_state"] if path.endswith(("/a", "/b"))]
  # Beside the moments there are only counters.
  assert len(moments) == 2 * len(adapters) and len(fields["opt_state"]) - len(moments) <= 2
  assert "denoiser" not in json.dumps(fields)


def test_sampling_with_the_checkpoint(run):
  config, workdir = run
  with sampling.opened(config, str(workdir)) as opened:
    assert set(opened.weights) == {"lora"}
    examples = prompts.read_examples(config)[:2]
    tuned, start = (
      sampling.draw(opened, weights, examples, 2, seed=5).pixels
      for weights in (opened.weights, opened.model.trainable)
    )
    base = sampling.draw(opened, {}, examples, 2, seed=5).pixels
  np.testing.assert_array_equal(start, base)
  assert np.abs(tuned - base).max() > 1e-3


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"lora__alpha": 4.0}, "was trained with lora.alpha = 6.0; this config has 4.0"),
    (
      {"lora__rank": 0, "lora__alpha": 0.0, "lora__targets": ""},
      "was trained with lora.rank = 4; this config has 0",
    ),
  ],
)
def test_a_checkpoint_of_other_adapters(run, changes, message):
  """Adapters with another alpha have the same shapes, but make another model."""
  config = run[0].copy_and_resolve_references()
  with config.unlocked():
    for key, value in changes.items():
      config.lora[key.removeprefix("lora__")] = value
  with pytest.raises(ConfigError, match=message), sampling.opened(config.lock(), str(run[1])):
    pass


@pytest.mark.parametrize(
  "modes",
  [
    ("exact", "velocity_mse"),
    pytest.param(("exact", "no_dt", "mean_mse", "velocity_mse"), marks=pytest.mark.slow),
  ],
)
def test_every_kl_mode_holds_to_the_base(flux_folder, modes):
  """The first update starts from adapters that equal the base, with KL 0.

  From then on the KL is positive, and its gradient counts.
  """
  config = flux_config(
    flux_folder,
    optimizer__updates_per_iteration=1,
    optimizer__microbatch=16,
    mesh__data=1,
    mesh__fsdp=1,
    mesh__rules=((".*", ()),),
    model__remat=False,
    sampler__steps=2,
  )
  pipeline = loading.build_pipeline(config)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  with jax.set_mesh(mesh):
    model = loading.load(config, pipeline, {}, mesh)
    shardings = loading.state_shardings(config, model, 8, mesh)
    run = programs.build(config, pipeline, {}, mesh, shardings)
    rows = encoding.conditioning(
      config, encoding.encoder(model, run.encode), prompts.read_examples(config)[:4]
    )
    ids, numbers = np.arange(4, dtype=np.int32), np.arange(16, dtype=np.int32)
    rollout = run.rollout(model.trainable, model.frozen, rows, ids, numbers, np.int32(0))
    advantage = np.where(numbers % 2, 1.0, -1.0).astype(np.float32)
    ends = {}
    for mode in modes:
      with config.unlocked():
        config.objective.kl.update(mode=mode, weight=10.0)
      assert reference_of(config, model) == {}
      run = programs.build(config, pipeline, {}, mesh, shardings)
      state = init_state(config, 8, shardings)(jax.tree.map(jnp.copy, model.trainable))
      found = []
      for _ in range(2):
        arguments = ((rollout,), advantage, np.ones(16, np.float32), numbers, np.int32(0))
        state, metrics = update_of(run, state, model.frozen, {}, rows, ids, *arguments)
        found.append(float(metrics["kl"]))
      assert found[0] == 0.0 < found[1], mode
      ends[mode] = jax.device_get(state.trainable)
  assert relative_error(ends["exact"], ends["velocity_mse"]) > 1e-4
