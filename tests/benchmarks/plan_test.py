"""Plans of training steps, against the steps themselves."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from rag_jax.api.configs import run_config
from rag_jax.benchmarks import abstract_step
from rag_jax.benchmarks import embedding_plan
from rag_jax.benchmarks import plan as plans
from rag_jax.benchmarks.abstract_step import AbstractStep
from rag_jax.benchmarks.memory_estimate import estimated_parts
from rag_jax.config import Config
from rag_jax.config import IndexConfig
from rag_jax.retrieval import scann
from rag_jax.retrieval.index import build_index
from rag_jax.retrieval.retriever import RetrieverSnapshots
from rag_jax.training.stages import make_stages
from rag_jax.training.state import init_params

ROOT = pathlib.Path(__file__).parents[2]
KEYS = {
  "topology", "num_chips", "hbm_bytes_per_chip", "hbm_capacity_bytes", "fits",
  "flops_per_chip", "hbm_traffic_bytes_per_chip", "collective_bytes_per_chip",
  "step_secs_estimate", "mfu_estimate",
}  # fmt: skip


def make_config(**changes):
  config = Config()
  config.encoder.vocab_size = config.generator.vocab_size = 600
  config.data.num_passages = 1000
  config.data.n_docs = 2
  config.train.batch_size = 8
  config.eval.batch_size = 8
  config.train.compute_dtype = "bfloat16"
  return plans.with_settings(config, changes)


@pytest.fixture
def no_compiler(monkeypatch):
  for module in (plans, abstract_step, embedding_plan):
    monkeypatch.setattr(module, "has_compiler", lambda: False)


@pytest.mark.usefixtures("no_compiler")
def test_a_plan_has_the_documented_keys_and_units():
  config = make_config()
  plan = plans.make_plan(config, "v5e:2x4", 0)
  result = json.loads(json.dumps(plan.as_json()))
  assert set(result) >= KEYS
  assert result["num_chips"] == 8
  assert result["hbm_capacity_bytes"] == 16 * 2**30
  assert result["fits"]
  assert not result["compiled"]
  assert 0 < result["mfu_estimate"] <= 1
  one = plans.make_plan(config, "v5e:1x1", 0)
  assert one.model_flops == pytest.approx(8 * plan.model_flops)
  assert one.step_secs == pytest.approx(
    (one.model_flops + one.recomputed_flops) / 197e12
  )
  text = plans.report(plan)
  assert "v5e:2x4: 8 chips, mesh data=8 x fsdp=1 x tensor=1" in text
  assert "A real step takes longer." in text


@pytest.mark.usefixtures("no_compiler")
def test_recomputation_costs_arithmetic_and_saves_memory():
  plan = {
    remat: plans.make_plan(
      make_config(**{"train.remat": remat, "data.context_length": 512}),
      "v5e:1x1",
      0,
    )
    for remat in ("none", "dots", "attention", "full")
  }
  flops = [p.recomputed_flops for p in plan.values()]
  sizes = [p.hbm_peak for p in plan.values()]
  assert flops[0] == 0
  assert flops == sorted(flops)
  assert sizes == sorted(sizes, reverse=True)


@pytest.mark.usefixtures("no_compiler")
def test_settings_are_found_with_which_a_large_step_fits():
  config = make_config(
    **{
      "train.batch_size": 8192,
      "data.context_length": 512,
      "generator.max_positions": 512,
    }
  )
  plan = plans.make_plan(config, "v5e:2x2", 0)
  assert not plan.fits
  assert "It needs" in plan.problem
  changes, changed = next(plans.suggest(plan))
  assert changes["train.scan_layers"]
  assert plans.make_plan(changed, "v5e:2x2", 0).fits


# What libtpu 0.0.50 says, and what its predecessors said.
TEMPORARIES = (
  "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the"
  " total memory required for HLO temporaries (83.01G) exceeds available HBM"
  " (15.75G). HLO module: jit_on_mesh.\nSee https://openxla.org/xla/errors"
)
ALL = (
  "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.29G of"
  " 15.75G hbm. Exceeded hbm capacity by 2.54G."
)


@pytest.mark.parametrize(
  "message", [TEMPORARIES, ALL, "RESOURCE_EXHAUSTED: too large"]
)
def test_a_program_that_its_compiler_refuses_does_not_fit(message, monkeypatch):
  def refuse(self):
    raise jax.errors.JaxRuntimeError(message)

  devices = plans.topology_devices("v5e:1x1")[0], jax.devices()[:1]
  monkeypatch.setattr(plans, "topology_devices", lambda _: devices)
  monkeypatch.setattr(plans, "has_compiler", lambda: True)
  monkeypatch.setattr(AbstractStep, "compile", refuse)
  plan = plans.make_plan(make_config(), "v5e:1x1", 0)
  assert not plan.fits
  assert plan.as_json()["compiled"]
  arguments = sum(plan.hbm_parts.values()) - plan.hbm_parts["activations"]
  expected = {
    TEMPORARIES: 83.01 * 2**30 + arguments,
    ALL: 18.29 * 2**30,
  }.get(message, plan.hbm_peak)
  assert plan.hbm_peak == pytest.approx(expected, abs=2)
  assert message.splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ") in (
    plans.report(plan)
  )


@pytest.mark.parametrize(
  ("topology", "message"),
  [
    ("v9:2x2", "names no known chip"),
    ("v5e", "does not say how many chips"),
    ("v5e:axb", "does not say how many chips"),
    ("h100:8", "is no TPU"),
  ],
)
def test_a_topology_that_does_not_exist_is_refused(topology, message):
  with pytest.raises(ValueError, match=message):
    plans.make_plan(make_config(), topology, 0)


@pytest.mark.usefixtures("no_compiler")
def test_a_config_that_does_not_fit_the_mesh_is_refused():
  with pytest.raises(ValueError, match=r"must be a multiple of 64"):
    plans.make_plan(make_config(), "v5e:8x8", 0)


def test_a_config_without_sizes_is_refused():
  config = make_config(**{"encoder.vocab_size": 0, "data.num_passages": 0})
  with pytest.raises(
    ValueError, match=r"encoder\.vocab_size, data\.num_passages"
  ):
    plans.make_plan(config, "v5e:2x2", 0)


SEARCHES = {
  "between steps": {},
  "in the step": {
    "index.kind": "device",
    "index.refresh_rows": 8,
    "data.substitute_answers": 0.0,
  },
  "frozen passages": {
    "encoder.tied": False,
    "encoder.train_passage_encoder": False,
  },
  "closed book": {"data.n_docs": 0},
}


@pytest.mark.parametrize("search", SEARCHES)
def test_the_step_of_a_plan_is_the_step_of_a_run(search, tiny):
  config = plans.with_settings(tiny.config(), SEARCHES[search])
  experiment, _, _ = tiny.open(config)
  sizes = experiment.tokenizer.vocab_size
  config = plans.with_settings(
    config, {"encoder.vocab_size": sizes, "generator.vocab_size": sizes}
  )
  step = AbstractStep.make(config, jax.devices()[:1], len(experiment.passages))
  stage = make_stages(experiment, tiny.split("train"))[-1]
  params, _ = init_params(experiment.init, jax.random.key(0), experiment.mesh)
  assert shapes(step.state.params) == shapes(params)
  index = None
  if search in ("between steps", "frozen passages"):
    retriever = RetrieverSnapshots(experiment.mesh).take(params)
    index = experiment.index_builder.build(retriever)
  else:
    retriever = params
  batch = stage.prepare(0, retriever, index, None).batch
  assert shapes(step.batch) == shapes(batch)


def shapes(tree):
  return {
    jax.tree_util.keystr(path): (np.shape(x), str(np.asarray(x).dtype))
    if not isinstance(x, jax.ShapeDtypeStruct)
    else (x.shape, str(x.dtype))
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_the_program_of_a_plan_compiles_and_its_parts_are_counted():
  config = make_config(
    **{
      "index.kind": "device",
      "index.refresh_rows": 8,
      "train.scan_layers": True,
      "train.accumulate": 2,
    }
  )
  step = AbstractStep.make(config, jax.devices()[:1], 1000)
  memory = step.compile().memory_analysis()
  parts = step.hbm_parts()
  assert set(parts) == {"parameters", "optimizer", "batch", "index", "tokens"}
  # Beside the parts: a counter and a key.
  difference = memory.argument_size_in_bytes - sum(parts.values())
  assert 0 <= difference < 100
  estimate = estimated_parts(config, num_chips=1, num_passages=1000)
  for name in ("parameters", "optimizer", "index", "tokens"):
    assert estimate[name] == pytest.approx(parts[name], rel=0.02), name


@pytest.mark.parametrize(("topology", "settings"), [
  ("v4:2x2x1", {"chip_config_name": "megacore"}), ("v5e:2x2", {}),
  ("v5p:2x2x1", {}),
])  # fmt: skip
def test_both_cores_of_a_v4_chip_are_one_device(
  topology, settings, monkeypatch
):
  asked = []

  def describe(name, platform, **more):
    asked.append((name, platform, more))
    return types.SimpleNamespace(devices=[None] * 4)

  monkeypatch.setattr(abstract_step, "has_compiler", lambda: True)
  monkeypatch.setattr(abstract_step, "_NO_MACHINE", {})
  monkeypatch.setattr(abstract_step.topologies, "get_topology_desc", describe)
  assert len(abstract_step.topology_devices(topology)[1]) == 4
  assert asked == [(topology, "tpu", settings)]


@pytest.mark.usefixtures("no_compiler")
def test_an_index_that_hosts_search_is_compared_with_their_memory():
  config = run_config(ROOT / "configs/nq_scann.py")
  plan = plans.make_plan(config, "v5e:8x8", 0)
  # Each of the 16 hosts has four of the 64 shards.
  assert plan.host_parts["embeddings"] == pytest.approx(
    21_015_300 * 768 * 4 / 16, rel=1e-5
  )
  config.index.passages_per_shard = 0
  plan = plans.make_plan(config, "v5e:8x8", 0)
  assert plan.host_parts["embeddings"] == 21_015_300 * 768 * 4
  assert plans.report(plan).count("\n  peak ") == 2
  assert plan.as_json()["host_capacity_bytes"] == 192 * 2**30
  two = plans.with_settings(config, {"encoder.train_passage_encoder": True})
  refused = plans.make_plan(two, "v5e:8x8", 0)
  whole = sum(plan.host_parts.values())
  assert sum(refused.host_parts.values()) == 2 * whole
  assert refused.fits_chip
  assert not refused.fits
  assert "Its index needs 196 GiB on each host, but a host of v5e has 192" in (
    plans.report(refused)
  )
  assert plans.make_plan(two, "v5p:4x4x4", 0).fits
  in_chips = run_config(ROOT / "configs/nq_rag_token.py")
  assert not plans.make_plan(in_chips, "v5e:8x8", 0).host_parts


@pytest.mark.parametrize("settings", [{}, {"scann_soar_lambda": 1.5}])
def test_scann_adds_as_many_bytes_as_planned(settings):
  config = IndexConfig(kind="scann", scann_tree_passages=50)
  for name, value in settings.items():
    setattr(config, name, value)
  embeddings = np.random.default_rng(0).normal(size=(64, 8))
  index = build_index(
    embeddings, config, encoder_fingerprint="", passages_fingerprint=""
  )
  planned = scann.planned_bytes(64, 8, config)
  assert index.memory_bytes == 64 * 8 * 4 + planned


@pytest.mark.usefixtures("no_compiler")
def test_a_plan_is_of_the_type_that_auto_means_on_a_tpu():
  auto, given = (
    plans.make_plan(make_config(**{"train.compute_dtype": name}), "v5e:1x1", 0)
    for name in ("auto", "bfloat16")
  )
  assert auto.hbm_parts == given.hbm_parts


@pytest.mark.usefixtures("no_compiler")
def test_without_steps_the_embedding_of_all_passages_is_planned():
  config = run_config(ROOT / "configs/wiki_embed.py")
  plan = embedding_plan.make_embedding_plan(config, "v5e:8x8", 0)
  assert plan.fits
  assert plan.batch_per_chip == config.index.embed_batch_size / 4
  # Two operations per weight and token, and what attention adds.
  e, tokens = config.encoder, 21_015_300 * 160
  weights = e.num_layers * (4 * e.embed_dim**2 + 2 * e.embed_dim * e.mlp_dim)
  attention = 4 * e.num_layers * e.embed_dim * 160
  assert plan.flops == tokens * (2 * weights + attention)
  assert plan.secs == pytest.approx(plan.flops / 64 / 197e12)
  result = json.loads(json.dumps(plan.as_json()))
  assert result["storage_bytes"]["bfloat16"] == 21_015_300 * 768 * 2
  # A step embeds a batch: all passages take so many steps.
  steps = 21_015_300 / (plan.batch_per_chip * 64)
  assert result["step_secs_estimate"] * steps == pytest.approx(plan.secs)
  assert result["flops_per_chip"] * steps * 64 == pytest.approx(plan.flops)
  assert result["mfu_estimate"] == pytest.approx(1)  # nothing else is counted
  text = embedding_plan.report(plan)
  assert "They embed 21,015,300 passages of up to 160 tokens" in text
  assert "--storage=bfloat16" in text


@pytest.mark.usefixtures("no_compiler")
def test_a_batch_that_does_not_fit_says_what_to_lower():
  config = run_config(ROOT / "configs/wiki_embed.py")
  config.index.embed_batch_size = 100_000
  plan = embedding_plan.make_embedding_plan(config, "v5e:8x8", 0)
  assert not plan.fits
  assert "Lower index.embed_batch_size" in embedding_plan.report(plan)
  config.encoder.vocab_size = config.data.num_passages = 0
  with pytest.raises(
    ValueError, match=r"encoder\.vocab_size, data\.num_passages"
  ):
    embedding_plan.make_embedding_plan(config, "v5e:8x8", 0)


def test_a_batch_that_the_compiler_refuses_does_not_fit(monkeypatch):
  def refuse(*_):
    raise jax.errors.JaxRuntimeError(TEMPORARIES)

  devices = plans.topology_devices("v5e:1x1")[0], jax.devices()[:1]
  monkeypatch.setattr(embedding_plan, "topology_devices", lambda _: devices)
  monkeypatch.setattr(embedding_plan, "has_compiler", lambda: True)
  monkeypatch.setattr(embedding_plan, "_compile", refuse)
  config = run_config(ROOT / "configs/wiki_embed.py")
  plan = embedding_plan.make_embedding_plan(config, "v5e:1x1", 0)
  assert not plan.fits
  text = embedding_plan.report(plan)
  assert "Ran out of memory on HBM" in text
  assert text.endswith("Lower index.embed_batch_size.")


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
  "name", ["nq_rag_token", "nq_rag_sequence", "nq_scann"]
)
def test_the_configs_for_pods_fit(name):
  config = run_config(ROOT / "configs" / f"{name}.py")
  plan = plans.make_plan(config, "v5e:8x8", 0)
  assert plan.fits, plan.problem
  assert dataclasses.asdict(plan.config.mesh) == {
    "data": 64, "fsdp": 1, "tensor": 1
  }  # fmt: skip


def test_the_command_prints_a_plan_and_writes_it(tmp_path):
  output = tmp_path / "plan.json"
  arguments = [
    "--config=configs/quickstart.py",
    "--topology=v5e:1x1",
    "--config.encoder.vocab_size=600",
    "--config.generator.vocab_size=600",
    "--num_passages=1000",
    f"--output={output}",
  ]
  run = [sys.executable, "-c", RUN_WITHOUT_COMPILER, *arguments]
  result = subprocess.run(
    run, cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stderr
  assert "v5e:1x1: 1 chip, mesh" in result.stdout
  assert "libtpu is not installed" in result.stderr
  assert set(json.loads(output.read_text())) >= KEYS


RUN_WITHOUT_COMPILER = """
from rag_jax.benchmarks import abstract_step, plan
from rag_jax.commands.plan import run
plan.has_compiler = abstract_step.has_compiler = lambda: False
run()
"""
