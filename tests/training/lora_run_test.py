"""Whole runs that train adapters, and the models that they leave."""

import functools

import flax.traverse_util
import jax
import numpy as np
import pytest

from rag_jax.config_models import CausalConfig
from rag_jax.config_models import LoraConfig
from rag_jax.data.experiment import open_experiment
from rag_jax.models import lora
from rag_jax.serving.pipeline import RagPipeline
from rag_jax.training.state import init_params
from rag_jax.weights.convert import export_model
from rag_jax.weights.init_from import load_initial
from rag_jax.weights.load import load_causal
from rag_jax.weights.load import load_rag
from rag_jax.weights.model_files import load_model

CAUSAL = CausalConfig(
  num_layers=2, embed_dim=16, mlp_dim=16, num_heads=2, num_kv_heads=1,
  max_positions=300,
)  # fmt: skip
TARGETS = (
  "generator/attention", "generator/up", "encoder/query", "encoder/value"
)  # fmt: skip


def config_of(tiny, kind, **changes):
  config = tiny.config(
    generator__kind=kind,
    encoder__num_layers=1,
    encoder__mlp_dim=16,
    encoder__pooling="cls",
    lora=LoraConfig(rank=3, targets=TARGETS),
    **changes,
  )
  if kind == "causal":
    config.causal = CAUSAL
  return config


@pytest.fixture(scope="module", params=["encoder_decoder", "causal"])
def trained(request, tiny):
  config = config_of(tiny, request.param)
  path = tiny.root / f"adapters {request.param}"
  return tiny.train(path, config, measure=True)


def test_only_the_adapters_learn(trained):
  losses = [m["train/loss"] for m in trained.metrics if "train/loss" in m]
  assert losses[-1] < losses[0]
  before, after = trained.first_state(), trained.state()
  for name, x in before.items():
    top = name.split("/")[1]
    learns = lora.trains_in_adapter(name) or top not in (
      "generator", "question_encoder"
    )  # fmt: skip
    assert np.array_equal(x, after[name]) != learns, name
  state = {name for name in after if name.startswith("opt_state")}
  moments = {name for name in state if "/mu/" in name or "/nu/" in name}
  assert moments
  assert all(lora.trains_in_adapter(name) for name in moments)


def test_an_interrupted_run_ends_in_the_same_bits(tiny, trained, tiny_run):
  path = tiny.root / f"{trained.path.name}, interrupted"
  run = tiny.train(path, trained.config, stop_at=("train", 5))
  assert run.stopped is not None
  run = tiny.train(path, trained.config)
  tiny_run.assert_bit_equal(run.state(), trained.state())


def test_the_model_of_a_run_has_the_adapters_multiplied_in(
  tiny, trained, tmp_path
):
  params, content = load_model(trained.path / "model")
  state = trained.state(content["step"])
  assert not any(map(lora.is_adapter, lora.by_path(params)))
  best = {name: x for name, x in state.items() if name.startswith("params/")}
  best = flax.traverse_util.unflatten_dict(
    {n.removeprefix("params/"): x for n, x in best.items()}, sep="/"
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7),
    lora.merged(best),
    params,
  )
  (answer,) = RagPipeline.load(trained.path).answer("What is the river?")
  assert len(answer.docs) == 2
  export_model(trained.path, tmp_path / "exported")
  causal = trained.config.generator.kind == "causal"
  if causal:
    exported = {"generator": load_causal(tmp_path / "exported").params}
  else:
    rag = load_rag(tmp_path / "exported")
    exported = {
      "generator": rag.generator.params,
      "question_encoder": rag.question_encoder.params,
    }
  for part, found in exported.items():
    jax.tree.map(np.testing.assert_array_equal, found, params[part])


def test_a_run_starts_from_a_checkpoint_and_from_a_run_with_adapters(
  tiny, trained
):
  config = tiny.config(
    init_from=str(trained.path), warmup__num_steps=0, train__num_steps=2
  )
  config.lora = LoraConfig(rank=2, targets=TARGETS)
  config, initial = load_initial(config)
  experiment = open_experiment(config, initial=initial)
  params, layout = init_params(
    experiment.init, jax.random.key(0), experiment.mesh, initial.params
  )
  assert jax.tree.structure(params) == jax.tree.structure(layout)
  assert lora.adapted_parts(lora.by_path(params)) == {
    "generator", "question_encoder"
  }  # fmt: skip
  saved, _ = load_model(trained.path / "model")
  jax.tree.map(
    np.testing.assert_array_equal, lora.without_adapters(params), saved
  )
