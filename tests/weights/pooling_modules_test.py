"""sentence-transformers directories: what is read and what is refused."""

import json

import pytest

from rag_jax.weights.load import load_encoder


def modules(path, *types):
  """Replaces modules.json, with folders that exist."""
  paths = {"Transformer": "", "Pooling": "1_Pooling"}
  content = [
    {"idx": i, "type": f"sentence_transformers.models.{t}",
     "path": paths.get(t, "1_Pooling")}
    for i, t in enumerate(types)
  ]  # fmt: skip
  (path / "modules.json").write_text(json.dumps(content))
  (path / "manifest.json").unlink(missing_ok=True)


@pytest.fixture
def saved(checkpoints):
  return checkpoints.bert(kind="sentence_transformers", pooling="mean")


@pytest.mark.parametrize(
  "types",
  [
    ("Transformer", "Pooling", "Dense", "Normalize"),
    ("Transformer", "Normalize"),
    ("WordEmbeddings", "Pooling"),
    ("Pooling",),
    (),
  ],
)
def test_other_modules_are_refused_and_the_supported_named(saved, types):
  modules(saved, *types)
  with pytest.raises(
    ValueError,
    match=rf"lists {', '.join(types) or 'nothing'}; supported are Transformer,"
    r" Pooling \(cls, mean or max\) and, after them, Normalize\. Take another",
  ):
    load_encoder(saved)


@pytest.mark.parametrize("entry", ["Transformer", {"type": "a.Transformer"}])
def test_a_module_without_type_and_path_is_named(saved, entry):
  (saved / "manifest.json").unlink()
  (saved / "modules.json").write_text(json.dumps([entry]))
  with pytest.raises(ValueError, match=r"; expected an object with type and p"):
    load_encoder(saved)


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"pooling_mode_mean_tokens": False}, "of nothing"),
    ({"pooling_mode_cls_token": True}, "cls_token and mean_tokens"),
    (
      {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True},
      "lasttoken",
    ),
    ({"pooling_mode": "weightedmean"}, "weightedmean"),
  ],
)
def test_other_poolings_are_refused(checkpoints, saved, changes, named):
  checkpoints.edit_json(saved, "1_Pooling/config.json", **changes)
  with pytest.raises(
    ValueError, match=rf"asks for the pooling {named}; supported is one of cls_"
  ):
    load_encoder(saved)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_the_newer_spelling_of_a_pooling_is_read(checkpoints, saved, pooling):
  (saved / "1_Pooling/config.json").write_text(
    json.dumps({"embedding_dimension": 8, "pooling_mode": pooling})
  )
  (saved / "manifest.json").unlink()
  assert load_encoder(saved).fields["pooling"] == pooling


def test_what_we_do_not_do_is_noted(checkpoints, saved):
  checkpoints.edit_json(
    saved,
    "config_sentence_transformers.json",
    prompts={"query": "Represent: "},
    similarity_fn_name="cosine",
  )
  checkpoints.edit_json(saved, "sentence_bert_config.json", do_lower_case=True)
  loaded = load_encoder(saved)
  told = loaded.report.table()
  for note in (
    'puts prompts before its texts, rag_jax does not: {"query": "Represent',
    "set encoder.normalize=True for cosines",
    "lower-cases its texts",
  ):
    assert note in told


def test_an_encoder_in_a_folder_of_its_own_is_found(checkpoints, saved):
  """As early versions wrote it."""
  (saved / "manifest.json").unlink()
  before = load_encoder(saved)
  (saved / "0_Transformer").mkdir()
  for name in ("config.json", "model.safetensors", "tokenizer.json"):
    (saved / name).rename(saved / "0_Transformer" / name)
  content = json.loads((saved / "modules.json").read_text())
  content[0]["path"] = "0_Transformer"
  (saved / "modules.json").write_text(json.dumps(content))
  after = load_encoder(saved)
  assert after.fields == before.fields
  assert checkpoints.flat(after.params) == checkpoints.flat(before.params)
  assert after.tokenizer == str(saved / "0_Transformer")
