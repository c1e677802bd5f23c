"""The plan of a tiny run on local devices: table, JSON and exit codes; what it plans for is what
train loads. Needs no libtpu.
"""

import importlib.util
import json
import os
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict
from test_flops import DYNAMIC_TEXT, TPU_TEXT
from tiny_checkpoint import ROOT, overrides, tiny_config

from dancegrpo_jax.assembly import loading, reward_builders
from dancegrpo_jax.compilation import inventory
from dancegrpo_jax.devices import chips, sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.models import attention
from dancegrpo_jax.plan import __main__ as command
from dancegrpo_jax.plan import flops, planning, table, topologies
from dancegrpo_jax.programs import jitted
from dancegrpo_jax.settings import command_line, config_file

CONFIG = f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny"
PROGRAMS = ["encode", "decode", "features clip", "score clip", "join", "advantages"]
UPDATE = ["update deal", "update accumulate", "update step", "update summary"]
SLOW = ["rollout", *UPDATE, "sample"]  # to compile, and nothing else is asked of them
SHOWN = ["show decode", "show encode", "show score clip"]


def has_cuda_compiler() -> bool:
  return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def flags(folders, **changes) -> list[str]:
  return [CONFIG, *(f"--config.{word}" for word in overrides(folders, **changes))]


@pytest.fixture(scope="module")
def planned(tiny_models, tmp_path_factory):
  """(exit code, what was printed, the JSON file) of a run on 8 devices, without what compiles
  long.
  """
  out = tmp_path_factory.mktemp("plan") / "deep" / "plan.json"
  said = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
    code = command.main([*flags(tiny_models), f"--out={out}", f"--only={','.join(PROGRAMS)}"])
  return code, "\n".join(said), json.loads(out.read_text())


def test_every_program_has_a_row(planned):
  code, text, result = planned
  assert code == 0 and [row["name"] for row in result["rows"]] == PROGRAMS
  lines = [line for line in text.splitlines() if line.startswith("| ")]
  assert len(lines) == 2 + len(PROGRAMS) and len({len(line) for line in lines}) == 1
  assert "Whether it fits: unknown" in text  # a CPU
  assert f"Not compiled: {', '.join([*SLOW, *SHOWN])}." in text
  assert (
    "4 prompts x 4 samples = 16 samples, in 1 chunks of 16; 16 of them x 3 of 3 steps = 48"
    " transitions" in text
  )
  assert "1 optimizer steps of 3 microbatches of 16 (8 lanes on 8 devices)" in text
  assert result["images"] == 16 and result["devices"] == 8 and result["hours"] is None
  for row in result["rows"]:
    assert (
      row["peak"] >= row["arguments"] > 0 and row["compile_seconds"] > 0 and not row["uncounted"]
    )


@pytest.fixture(scope="module")
def taken(tiny_models):
  """(config, mesh) of the run on one device, and its inventory."""
  config = inventory.without_weights(tiny_config(tiny_models))
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  return config, mesh, inventory.take(config, mesh, 8, 0)


def test_calls_in_a_run(taken):
  """1 chunk an iteration; features of 8 prompts, 4 at once; the grid at the start, the end and
  whenever evaluation.every says.
  """
  times = {call.name: call.times for call in taken[2].calls}
  assert set(times) == {*PROGRAMS, *SLOW, *SHOWN}
  once = ("rollout", "decode", "score clip", "join", *UPDATE, "encode")
  assert {times[name] for name in once} == {tiny_config().iterations}
  assert times["features clip"] == 2
  every = tiny_config().evaluation.every
  shows = tiny_config().iterations // every + 1 if every else 2
  assert {times[name] for name in ("sample", *SHOWN)} == {shows}


def test_flops_are_the_network_s(taken):
  """A rollout calls the network once for each of 16 samples at 4 steps, the update 3 of them once
  forward, twice backward.
  """
  config, mesh, _ = taken
  found = planning.counts(config, mesh, 8, 0, ["rollout", "update accumulate"])
  one = found["rollout"].total / (16 * 4)
  # the first layer's input has no gradient
  assert 2.9 < found["update accumulate"].total / (16 * 3 * one) < 3.1
  assert not found["update accumulate"].unknown


def test_what_a_call_of_the_update_counts_follows_the_length_of_calls(tiny_models):
  """2 optimizer steps of 3 microbatches: the calls of an iteration, and what is in one of them.
  Together it is the same work.
  """
  names, found = ("update remember", "update accumulate"), {}
  for most in (0, 1, 2, 3):
    changes = {"optimizer__updates_per_iteration": 2, "optimizer__microbatch": 8}
    config = tiny_config(tiny_models, optimizer__microbatches_per_call=most, **changes)
    config = inventory.without_weights(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    calls = {call.name: call for call in inventory.take(config, mesh, 8, 0).calls}
    counted = planning.counts(config, mesh, 8, 0, list(names))
    found[most] = {
      name: (calls[name].times / config.iterations, calls[name].turns, counted[name].total)
      for name in names
    }
    assert not counted["update accumulate"].unknown | counted["update remember"].unknown
    assert {
      calls[f"update {name}"].times for name in ("deal", "first_step", "step", "summary")
    } == {config.iterations}
  shapes = {most: [rest[:2] for rest in found[most].values()] for most in found}
  assert shapes == {
    0: [(1, 3), (2, 3)],
    1: [(3, 1), (6, 1)],
    2: [(2, 1.5), (4, 1.5)],  # of 2 and 1 microbatches
    3: [(1, 3), (2, 3)],
  }
  for name in names:
    totals = [times * total for times, _, total in (found[most][name] for most in found)]
    assert totals == pytest.approx([totals[0]] * 4) and totals[0] > 0
    assert found[0][name][2] == pytest.approx(3 * found[1][name][2])


def test_what_is_planned_is_what_is_loaded(tiny_models):
  """Shapes, dtypes and shardings of the outline and of the loaded model agree, of rewards too; no
  weights are read for it.
  """
  rules = (("text_encoder/.*/fc1/kernel", ("...", "fsdp")), (".*", ()))
  rewards = ((".*/encoder/.*/kernel", (None, "fsdp")), (".*", ()))
  config = tiny_config(
    tiny_models, mesh__data=1, mesh__fsdp=8, mesh__rules=rules, mesh__reward_rules=rewards
  )
  mesh = sharding.make_mesh(config.mesh)
  outline = inventory.outline(inventory.without_weights(config), mesh)
  with jax.set_mesh(mesh):
    loaded = loading.load(
      config, loading.build_pipeline(config), reward_builders.build_rewards(config), mesh
    )
  for name in ("frozen", "trainable", "reward_params"):
    mine, theirs = getattr(outline, name), getattr(loaded, name)
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs)):
      assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
  split = jax.tree.leaves(loaded.reward_params["clip"]["clip"]["vision_model"]["encoder"])
  assert any(not leaf.sharding.is_fully_replicated for leaf in split)


def test_what_stays_in_memory():
  """Kept arrays that a program is given count once, with it; the others stand beside it."""
  leaf = jax.ShapeDtypeStruct((10,), "float32")
  other = jax.ShapeDtypeStruct((3,), "float32")
  taken = inventory.Inventory([], {"weights": {"a": leaf}, "optimizer": [other]}, None)
  assert inventory.kept_bytes(taken) == 52
  assert inventory.kept_bytes(taken, inventory.Call("x", print, ({"a": leaf},), 1)) == 12


def row(name: str, peak: float, problem: str = "") -> table.Row:
  return table.Row(
    name=name,
    times=1,
    peak=peak,
    flops=1.0,
    arguments=1.0,
    temporaries=1.0,
    collective=0.0,
    compute_seconds=1.0,
    network_seconds=0.5,
    mfu=0.1,
    problem=problem,
  )


def test_what_does_not_fit_says_which_field(monkeypatch, capsys, tiny_models):
  rows = [
    row("update accumulate", 20.0 * 2**30),
    row("decode", 3.0 * 2**30),
    row("rollout", 8.0 * 2**30, "out of memory"),
  ]
  lines = table.problems(rows, 16.0 * 2**30)
  assert (
    len(lines) == 2
    and "update accumulate needs 20.00 of 16.00 GiB" in lines[0]
    and "optimizer.microbatch" in lines[0]
  )
  assert "rollout needs" in lines[1] and "rollout.chunk" in lines[1] and "out of memory" in lines[1]
  assert table.problems(rows[:2], 0.0) == []  # nothing is known
  full = chips.Chip("tiny", 1000.0, 1e12, 1e9, 1e9)
  monkeypatch.setattr(chips, "chip_of", lambda device: full)
  assert command.main([*flags(tiny_models), "--only=advantages"]) == 1
  text = capsys.readouterr().out
  assert (
    "advantages needs" in text and "fits." not in text and "Not compiled: encode, rollout" in text
  )


@pytest.mark.parametrize(
  "kind, peak",
  [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA GeForce RTX 4090", 0.0),
  ],
)
def test_a_gpu_offers_what_jax_has_taken_of_it(kind, peak):
  """What `memory_stats()` of a GPU has; peaks of NVIDIA's data sheets, 0 for what isn't known."""
  stats = {"bytes_limit": 78_000_000_000, "bytes_in_use": 5, "pool_bytes": 78_000_000_000}
  device = SimpleNamespace(device_kind=kind, platform="gpu", memory_stats=lambda: stats)
  assert chips.chip_of(device) == chips.Chip(kind, 78e9, peak, 0.0, 0.0)
  device.memory_stats = lambda: None  # as with XLA_PYTHON_CLIENT_ALLOCATOR=platform
  assert chips.chip_of(device).memory == 0.0


def test_a_plan_for_a_gpu_has_no_times(monkeypatch, capsys, tiny_models, tmp_path):
  """The path of a GPU, which a CPU compiles for; columns that hold nothing are left out."""
  gpu = chips.Chip("NVIDIA H100 80GB HBM3", 78e9, 989e12, 0.0, 0.0)
  monkeypatch.setattr(chips, "chip_of", lambda device: gpu)
  out = tmp_path / "plan.json"
  assert command.main([*flags(tiny_models), "--only=decode,advantages", f"--out={out}"]) == 0
  text, result = capsys.readouterr().out, json.loads(out.read_text())
  head = next(line for line in text.splitlines() if line.startswith("| program"))
  names = [name.strip() for name in head.strip("| ").split("|")]
  assert names[:7] == [
    "program",
    "calls",
    "arguments GiB",
    "temporaries GiB",
    "peak GiB",
    "of HBM",
    "TFLOP",
  ]
  assert not {"compute s", "network s", "MFU"} & set(names)
  assert "What was compiled fits." in text and "Estimate" not in text
  assert result["memory"] == 78e9 and result["hours"] is None


def test_a_file_is_completed_by_later_calls():
  base = {
    "digest": "a",
    "topology": "",
    "versions": {},
    "effort": 0.0,
    "memory": 0.0,
    "iterations": 1,
  }
  base["programs"] = ["encode", "update step"]
  first = base | {"rows": [row("update step", 1.0)._asdict()]}
  second = base | {"rows": [row("encode", 2.0)._asdict()]}
  assert (
    table.concluded(first)["left_out"] == ["encode"] and table.concluded(first)["hours"] is None
  )
  whole = table.concluded(table.merged(first, second))
  assert (
    [r["name"] for r in whole["rows"]] == ["encode", "update step"]
    and whole["left_out"] == []
    and whole["hours"] == 3.0 / 3600
  )
  with pytest.raises(ConfigError, match=r"--out holds another plan \(digest differ\)"):
    table.merged(first, second | {"digest": "b"})


def test_what_is_compiled_outlasts_an_interruption(monkeypatch, tiny_models, tmp_path):
  compile_call, out = planning.compile_call, tmp_path / "plan.json"

  def interrupted(call, **rest):
    if call.name == "join":
      raise KeyboardInterrupt
    return compile_call(call, **rest)

  monkeypatch.setattr(planning, "compile_call", interrupted)
  with pytest.raises(KeyboardInterrupt):
    command.main([*flags(tiny_models), "--only=encode,join,advantages", f"--out={out}"])
  assert [row["name"] for row in json.loads(out.read_text())["rows"]] == ["encode"]
  monkeypatch.setattr(planning, "compile_call", compile_call)
  command.main([*flags(tiny_models), "--only=join,advantages", f"--out={out}"])
  assert [row["name"] for row in json.loads(out.read_text())["rows"]] == [
    "encode",
    "join",
    "advantages",
  ]


def test_a_quick_compilation_promises_no_times(tiny_models, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(
    chips, "chip_of", lambda device: chips.Chip("tiny", 1e12, 1e12, 1e9, 1e9)
  )  # has times
  times = {}
  for effort in ("0", "-1"):
    out = tmp_path / f"plan{effort}.json"
    code = command.main(
      [*flags(tiny_models), "--only=advantages", f"--effort={effort}", f"--out={out}"]
    )
    if code == 2:  # a compiler without the option says so
      assert effort == "-1" and "no such option; use --effort=0" in capsys.readouterr().err
      return
    (result,) = json.loads(out.read_text())["rows"]
    times[effort] = [result[name] for name in ("compute_seconds", "network_seconds")]
    assert result["peak"] > 0 and ("effort of -1" in capsys.readouterr().out) == (effort == "-1")
  assert None not in times["0"] and times["-1"] == [None, None]


@pytest.mark.parametrize("effort", [0.0, -1.0])
def test_the_compiler_is_asked_for_an_effort(effort):
  """With a stand-in for a compiler that has the option, which that for CPUs has not."""
  asked = []

  def compiled(options):
    asked.append(options)
    return SimpleNamespace(as_text=lambda: TPU_TEXT, memory_analysis=Allotted)

  lowered = SimpleNamespace(compile=compiled)
  jaxpr = jax.make_jaxpr(lambda x: x)(1.0)
  traced = SimpleNamespace(lower=lambda: lowered, jaxpr=jaxpr)
  call = inventory.Call("decode", SimpleNamespace(trace=lambda: traced), (), 1)
  chip = chips.Chip("tiny", 1e12, flops=4000.0, clock=100.0, network=50.0)
  row = planning.compile_call(call, 0, flops.Flops(8000.0), chip, 2, effort=effort)
  assert asked == [{"exec_time_optimization_effort": effort} if effort else None]
  times = (row.compute_seconds, row.network_seconds, row.mfu)
  assert row.peak > 0 and [time is None for time in times] == [bool(effort)] * 3


def test_a_file_of_another_plan_is_kept(tiny_models, tmp_path, capsys):
  """...and nothing is compiled before that is found."""
  out = tmp_path / "plan.json"
  assert command.main([*flags(tiny_models), "--only=join", f"--out={out}"]) == 0
  before = out.read_bytes()
  capsys.readouterr()
  assert (
    command.main([*flags(tiny_models), "--only=advantages", "--config.seed=9", f"--out={out}"]) == 2
  )
  said = capsys.readouterr()
  assert (
    "digest differ" in said.err and "compiled in" not in said.out and out.read_bytes() == before
  )


def test_a_folder_that_is_not_ours_matters_where_it_is_written_to(
  tiny_models, tmp_path, capsys, monkeypatch
):
  """Permissions are a stand-in's: root may write anywhere."""
  system = SimpleNamespace(access=lambda *_: False, W_OK=2, path=os.path)
  monkeypatch.setattr(command_line, "os", system)
  assert command.main([*flags(tiny_models), "--only=join"]) == 0
  assert (
    command.main(
      [*flags(tiny_models), "--only=join", f"--out={tmp_path / 'new' / 'planning.json'}"]
    )
    == 2
  )
  (line,) = capsys.readouterr().err.splitlines()
  assert (
    f"no permission to write into {tmp_path}; use another" in line
    and not (tmp_path / "new").exists()
  )


def test_programs_are_chosen_by_name_or_by_its_first_words():
  names = ["encode", "decode", *UPDATE, "show decode", "show score clip", "score clip"]
  assert planning.chosen("", names) == names
  assert planning.chosen("update", names) == UPDATE
  assert planning.chosen("update step,score,encode", names) == ["encode", UPDATE[2], "score clip"]
  assert planning.chosen("show score", names) == ["show score clip"]
  with pytest.raises(ConfigError, match="no program clip, updat; there are encode"):
    planning.chosen("updat,clip,decode", names)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"rows": '])
def test_a_file_that_is_no_plan_is_kept(text, tiny_models, tmp_path, capsys):
  out = tmp_path / "plan.json"
  out.write_text(text)
  assert command.main([*flags(tiny_models), "--only=join", f"--out={out}"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert f"--out={out}: holds no plan; remove it" in line and out.read_text() == text


class Allotted(NamedTuple):
  """What `compiled.memory_analysis()` says."""

  argument_size_in_bytes: int = 1000
  output_size_in_bytes: int = 300
  alias_size_in_bytes: int = 200
  temp_size_in_bytes: int = 50
  generated_code_size_in_bytes: int = 7


def test_times_and_memory_of_a_compiled_program():
  """By hand, of test_flops' text: 1637 cycles; 16 gathers of 256 bytes and 16 all-reduces of 64,
  both ways, a reduce-scatter of 512, and a gather of 128 in parts; a kernel at half of the peak."""
  chip = chips.Chip("tiny", 1e12, flops=4000.0, clock=100.0, network=50.0)
  call, counted = inventory.Call("update accumulate", print, (), 3), flops.Flops(8000.0)
  compiled = planning.Compiled(text=TPU_TEXT, memory=Allotted(), kernels=6000.0)
  row = planning.row_of(call, 10000, counted, compiled, chip, 2)
  moved = 16 * 256 + 16 * 2 * 64 + 512 + 128
  assert row.collective == moved and row.network_seconds == pytest.approx(moved / 50)
  assert row.compute_seconds == pytest.approx(1637 / 100 + 6000 / 2 / 2000)
  assert row.seconds == pytest.approx(row.compute_seconds + row.network_seconds)
  assert row.mfu == pytest.approx(8000 / 2 / 4000 / row.seconds)
  assert row.peak == 10000 + 1000 + (300 - 200) + 50 + 7
  assert (row.arguments, row.temporaries) == (1000, 50)
  compiled = compiled._replace(kernels=0.0)
  stopped = chip._replace(clock=0.0)
  assert planning.row_of(call, 0, counted, compiled, stopped, 2).seconds is None
  compiled = compiled._replace(text=DYNAMIC_TEXT)  # 5 turns of the loop in the place of 16
  longer = planning.row_of(call._replace(turns=5), 0, counted, compiled, chip, 2)
  assert longer.compute_seconds == pytest.approx((5 * 100 + 37) / 100)
  assert longer.collective == 5 * 256 + 5 * 2 * 64 + 512 + 128 and not longer.uncounted


def test_estimates():
  rows = [row("rollout", 1.0)._replace(times=20), row("sample", 1.0)._replace(times=2)]
  assert table.iteration_seconds(rows, 10) == 3.0  # the rollout twice, 1.5 s each; the grid not
  assert table.hours(rows) == pytest.approx(22 * 1.5 / 3600)
  assert table.hours([row("x", 1.0)._replace(compute_seconds=None)]) is None


def test_the_longest_call_of_an_iteration():
  """One call of a program, however often an iteration calls it; not of an evaluation, which few
  iterations have, and not of a program whose time is unknown.
  """
  rows = [
    row("rollout", 1.0)._replace(times=200, compute_seconds=19.0, network_seconds=1.0),
    row("update accumulate", 1.0)._replace(times=40, compute_seconds=18.0, network_seconds=2.62),
    row("update step", 1.0)._replace(times=10, compute_seconds=None),
    row("sample", 1.0)._replace(times=2, compute_seconds=50.0),
  ]
  longest = table.longest_call(rows, 10)
  assert longest.name == "update accumulate" and longest.seconds == 20.62
  assert table.longest_call(rows[2:], 10) is None
  plan = {"config": "x", "device": "TPU v5", "devices": 4, "mesh": {"data": 4}, "geometry": "x"}
  plan |= {"kept": {}, "effort": 0.0, "memory": 2.0, "iterations": 10, "images": 8}
  plan |= {"programs": [row.name for row in rows]}

  def report(rows):
    return table.report(table.concluded(plan | {"rows": [row._asdict() for row in rows]}))

  line = "Longest call of an iteration: update accumulate, 21 s; SIGTERM waits that long."
  assert line in report(rows).splitlines()
  assert "Longest call" not in report(rows[2:])


@pytest.mark.parametrize(
  "extra, words",
  [
    (["--topology=v5p:4x4x4"], ["needs the TPU compiler", "pip install 'jax[tpu]=="]),
    (["--topology=h100:8"], ["needs the compiler for NVIDIA GPUs", "pip install 'jax[cuda13]=="]),
    (["--out=plan.txt"], ["--out=plan.txt", "must end with .json"]),
    (["--out=/dev/null/plan.json"], ["--out=/dev/null/plan.json", "/dev/null is not a folder"]),
    (["--hlo=/dev/null/hlo"], ["--hlo=/dev/null/hlo", "/dev/null is not a folder"]),
    (["--effort=low"], ["--effort=low", "number from -1"]),
    (["--only=updat"], ["--only=updat", "no program updat", "rollout"]),
    (["--config.mesh.data=3"], ["mesh.data = 3", "does not use 8 devices"]),
    (["--config.model.checkpoint=no/such-model"], ["no/such-model", "unet/config.json"]),
  ],
)
def test_mistakes_are_one_line_and_exit_code_2(extra, words, tiny_models, capsys, monkeypatch):
  monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
  assert command.main([*flags(tiny_models), *extra]) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: ")
  for word in words:
    assert word in lines[0]


@pytest.mark.parametrize(
  "name", ["v9:2x2", "v5p", "foo", "v5p:3x3x3x3", "h100", "h100:0", "h100:2x4", "h101:8"]
)
def test_a_topology_that_nobody_knows(name, monkeypatch):
  monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: "installed")
  with pytest.raises(ConfigError) as caught:
    topologies.devices(name)
  assert f"--topology={name}: unknown" in str(caught.value) and "v5p:4x4x4" in str(caught.value)
  assert "h100:8" in str(caught.value)


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed (requirements-tpu.txt)",
)
def test_a_shape_that_libtpu_refuses():
  with pytest.raises(ConfigError, match="libtpu refuses it"):
    topologies.devices("v5p:3x3x3")
  assert len(topologies.devices("v5p:2x2x1")) == 4


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed (requirements-tpu.txt)",
)
def test_tpus_gather_kernels_whole():
  """A product with a kernel over 32 chips: without the option the kernel's pieces go around a ring.

  The options of `--effort` come on top.
  """
  devices = topologies.devices("v5p:2x4x4")
  mesh = sharding.make_mesh(ConfigDict({"data": 1, "fsdp": 32, "tensor": 1}), devices)
  config = ConfigDict({"model": {"matmul_precision": "default"}})
  x = jax.ShapeDtypeStruct((32, 12800, 3072), jnp.bfloat16, sharding=sharding.batch_sharding(mesh))
  kernel = jax.ShapeDtypeStruct(
    (3072, 6144), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P("fsdp", None))
  )

  def moves(function, options=None):
    text = function.lower(x, kernel).compile(options).as_text()
    return [word for word in ("all-gather", "collective-permute") if word in text]

  with jax.set_mesh(mesh):
    product = jitted.program(config, "product", jnp.matmul)
    assert moves(product) == moves(product, {"exec_time_optimization_effort": -1.0})
    assert moves(product) == ["all-gather"]
    assert moves(jax.jit(jnp.matmul)) == ["collective-permute"]


@pytest.mark.skipif(
  not has_cuda_compiler(), reason="JAX's CUDA plugin is not installed (requirements-gpu.txt)"
)
def test_a_gpu_s_attention_compiles_without_one():
  """FLUX's joint attention at 720x720, 2537 tokens, forward and backward, over two cards: cuDNN's
  kernels are in the program.
  """
  cards = topologies.devices("h100:2")
  chip = chips.chip_of(cards[0])
  assert (len(cards), chip.flops, round(chip.memory / 2**30)) == (2, 989e12, 73)
  mesh = sharding.make_mesh(ConfigDict({"data": 2, "fsdp": 1, "tensor": 1}), cards)
  x = jax.ShapeDtypeStruct((2, 2537, 24, 128), "bfloat16", sharding=sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    assert attention.place() == attention.Place("gpu", (9, 0))
    gradient = jax.grad(
      lambda q, k, v: attention.attention(q, k, v).astype("float32").sum(), (0, 1, 2)
    )
    text = jax.jit(gradient).lower(x, x, x).compile().as_text()
  assert (
    "__cudnn$fmhaSoftmax" in text
    and "__cudnn$fmhaSoftmaxBackward" in text
    and "all-gather" not in text
  )


@pytest.mark.parametrize(
  "name", ["sd_hps_clip", "sd_pick", "sd_aesthetic", "flux_hps", "flux_hps_lora", "flux_hps_clip"]
)
def test_the_configs_networks_are_described_here(name):
  """No download is needed to plan them."""
  config = inventory.without_weights(config_file.load(str(ROOT / "configs" / f"{name}.py")))
  assert (
    config.model.checkpoint.startswith("random:") and "assets/published" in config.model.checkpoint
  )
