"""Which parts of a checkpoint are read, and as what."""

import json

import numpy as np
import pytest

from rag_jax.weights.export import export_encoder
from rag_jax.weights.load import load_encoder
from rag_jax.weights.load import load_generator
from rag_jax.weights.load import load_rag


def test_an_encoder_of_the_other_role_is_taken_and_noted(checkpoints):
  path = checkpoints.dpr(kind="dpr_context")
  passage, question = (load_encoder(path, r) for r in ("passage", "question"))
  assert checkpoints.flat(passage.params) == checkpoints.flat(question.params)
  assert passage.kind == question.kind == "dpr_context"
  assert passage.report.notes == ()
  assert question.report.notes == (
    "this DPRContextEncoder is taken as the question encoder",
  )


def test_of_a_file_with_both_encoders_the_role_is_read(checkpoints):
  path = checkpoints.dpr()

  def edit(tensors):
    for name, x in list(tensors.items()):
      tensors[name.replace("question_encoder", "ctx_encoder", 1)] = x + 1

  checkpoints.edit_tensors(path, edit)
  passage, question = (load_encoder(path, r) for r in ("passage", "question"))
  np.testing.assert_array_equal(
    passage.params["projection"]["bias"],
    question.params["projection"]["bias"] + 1,
  )


def test_a_pooler_that_dpr_does_not_use_is_ignored(checkpoints):
  path = checkpoints.dpr()
  name = "question_encoder.bert_model.pooler.dense.weight"
  checkpoints.edit_tensors(
    path, lambda t: t | {name: np.ones((8, 8), np.float32)}
  )
  loaded = load_encoder(path)
  assert not loaded.fields["pooler"]
  assert loaded.report.ignored == (
    (name, "DPR takes the first state as it is"),
  )


def test_a_berts_pooler_is_there_if_its_tensors_are(checkpoints):
  assert not load_encoder(checkpoints.bert()).fields["pooler"]
  path = checkpoints.bert("with", pooler=True)
  assert load_encoder(path).fields["pooler"]

  def edit(tensors):
    for name in ("weight", "bias"):
      del tensors[f"pooler.dense.{name}"]

  checkpoints.edit_tensors(path, edit)
  loaded = load_encoder(path)
  assert not loaded.fields["pooler"]
  assert "pooler" not in loaded.params


def test_a_rag_model_without_a_head_has_no_prefix(checkpoints):
  """As `RagModel.save_pretrained` writes it."""
  path = checkpoints.rag()
  before = load_rag(path)
  checkpoints.edit_tensors(
    path, lambda t: {k.removeprefix("rag."): x for k, x in t.items()}
  )
  checkpoints.edit_json(path, architectures=["RagModel"])
  after = load_rag(path)
  assert checkpoints.flat(after.params) == checkpoints.flat(before.params)
  assert after.settings == before.settings


@pytest.mark.parametrize("level", ["outer", "inner"])
def test_tie_word_embeddings_counts_at_either_level(checkpoints, level):
  """False is how version 4 tells T5 not to scale its output."""
  path = checkpoints.rag(generator=checkpoints.t5)
  assert load_generator(path).fields["scale_output"]
  config = json.loads((path / "config.json").read_text())
  generator = config["generator"]
  del generator["scale_decoder_outputs"], generator["tie_word_embeddings"]
  outer = {}
  (outer if level == "outer" else generator)["tie_word_embeddings"] = False
  checkpoints.edit_json(path, generator=generator, **outer)
  loaded = load_generator(path)
  assert not loaded.fields["scale_output"]
  assert loaded.fields["tied_output"]


def test_how_a_generator_generates_counts_for_its_rag(checkpoints):
  """Version 4 may write the defaults beside it; they decide nothing."""
  path = checkpoints.rag()
  (path / "generation_config.json").unlink()
  config = json.loads((path / "config.json").read_text())
  generator = config["generator"] | {"num_beams": 4, "max_length": 20}
  checkpoints.edit_json(
    path, generator=generator, num_beams=1, max_length=20, min_length=3
  )
  generation = load_generator(path).generation
  assert generation["num_beams"] == 4
  assert generation["max_length"] == 20
  assert generation["min_length"] == 3


def test_a_rag_without_passage_encoder_says_where_to_get_one(checkpoints):
  path = checkpoints.rag()
  with pytest.raises(
    ValueError, match=r"holds no passage encoder: .*dpr-ctx_encoder-multiset-b"
  ):
    load_encoder(path, "passage")


@pytest.mark.parametrize("name", ["n_docs", "max_combined_length"])
def test_an_impossible_setting_of_a_rag_is_named(checkpoints, name):
  path = checkpoints.rag()
  checkpoints.edit_json(path, **{name: 0})
  with pytest.raises(ValueError, match=f"says {name}=0; expected a whole numb"):
    load_rag(path)


def test_an_export_takes_away_what_the_last_one_said(checkpoints):
  """Or a DPR would still be pooled as sentence-transformers did."""
  path = checkpoints.bert("same", kind="sentence_transformers", pooling="max")
  assert load_encoder(path).fields["pooling"] == "max"
  assert checkpoints.dpr("same") == path
  loaded = load_encoder(path)
  assert (loaded.kind, loaded.fields["pooling"]) == ("dpr_question", "cls")


def test_an_export_to_a_bucket_is_refused(checkpoints):
  with pytest.raises(
    ValueError, match=r"gs://b/x is in a bucket; expected a lo"
  ):
    export_encoder(
      "gs://b/x",
      checkpoints.encoder,
      checkpoints.encoder_params(),
      kind="dpr_question",
    )
