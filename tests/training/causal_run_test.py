"""Whole runs with a decoder-only generator, and what is left of them."""

import dataclasses
import json

import numpy as np
import pytest

from rag_jax.config import PromptConfig
from rag_jax.config_models import CausalConfig
from rag_jax.config_rules import validate
from rag_jax.data.experiment import open_experiment
from rag_jax.decoding.answerer import Answerer
from rag_jax.serving.pipeline import RagPipeline
from rag_jax.weights.convert import export_model
from rag_jax.weights.init_from import load_initial
from rag_jax.weights.load import load_causal

CAUSAL = CausalConfig(
  num_layers=2, embed_dim=16, mlp_dim=16, num_heads=2, num_kv_heads=1,
  max_positions=300, sliding_layers=(0,), sliding_window=20,
)  # fmt: skip
ASKED = "What is the river of Balania?"


def config_of(tiny, **changes):
  return tiny.config(generator__kind="causal", causal=CAUSAL, **changes)


def prompting(tiny, shots, stop="", **changes):
  return config_of(
    tiny,
    data__context_style="prompt",
    data__context_length=250,
    data__substitute_answers=0.0,
    warmup__num_steps=0,
    prompt=PromptConfig(shots=shots, stop=stop),
    **changes,
  )


@pytest.fixture(scope="module")
def trained(tiny):
  return tiny.train(tiny.root / "causal", config_of(tiny), measure=True)


def test_a_run_learns_is_measured_and_answers(trained):
  losses = [m["train/loss"] for m in trained.metrics if "train/loss" in m]
  assert losses[-1] < losses[0] - 0.5
  assert trained.results["test/num_questions"] == 10
  before, after = trained.first_state(), trained.state()
  for name in before:  # gradients reach both parts
    part = "params/" + name.removeprefix("params/")
    assert np.any(before[name] != after[part]), name
  pipeline = RagPipeline.load(trained.path)
  (answer,) = pipeline.answer(ASKED)
  assert len(answer.docs) == 2
  assert np.isclose(sum(doc.posterior for doc in answer.docs), 1.0)


def test_an_interrupted_run_ends_in_the_same_bits(tiny, trained, tiny_run):
  path = tiny.root / "causal, interrupted"
  run = tiny.train(path, config_of(tiny), stop_at=("train", 5))
  assert run.stopped is not None
  run = tiny.train(path, config_of(tiny))
  tiny_run.assert_bit_equal(run.state(), trained.state())


def test_the_generator_of_a_run_is_exported_and_starts_another(
  tiny, trained, tmp_path
):
  with pytest.raises(ValueError, match="expected one of causal, dpr_question"):
    export_model(trained.path, tmp_path / "none", "rag_token")
  # The layers of Llama do not slide.
  plain = dataclasses.replace(CAUSAL, sliding_layers=(), sliding_window=0)
  config = config_of(tiny)
  config.causal = plain
  run = tiny.train(tmp_path / "plain", config, measure=True)
  export_model(run.path, tmp_path / "exported")
  written = json.loads((tmp_path / "exported" / "config.json").read_text())
  assert written["model_type"] == "llama"
  found = load_causal(tmp_path / "exported")
  assert CausalConfig(**found.fields).num_layers == 2
  for start in ("init_from", "generator__init_from"):
    again = config_of(tiny, **{start: str(run.path)})
    again.causal = CausalConfig()
    again, initial = load_initial(again)
    assert again.causal.num_layers == 2
    assert again.generator.kind == "causal"
    np.testing.assert_array_equal(
      initial.params["generator"]["final_norm"]["scale"],
      found.params["final_norm"]["scale"],
    )


@pytest.fixture
def shots(tmp_path):
  path = tmp_path / "shots.jsonl"
  shot = {
    "question": "What is the river of Nowhere?", "answer": "Lor",
    "passages": [{"title": "Nowhere", "text": "The river is Lor."}],
  }  # fmt: skip
  path.write_text(json.dumps(shot) + "\n")
  return str(path)


@pytest.mark.parametrize("loss", ["rag_token", "rag_sequence", "concatenate"])
def test_prompts_with_examples_train_and_answer(tiny, shots, loss):
  config = prompting(
    tiny,
    shots,
    stop="o",
    train__num_steps=3,
    retriever_loss="none" if loss == "concatenate" else "marginal",
    loss=loss,
  )
  run = tiny.train(tiny.root / f"prompts {loss}", config, measure=True)
  assert run.results["test/num_questions"] == 10
  assert run.results["cut"]["contexts_cut"] == 0
  pipeline = RagPipeline.load(run.path)
  (answer,) = pipeline.answer(ASKED)
  assert len(answer.docs) == 2  # also if they are in one prompt
  assert "o" not in answer.text
  streamed = []
  pipeline.answer(ASKED, on_text=streamed.append)
  if loss != "rag_sequence":
    assert streamed[-1] == answer.text
  else:
    assert not streamed


def test_what_is_shared_changes_no_answer(tiny, trained, shots, monkeypatch):
  config = prompting(tiny, shots)
  pipeline = RagPipeline.load(trained.path)
  experiment = open_experiment(
    validate(config), tokenizer_path=trained.path / "tokenizer"
  )
  context = experiment.context
  texts = [q.question for q in tiny.split("test")]
  ids, _ = context.encode_questions(texts[:2])
  tokens, _ = context.contexts(ids, np.array([[0, 1], [2, 3]]))
  num_shared = context.num_shared(tokens)
  assert num_shared > 30
  answers = []
  for num in (num_shared, 0):
    monkeypatch.setattr(context, "num_shared", lambda _, num=num: num)
    answers.append(
      Answerer(experiment).answer(
        pipeline.params, pipeline.index, texts, n_docs=2, batch_size=4
      )
    )
  for one, other in zip(*answers, strict=True):
    assert one.tokens == other.tokens
    np.testing.assert_allclose(one.log_prob, other.log_prob, rtol=1e-4)
