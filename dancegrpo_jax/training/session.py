"""What stays the same over a run: models, programs and data, loaded and compiled."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dancegrpo_jax import programs, scoring
from dancegrpo_jax.assembly import encoding, loading, resident, reward_builders
from dancegrpo_jax.assembly.loading import Model
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.compilation import ahead, calls
from dancegrpo_jax.data import prompts
from dancegrpo_jax.data.prompts import read_held_out
from dancegrpo_jax.devices import out_of_memory, program_cache
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report import metrics, page
from dancegrpo_jax.rl.state import TrainState, init_state
from dancegrpo_jax.settings import stored_config
from dancegrpo_jax.types import Example, PyTree


class Session(NamedTuple):
  """What stays the same over a run.

  Attributes:
    config: validated.
    workdir: of the run.
    examples: the prompt data set.
    shown: prompts that evaluation.every samples with fixed noise: of the data set, and held out.
    batches: `batches[iteration]` is that iteration's examples.
    model: without its trainable weights, which the state owns.
    programs: compiled functions of an iteration.
    shown_programs: the same at the shapes of an evaluation inside training.
    encode: `examples -> rows` of an iteration's prompts: by the model's encoders, or from the
      cache.
    encode_shown: the same for the shown prompts.
    reference: in the place of the trained weights what a KL penalty holds to, or None. {} under
      LoRA: the base has no adapters.
    features: device rewards' features of every prompt, by reward.
    shown_features: of the shown ones.
  """

  config: ConfigDict
  workdir: Path
  examples: list[Example]
  shown: tuple[list[Example], list[Example]]
  batches: Any
  model: Model
  programs: programs.Programs
  shown_programs: programs.Programs
  encode: encoding.Encode
  encode_shown: encoding.Encode
  reference: PyTree | None
  features: dict[str, PyTree]
  shown_features: dict[str, PyTree]


@out_of_memory.named("loading")
def prepare(
  config: ConfigDict,
  workdir: Path,
  examples: list[Example],
  mesh: jax.sharding.Mesh,
  first: int,
  progress: metrics.Progress,
) -> tuple[Session, TrainState]:
  """Model, rewards, programs and the state to start from; writes config.json and environment.json
  when all is loaded.

  The programs are compiled in threads while the weights are read: both need no more than the
  config.json files to begin.
  """
  program_cache.use(config.logging.compilation_cache)
  pipeline, rewards = loading.build_pipeline(config), reward_builders.build_rewards(config)
  held_out, cached = read_held_out(config), None
  without = pipeline.encoders if config.data.cache_embeddings else ()
  outline = loading.outline(config, pipeline, rewards, mesh)
  abstract = loading.abstract_state(config, outline, mesh, len(examples))
  resident.require_room(config, mesh, outline, abstract, without)
  if config.data.cache_embeddings:
    cached = encoding.cached_encoder(config, workdir, pipeline, examples + held_out, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  jitted = programs.build(config, pipeline, rewards, mesh, shardings)
  listed = calls.of_run(config, outline, abstract, jitted, len(examples), len(held_out)).listed
  if cached:
    listed = [call for call in listed if call.name != "encode"]
  with ahead.compilers() as pool:
    compiling = ahead.start(listed, mesh, pool)
    model = loading.load(config, pipeline, rewards, mesh, without)
    compiled, shown_programs = ahead.ready(compiling, jitted, progress)
  compiled = out_of_memory.guarded(compiled)
  shown_programs = out_of_memory.guarded(shown_programs, calls.SHOW)
  reference = reference_of(config, model)
  make_state = init_state(config, len(examples), shardings)
  state = (
    store.restore(workdir / "checkpoints", abstract).state if first else make_state(model.trainable)
  )
  batches = prompts.prompt_batches(
    examples, config.data.prompts_per_iteration, config.seed, config.data.shuffle
  )
  shown = examples[: config.evaluation.prompts], held_out[: config.evaluation.prompts]
  params, rows = model.reward_params, config.data.prompts_per_iteration
  features = scoring.reward_features(rewards, params, compiled.features, examples, rows)
  shown_features = scoring.reward_features(rewards, params, compiled.features, sum(shown, []), rows)
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(stored_config.to_json(config))
    page.save_environment(workdir)
  model = model._replace(trainable=None)
  encode = cached or encoding.encoder(model, compiled.encode)
  session = Session(
    config=config,
    workdir=workdir,
    examples=examples,
    shown=shown,
    batches=batches,
    model=model,
    programs=compiled,
    shown_programs=shown_programs,
    encode=encode,
    encode_shown=cached or encoding.encoder(model, shown_programs.encode),
    reference=reference,
    features=features,
    shown_features=shown_features,
  )
  return session, state


def resumed_config(config: ConfigDict, workdir: Path, given: Collection[str]) -> ConfigDict:
  """The config with which the workdir's run goes on, see `stored_config.as_stored`; `config` itself
  where there is no run yet.
  """
  folder = workdir / "checkpoints"
  if store.latest(folder) is None:
    return config
  kept, lines = stored_config.as_stored(store.read_meta(folder)["config"], config, given)
  for line in lines:
    print(line)
  return kept


def iterations_done(config: ConfigDict, workdir: Path) -> int:
  """Iterations already done in the workdir: 0, or where to resume. Says which harmless fields
  differ.

  Raises:
    ConfigError: the workdir belongs to a run that differs in what may not change, field by field.
  """
  folder = workdir / "checkpoints"
  done = store.latest(folder)
  if done is None:
    return 0
  allowed, refused = stored_config.differences(store.read_meta(folder)["config"], config)
  if refused:
    lines = "\n".join(map(str, refused))
    raise ConfigError(
      f"{workdir} holds a run with another config; use another --workdir, or undo these"
      f" changes:\n{lines}"
    )
  for difference in allowed:
    print(f"resuming with {difference}")
  return done


def reference_of(config: ConfigDict, model: Model) -> PyTree | None:
  """What a KL penalty holds to: a copy of the weights before training, or the frozen base itself,
  which LoRA leaves as it is.
  """
  if not config.objective.kl.weight:
    return None
  return {} if config.lora.rank else jax.tree.map(jnp.copy, model.trainable)
