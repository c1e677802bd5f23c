"""benchmarks/gpu.py at tiny sizes on a CPU, what it says where a part fails, and its pieces. Needs
no GPU."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import results  # noqa: E402
from gpu_parts import (  # noqa: E402
  attention_errors,
  cuts,
  drawing,
  kernel_kinds,
  kernel_times,
  measure,
  ours,
  page,
  peer_times,
  registry,
  run_errors,
  runner,
)

from dancegrpo_jax.assembly import loading, reward_builders  # noqa: E402
from dancegrpo_jax.checkpoints import weights  # noqa: E402
from dancegrpo_jax.compilation import inventory  # noqa: E402
from dancegrpo_jax.data import prompts  # noqa: E402
from dancegrpo_jax.devices import sharding  # noqa: E402
from dancegrpo_jax.settings import checks, config_file, geometry  # noqa: E402
from dancegrpo_jax.types import Example  # noqa: E402


def run(*flags: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "benchmarks/gpu.py", *flags]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """(the process, the parts of its JSON file, the section that it wrote)."""
  folder = tmp_path_factory.mktemp("gpu")
  (folder / "R.md").write_text("# By hand\n")
  parts = "chip,programs-flux,kernels-flux"
  ran = run(
    "--tiny", f"--parts={parts}", f"--out={folder / 'gpu.json'}", f"--results={folder / 'R.md'}"
  )
  return ran, json.loads((folder / "gpu.json").read_text())["parts"], (folder / "R.md").read_text()


def test_every_row_of_the_parts_has_its_numbers(measured):
  ran, parts, _ = measured
  assert ran.returncode == 0, ran.stdout + ran.stderr
  assert set(parts) == {"chip", "programs-flux", "kernels-flux"}
  for part in parts.values():
    assert part["problem"] == "" and all(
      row["cells"] and not row["problem"] for row in part["rows"].values()
    )
  rate = parts["chip"]["rows"]["bf16 product"]["cells"]["rate"]
  assert (
    rate["low"] <= rate["value"] <= rate["high"] and rate["runs"] >= 2 and rate["unit"] == "TFLOP/s"
  )
  rows = parts["programs-flux"]["rows"]
  assert set(rows) == set(registry.PROGRAMS)
  for row in rows.values():  # a CPU has no peak, neither of speed nor of memory
    assert (
      set(row["cells"]) == {"first call", "time", "memory by plan"}
      and row["cells"]["first call"]["value"] > 0
    )
  assert "accumulate compiled in" in rows["update"]["note"]
  assert re.search(
    r"one call at a time: 1 x deal .* s, .*1 x accumulate .* s", rows["update"]["note"]
  )
  kernels = parts["kernels-flux"]["rows"]["update"]["cells"]
  assert sum(kernels[kind]["value"] for kind in registry.KINDS) == pytest.approx(100)


def test_the_section_says_what_and_how(measured):
  _, _, text = measured
  assert text.startswith(
    "# By hand\n\n<!-- begin: gpu (benchmarks/gpu.py) -->\n## One NVIDIA GPU\n"
  )
  assert f"jax {jax.__version__}" in text and "Tiny sizes: the numbers say nothing" in text
  assert "`python benchmarks/gpu.py --tiny --parts=chip,programs-flux,kernels-flux`" in text
  assert "| rollout | - | - | - | - | - | not measured: run with --parts=programs-sd |" in text
  assert str(ROOT) not in text


def test_the_table_is_printed_as_numbers_come(measured):
  out = measured[0].stdout
  assert "minutes at most" in out.splitlines()[0]  # before anything is started
  assert (
    out.index("  bf16 product: rate ")
    < out.index("programs-flux: Programs of FLUX.1-dev")
    < out.index("The chip\n\n|")
  )


HEAVY = [
  "start-emoji_clip",
  "main-sd",
  "main-flux",
  "precision",
  "correctness",
  "programs-sd",
  "kernels-sd",
  "peer-sd",
  "peer-flux",
]


@pytest.mark.slow
@pytest.mark.parametrize("parts", HEAVY)
def test_a_heavy_part(parts, tmp_path):
  """Each takes one to eight minutes on two cores; of PyTorch's side the compiler most of it."""
  ran = run("--tiny", f"--parts={parts}", "--minutes=15", f"--out={tmp_path / 'gpu.json'}")
  assert ran.returncode == 0, ran.stdout + ran.stderr
  for part in json.loads((tmp_path / "gpu.json").read_text())["parts"].values():
    assert all(row["cells"] and not row["problem"] for row in part["rows"].values())


FAKES = """
import time


def run(context):
  context.say.device("a fake")
  context.say.row("first", rate={"value": 1.0, "unit": "s"})
  if context.argument == "crash":
    raise RuntimeError("no such kernel")
  if context.argument == "exit":
    import os
    os._exit(7)
  time.sleep(0 if context.argument == "fine" else 60)
  context.say.row("second", rate={"value": 2.0, "unit": "s"})
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
  (tmp_path / "fake_part.py").write_text(FAKES)
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))

  def part(argument: str, seconds: float = 20.0) -> registry.Part:
    return registry.Part(
      argument, "fake_part", argument, seconds, argument, ("rate",), ("first", "second")
    )

  return part


@pytest.mark.parametrize(
  "argument, seconds, why",
  [
    ("crash", 20.0, "RuntimeError: no such kernel"),
    ("exit", 20.0, "its process ended with code 7"),
    ("sleep", 4.0, "over its budget of 4 s"),
  ],
)
def test_a_part_that_fails_keeps_what_it_had(argument, seconds, why, fakes, tmp_path):
  """...and the next ones run."""
  kept, said = {}, []
  parts = (fakes(argument, seconds), fakes("fine"))
  runner.run(parts, seconds + 20.0, tmp_path, False, said.append, kept.__setitem__)
  rows = kept[argument]["rows"]
  assert rows["first"]["cells"]["rate"]["value"] == 1.0 and not rows["first"]["problem"]
  assert (
    not rows["second"]["cells"] and rows["second"]["problem"] == kept[argument]["problem"] == why
  )
  assert (
    kept["fine"]["problem"] == ""
    and kept["fine"]["rows"]["second"]["cells"]["rate"]["value"] == 2.0
  )
  text = page.table(kept[argument])
  assert "| first | 1 s |  |" in text and f"| second | - | not measured: {why} |" in text
  assert any(why in line for line in said)


def test_what_there_is_no_time_for_is_not_begun(fakes, tmp_path):
  kept = {}
  runner.run((fakes("fine"),), 1.0, tmp_path, False, lambda _: None, kept.__setitem__)
  assert {row["problem"] for row in kept["fine"]["rows"].values()} == {"no time was left of 1 s"}


def test_more_time_than_asked_for_is_shared_out(fakes, tmp_path):
  said = []
  runner.run((fakes("fine", 10.0),), 40.0, tmp_path, False, said.append, lambda *_: None)
  assert said[0] == "fine: fine, at most 40 s"


def told(run) -> dict[str, dict]:
  """The rows that `run(say)` tells, of a worker that isn't one."""
  rows = {}
  say = SimpleNamespace(
    cells=lambda name, cells, note="": rows.update({name: cells}),
    failed=lambda name, why: rows.update({name: why}),
  )
  run(say)
  return rows


def test_errors_of_an_attention_with_odd_lengths():
  rows = told(lambda say: attention_errors.compare(say, "odd", (65, 77, 2, 40, 1, True)))
  cells = rows["odd"]
  assert cells["kernel"] == {"text": "xla"}
  assert 1e-4 < cells["value"]["value"] == cells["value by xla"]["value"] < 1e-2
  assert 1e-4 < cells["gradient"]["value"] < 1e-2


def test_errors_are_the_largest_and_never_hidden():
  value, exact = jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])
  assert attention_errors.errors((value, (value, exact)), (exact, (exact, exact))) == (0.5, 0.5)
  broken = jnp.array([1.0, jnp.nan])
  _, gradient = attention_errors.errors((value, (broken, value)), (exact, (exact, exact)))
  assert np.isnan(gradient)


def test_parts_by_name_and_what_they_may_take():
  names = [part.name for part in registry.choose("kernels,chip")]
  assert names == ["chip", "kernels-flux", "kernels-sd"] and len(registry.choose("all")) == len(
    registry.ALL
  )
  assert (
    registry.total_of("", registry.choose("")) <= 6 * 60
    and registry.total_of("all", registry.ALL) <= 9 * 60
  )
  assert tuple(part.name for part in registry.choose("")) == registry.DEFAULT


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--parts=chips"], ["no part chips", "kernels"]),
    (["--minutes=0"], ["above 0"]),
    (["--out=no/such/x.json"], ["--out=no/such/x.json", "make it"]),
  ],
)
def test_mistakes_are_one_line(flags, words, capsys):
  with pytest.raises(SystemExit) as caught:
    gpu.parse(flags)
  (line,) = capsys.readouterr().err.splitlines()
  assert (
    caught.value.code == 2 and line.startswith("error: ") and all(word in line for word in words)
  )


def test_tiny_numbers_go_nowhere_by_themselves():
  assert (gpu.parse(["--tiny"]).out, gpu.parse(["--tiny"]).results) == (None, None)
  assert (gpu.parse([]).out, gpu.parse([]).results) == (gpu.OUT, results.FILE)


# Kernels as a profiler names them on an H100; those of an RTX 4090 and of a CPU where they differ.
KERNELS = {
  "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64": "attention",
  "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_30_64x64x64": "attention",
  "fmha_v2_flash_attention_fp16_64_32_S_q_k_v_128_sm89_kernel": "attention",
  "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128": "convolution",
  "sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc": "convolution",
  "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16>": "convolution",
  "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT": "product",
  "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1": "product",
  "gemm_fusion_dot_203": "product",
  "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": "product",
  "loop_add_multiply_fusion_12": "element-wise",
  "wrapped_convert": "element-wise",
  "input_reduce_fusion_3": "reduction",
  "input_add_reduce_fusion": "reduction",
  "triton_softmax_7": "reduction",
  "loop_convert_fusion": "element-wise",
  "wrapped_transpose": "copy",
  "input_concatenate_fusion": "copy",
  "loop_dynamic_update_slice_fusion": "copy",
  "MemcpyD2D": "copy",
  "void cudnn::ops::nhwcToNchwKernel<__nv_bfloat16, __nv_bfloat16, float, true, false>": "copy",
  "sort.3": "other",
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_kind_of_a_kernel(name):
  assert kernel_kinds.kind_of(name) == KERNELS[name]


def test_time_by_kind():
  spent = kernel_kinds.totals(
    [("nvjet_a", 2.0), ("gemm_b", 1.0), ("loop_add_fusion", 0.5), ("sort.3", 0.25)]
  )
  assert spent == {"product": 3.0, "element-wise": 0.5, "other": 0.25} and set(
    KERNELS.values()
  ) == set(registry.KINDS)


def test_kernels_of_a_gpu_are_its_streams():
  """What sums them up, by operation or module, isn't counted again."""

  def line(name, *events):
    return SimpleNamespace(
      name=name, events=[SimpleNamespace(name=n, duration_ns=t, stats=()) for n, t in events]
    )

  lines = [
    line("Stream #15(Compute,MemcpyD2D)", ("nvjet_a", 2e9), ("MemcpyD2D", 1e9)),
    line("Stream #17(Compute)", ("loop_b", 5e8)),
    line("XLA Modules", ("jit_run", 4e9)),
    line("XLA Ops", ("dot.1", 2e9)),
  ]
  planes = [
    SimpleNamespace(name="/host:CPU", lines=[line("x", ("y", 1e9))]),
    SimpleNamespace(name="/device:GPU:0", lines=lines),
  ]
  found = kernel_times.kernels_of(SimpleNamespace(planes=planes))
  assert found == [("nvjet_a", 2.0), ("MemcpyD2D", 1.0), ("loop_b", 0.5)]


@pytest.mark.parametrize("model", ["sd", "flux"])
def test_the_cut_recipes_are_sound_and_of_full_size(model, tmp_path):
  """One device takes them; networks, image size, sampler and batches are the recipe's; texts are as
  long as the networks'."""
  config = cuts.load(model, False, tmp_path)
  examples = prompts.read_examples(config)
  checks.validate(config, num_devices=1, num_examples=len(examples))
  assert not prompts.read_held_out(config) and config.evaluation.every == 0
  full = gpu_config(model)
  for section, fields in {
    "model": ("size", "dtype", "remat", "attention"),
    "sampler": ("kind", "steps", "guidance_scale"),
  }.items():
    assert all(config[section][field] == full[section][field] for field in fields)
  assert config.lora.rank == full.lora.rank and config.reward.terms == full.reward.terms
  assert (
    config.rollout.chunk == full.rollout.chunk
    and config.optimizer.microbatch == full.optimizer.microbatch
  )
  batches = geometry.of(config)
  assert (batches.trained_steps, batches.updates, batches.microbatches) == (4, 2, 2)
  pipeline, rewards = loading.build_pipeline(config), reward_builders.build_rewards(config)
  tokens = jax.tree.leaves(pipeline.prepare([Example(0, "a cat")]))
  assert {x.shape[1] for x in tokens} == ({77} if model == "sd" else {77, 512})
  assert {x.shape[-1] for x in jax.tree.leaves(rewards["hps"].prepare(examples[:1]))} == {77}
  size = sum(np.prod(x.shape) for x in jax.tree.leaves(pipeline.components["denoiser"].abstract))
  assert size == {"sd": 859_520_964, "flux": 11_901_408_320}[model]


def gpu_config(model: str):
  return config_file.load(cuts.preset_of(model, False))


def test_weights_drawn_on_the_device_are_spread_as_those_of_the_host(tmp_path, monkeypatch):
  monkeypatch.setattr(drawing, "SMALL", 500)
  config = inventory.without_weights(cuts.load("flux", True, tmp_path))
  component = loading.build_pipeline(config).components["denoiser"]
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  ours, theirs = (
    make(component.abstract, sharding.replicated(mesh), table=component.table)
    for make in (drawing.draw, weights.draw)
  )
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
    assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
    if a.size > 200:
      assert float(a.std()) == pytest.approx(float(b.std()), rel=0.2, abs=1e-6)
  again = drawing.draw(component.abstract, sharding.replicated(mesh))
  assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(again)))


def fail():
  raise MemoryError("no room")


def taking_turns(ours, theirs: dict, same=lambda row, seconds: seconds) -> tuple[list[str], dict]:
  """(who was called, in order; the rows told) of turns of functions."""
  called, rows = [], {}

  def tell(name, cells, note=""):
    if not isinstance(rows.get(name), dict):
      rows[name] = {}
    rows[name] |= cells

  def noted(name, function):
    def call():
      called.append(name)
      return function()

    return call

  side = object.__new__(peer_times.Side)  # without networks
  side.peak_flops = 0.0
  side.say = SimpleNamespace(cells=tell, failed=lambda name, why: rows.update({name: why}))
  side.peer = SimpleNamespace(free=lambda: None, wait=lambda _: None, peak=lambda: None)
  makers = {row: lambda row=row, make=make: noted(row, make) for row, make in theirs.items()}
  flops = dict.fromkeys(["ours", *theirs], 1.0)
  side.turns(noted("ours", ours), makers, "ours", flops, 2, same)
  order = [name for i, name in enumerate(called) if i == 0 or name != called[i - 1]]
  return order, rows


def test_turns_alternate_and_what_is_compiled_comes_last():
  order, rows = taking_turns(lambda: 0, {"compiled": lambda: 1, "eager": lambda: 2})
  assert order == ["ours", "eager", "ours", "eager", "ours", "compiled", "ours", "compiled"]
  assert rows["ours"]["time"]["runs"] == 8 and rows["eager"]["time"]["runs"] == 8
  ratio = rows["eager"]["time"]["value"] / rows["ours"]["time"]["value"]
  assert rows["eager"]["ours is faster by"]["value"] == pytest.approx(ratio)


def test_a_side_that_fails_leaves_the_others_their_turns():
  _, rows = taking_turns(lambda: 0, {"eager": fail, "other": lambda: 1})
  assert rows["eager"] == "MemoryError: no room" and rows["other"]["ours is faster by"]["value"] > 0
  _, rows = taking_turns(fail, {"eager": lambda: 1})
  assert rows["ours"] == "MemoryError: no room" and set(rows["eager"]) == {"time"}
  _, rows = taking_turns(lambda: 0, {"eager": lambda: 1}, lambda row, seconds: None)
  assert set(rows["eager"]) == {"time"}


def test_the_work_of_an_iteration(tmp_path):
  """By hand: half of 4 microbatches are scored once more; guidance has two rows."""
  work = ours.Work(cuts.load("sd", False, tmp_path))
  assert (work.steps, work.chunk_rows, work.microbatch_rows) == (50, 32, 32)
  assert (work.microbatches, work.old_passes) == (4, 2)
  work = ours.Work(cuts.load("flux", False, tmp_path))
  assert (work.steps, work.chunk_rows, work.microbatch_rows) == (12, 8, 8)
  assert (work.microbatches, work.old_passes) == (4, 2)


def test_rows_of_two_runs():
  row = {
    "iteration": 0,
    "reward/mean": 0.5,
    "loss": None,
    "time/total": 1.0,
    "samples_per_second": 3.0,
  }
  assert run_errors.agreement([row], [row | {"time/total": 2.0, "samples_per_second": 1.0}])[
    "result"
  ] == {"text": "equal"}
  other = run_errors.agreement([row], [row | {"reward/mean": 0.55, "loss": 1.0}])
  assert (
    other["result"] == {"text": "not equal"}
    and "2 metrics differ" in other["note"]
    and "reward/mean by 0.091" in other["note"]
  )


def test_times():
  assert len(measure.timed(lambda: None, lambda _: None, count=3)) == 3
  assert len(measure.timed(lambda: None, lambda _: None, seconds=0.0)) == 2
  assert measure.shown(measure.spread([3.0, 1.0, 2.0], "s")) == "2 s (1 to 3, 3 runs)"


def test_the_page_has_a_row_for_all_that_the_command_fills(tmp_path):
  """...each of which says that it isn't measured, or what was."""
  text = page.section({})
  rows = [name for part in registry.ALL for name in part.rows]
  assert text.count("not measured: run with --parts=") == len(rows) and page.EMPTY in text
  assert "<!-- begin: gpu (benchmarks/gpu.py) -->" in results.FILE.read_text()
  written = results.FILE.read_text()
  assert all(f"\n| {name} |" in written for name in rows)


def test_every_attention_that_cudnn_computes_is_compared():
  """Those of docs/gpus.md: queries, keys, heads and their size."""
  rows = [
    line
    for line in (ROOT / "docs" / "gpus.md").read_text().splitlines()
    if line.endswith("| cudnn | cudnn |")
  ]
  rows += [
    line
    for line in (ROOT / "docs" / "gpus.md").read_text().splitlines()
    if line.endswith("| cudnn | xla |")
  ]
  wanted = {
    tuple(int(n) for n in re.findall(r"\d+", "|".join(line.split("|")[2:5]))) for line in rows
  }
  assert len(wanted) == 18 and wanted == {sizes[:4] for sizes in registry.ATTENTIONS.values()}
