"""Plans of training steps, against the steps themselves."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from rag_jax.api.configs import run_config
from rag_jax.benchmarks import abstract_step
from rag_jax.benchmarks import plan as plans
from rag_jax.benchmarks.abstract_step import AbstractStep
from rag_jax.benchmarks.memory_estimate import estimated_parts
from rag_jax.config import Config
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
  for module in (plans, abstract_step):
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


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("name", ["nq_rag_token", "nq_rag_sequence"])
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
