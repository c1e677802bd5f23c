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
from dancegrpo_jax.data.prompts import read_examples, read_held_out
from dancegrpo_jax.devices import out_of_memory, processes, program_cache
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report import metrics, page
from dancegrpo_jax.rl.state import TrainState, init_state
from dancegrpo_jax.settings import checks, command_line, stored_config
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


class Loaded(NamedTuple):
  """What `load_and_compile` returns.

  Attributes:
    model: with its weights.
    programs: compiled, of an iteration.
    shown_programs: compiled, at the shapes of an evaluation inside training.
    state: the TrainState before the first iteration, abstract.
    cached: `examples -> rows` from the cache of embeddings, None where the encoders are loaded.
  """

  model: Model
  programs: programs.Programs
  shown_programs: programs.Programs
  state: TrainState
  cached: encoding.Encode | None


def load_and_compile(
  config: ConfigDict,
  workdir: Path,
  examples: list[Example],
  held_out: list[Example],
  mesh: jax.sharding.Mesh,
  progress: metrics.Progress,
) -> Loaded:
  """Reads the weights, and compiles the programs in threads meanwhile: both need no more than the
  config.json files to begin.

  Raises:
    ConfigError: a checkpoint that can't be used, or a model that is too large for the devices.
  """
  pipeline, rewards = loading.build_pipeline(config), reward_builders.build_rewards(config)
  without = pipeline.encoders if config.data.cache_embeddings else ()
  outline = loading.outline(config, pipeline, rewards, mesh)
  state = loading.abstract_state(config, outline, mesh, len(examples))
  resident.require_room(config, mesh, outline, state, without)
  cached = None
  if config.data.cache_embeddings:
    cached = encoding.cached_encoder(config, workdir, pipeline, examples + held_out, mesh)
  jitted = programs.build(
    config, pipeline, rewards, mesh, jax.tree.map(lambda x: x.sharding, state)
  )
  listed = calls.of_run(config, outline, state, jitted, len(examples), len(held_out)).listed
  if cached:
    listed = [call for call in listed if call.name != "encode"]
  with ahead.compilers() as pool:
    compiling = ahead.start(listed, mesh, pool)
    model = loading.load(config, pipeline, rewards, mesh, without)
    compiled, shown_programs = ahead.ready(compiling, jitted, progress)
  return Loaded(
    model=model,
    programs=out_of_memory.guarded(compiled),
    shown_programs=out_of_memory.guarded(shown_programs, calls.SHOW),
    state=state,
    cached=cached,
  )


@out_of_memory.named("loading")
def prepare(
  config: ConfigDict,
  workdir: Path,
  examples: list[Example],
  mesh: jax.sharding.Mesh,
  first: int,
  progress: metrics.Progress,
) -> tuple[Session, TrainState]:
  """What an iteration needs, and the state to start from; writes config.json and environment.json
  when all is loaded.

  Args:
    config: validated.
    workdir: of the run.
    examples: the prompt data set.
    mesh: the devices; the caller has entered it.
    first: iterations that are done already.
    progress: where it is shown what is being compiled.

  Raises:
    ConfigError: as `load_and_compile`.
  """
  program_cache.use(config.logging.compilation_cache)
  held_out = read_held_out(config)
  loaded = load_and_compile(config, workdir, examples, held_out, mesh, progress)
  model, compiled, shown_programs = loaded.model, loaded.programs, loaded.shown_programs
  reference = reference_of(config, model)
  if first:
    state = store.restore(workdir / "checkpoints", loaded.state).state
  else:
    shardings = jax.tree.map(lambda x: x.sharding, loaded.state)
    state = init_state(config, len(examples), shardings)(model.trainable)
  model = model._replace(trainable=None)  # the state owns it
  shown = examples[: config.evaluation.prompts], held_out[: config.evaluation.prompts]
  rows = config.data.prompts_per_iteration

  def features_of(examples: list[Example]) -> dict[str, PyTree]:
    return scoring.reward_features(
      model.rewards, model.reward_params, compiled.features, examples, rows
    )

  session = Session(
    config=config,
    workdir=workdir,
    examples=examples,
    shown=shown,
    batches=prompts.prompt_batches(examples, rows, config.seed, config.data.shuffle),
    model=model,
    programs=compiled,
    shown_programs=shown_programs,
    encode=loaded.cached or encoding.encoder(model, compiled.encode),
    encode_shown=loaded.cached or encoding.encoder(model, shown_programs.encode),
    reference=reference,
    features=features_of(examples),
    shown_features=features_of([*shown[0], *shown[1]]),
  )
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(stored_config.to_json(config))
    page.save_environment(workdir)
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


def checked(config: ConfigDict, workdir: Path) -> tuple[list[Example], int]:
  """The prompts of a run and its iterations that are done, when all has been checked that can be
  before anything is loaded.

  Raises:
    ConfigError: a mistake in the config, the prompts or the workdir.
  """
  examples = read_examples(config)
  facts = checks.device_facts(jax.devices()[0])
  checks.validate(config, num_devices=jax.device_count(), num_examples=len(examples), **facts)
  command_line.require_writable(f"--workdir={workdir}", workdir)
  done = iterations_done(config, workdir)
  processes.require_same(
    done, f"--workdir={workdir}: iterations done differ", "all hosts must see the same folder"
  )
  processes.require_shared(workdir)
  return examples, done


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
