"""sentence-transformers directories: what is read and what is refused."""

import json

import pytest

from rag_jax.weights.convert import export_model
from rag_jax.weights.convert import import_checkpoint
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
    ("Transformer", "Pooling", "Normalize", "Dense"),
    ("Transformer", "Pooling", "Dense", "Dense"),
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
    r" Pooling \(cls, mean or max\) and, after them, one Dense and Normalize",
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
    similarity_fn_name="cosine",
  )
  checkpoints.edit_json(saved, "sentence_bert_config.json", do_lower_case=True)
  loaded = load_encoder(saved)
  told = loaded.report.table()
  for note in (
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


@pytest.mark.parametrize(
  ("settings", "question", "passage"),
  [
    ({"prompts": {"query": "q: ", "passage": "p: "}}, "q: ", "p: "),
    ({"prompts": {"passage": "p: ", "document": "d: "}}, "", "d: "),
    (
      {"prompts": {"query": "q: ", "x": "x: "}, "default_prompt_name": "x"},
      *("q: ", "x: "),
    ),
    ({"prompts": {"query": "", "document": ""}}, "", ""),
  ],
)
def test_prompts_are_those_of_queries_and_documents(
  checkpoints, saved, tmp_path, settings, question, passage
):
  file = "config_sentence_transformers.json"
  checkpoints.edit_json(saved, file, **settings)
  fields = load_encoder(saved).fields
  assert (fields["question_prompt"], fields["passage_prompt"]) == (
    question, passage,
  )  # fmt: skip
  import_checkpoint(saved, tmp_path / "inside")
  export_model(tmp_path / "inside", tmp_path / "outside")
  again = load_encoder(tmp_path / "outside").fields
  assert again == fields


@pytest.mark.parametrize(
  ("file", "changes", "message"),
  [
    (
      "config_sentence_transformers.json",
      {"default_prompt_name": "x"},
      r"default_prompt_name='x'; expected one of its prompts, \[\]",
    ),
    (
      "config_sentence_transformers.json",
      {"prompts": {"query": 7}},
      r"\(prompts\) says query=7; expected a text",
    ),
    (
      "2_Dense/config.json",
      {"activation_function": "torch.nn.modules.activation.Mish"},
      "activation_function='torch.nn.modules.activation.Mish'; expected one of",
    ),
    ("2_Dense/config.json", {"use_residual": True}, "only use_residual=False"),
    ("2_Dense/config.json", {"out_features": 6}, r"module Dense: of another s"),
    ("2_Dense/config.json", {"bias": False}, r"module Dense: unknown: linear"),
  ],
)
def test_modules_that_cannot_be_are_named(checkpoints, file, changes, message):
  saved = checkpoints.bert(
    kind="sentence_transformers", pooling="mean", projection_dim=5
  )
  checkpoints.edit_json(saved, file, **changes)
  with pytest.raises(ValueError, match=message):
    load_encoder(saved)


def test_prompts_that_are_not_pooled_are_refused(checkpoints, saved):
  checkpoints.edit_json(saved, "1_Pooling/config.json", include_prompt=False)
  assert load_encoder(saved).fields["pooling"] == "mean"
  checkpoints.edit_json(
    saved, "config_sentence_transformers.json", prompts={"query": "q: "}
  )
  with pytest.raises(ValueError, match="supports only include_prompt=True"):
    load_encoder(saved)
