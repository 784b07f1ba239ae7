"""Whole models in and out, as tools/convert_hf.py converts them."""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest

from rag_jax.artifacts import with_digest
from rag_jax.config import Config
from rag_jax.config_json import to_json
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.serving.open_model import default_passage_encoder
from rag_jax.weights.bag_of_words import to_bert
from rag_jax.weights.convert import check_output
from rag_jax.weights.convert import export_model
from rag_jax.weights.convert import import_checkpoint
from rag_jax.weights.load import load_causal
from rag_jax.weights.load import load_encoder
from rag_jax.weights.load import load_generator
from rag_jax.weights.load import load_rag
from rag_jax.weights.model_files import load_model
from rag_jax.weights.model_files import save_model
from rag_jax.weights.saved import is_ours
from rag_jax.weights.saved import origin_of

TENSORS = "model.safetensors"


@pytest.mark.parametrize(
  "name",
  [
    "dpr", "dpr_context", "bert", "sentence_transformers", "bart", "t5", "rag",
    "rag_t5_sequence", "rag_tied", "roberta", "llama", "gemma3_text", "gpt2",
  ],
)  # fmt: skip
def test_a_checkpoint_goes_in_and_out_unchanged(checkpoints, tmp_path, name):
  write = {
    "dpr": checkpoints.dpr,
    "dpr_context": lambda: checkpoints.dpr(kind="dpr_context"),
    "bert": lambda: checkpoints.bert(pooler=True),
    "sentence_transformers": lambda: checkpoints.bert(
      kind="sentence_transformers", pooling="mean", normalize=True
    ),
    "roberta": lambda: checkpoints.bert(
      kind="roberta", family="roberta", position_offset=2
    ),
    "bart": lambda: checkpoints.generator(checkpoints.bart),
    "t5": lambda: checkpoints.generator(checkpoints.t5),
    "rag": lambda: checkpoints.rag(n_docs=7, title_sep=" | "),
    "rag_t5_sequence": lambda: checkpoints.rag(
      generator=checkpoints.t5, kind="sequence"
    ),
    "rag_tied": lambda: checkpoints.rag(tied=True),
  }
  for kind in ("llama", "gemma3_text", "gpt2"):
    settings = {"generation": {"top_k": 3}}
    write[kind] = functools.partial(checkpoints.causal, kind, **settings)
  source = write[name]()
  inside, outside = tmp_path / "inside", tmp_path / "outside"
  report = import_checkpoint(source, inside)
  assert is_ours(inside)
  assert not is_ours(source)
  exported = export_model(inside, outside)
  assert exported.num_parameters == report.num_parameters
  assert [line.ours for line in exported.mapped] == [
    line.ours for line in report.mapped
  ]

  def files(path):
    names = [p.relative_to(path) for p in path.rglob("*") if p.is_file()]
    return {
      str(name): (path / name).read_bytes()
      for name in names
      if name.name not in ("manifest.json", "README.md")
    }

  # Every file: weights, configs, modules, tokenizers.
  before, after = files(source), files(outside)
  assert sorted(before) == sorted(after)
  for file, content in before.items():
    if file.endswith(".json"):
      assert json.loads(after[file]) == json.loads(content), file
    else:
      assert after[file] == content, file


@pytest.mark.parametrize(
  ("name", "kind", "loads", "parts"),
  [
    ("rag", "rag_token", "RagTokenForGeneration", 2),
    ("rag", "generator", "AutoModelForSeq2SeqLM", 1),
    ("rag", "dpr_context", "DPRContextEncoder", 1),
    ("bert", "sentence_transformers", "SentenceTransformer", 1),
    ("causal", "causal", "AutoModelForCausalLM", 1),
  ],
)
def test_an_export_has_a_model_card(
  checkpoints, tmp_path, name, kind, loads, parts
):
  source = getattr(checkpoints, name)()
  import_checkpoint(source, tmp_path / "inside", origin="hf:org/name")
  export_model(tmp_path / "inside", tmp_path / "out", kind)
  _, head, body = (tmp_path / "out/README.md").read_text().split("---\n", 2)
  assert f"- {kind.replace('_', '-')}\n" in head
  assert "# out\n" in body
  assert "converted from hf:org/name" in body
  assert f"model = {loads}" in body
  counts = re.findall(r"^\| \w+ \| ([\d,]+) \|$", body, re.M)
  assert len(counts) == parts
  if name == "rag" and kind == "generator":
    total = load_generator(tmp_path / "out").report.num_parameters
    assert int(counts[0].replace(",", "")) == total
  assert "## Results" not in body
  # It is under a digest, like all else.
  (tmp_path / "out/README.md").write_text("")
  load = {
    "rag_token": load_rag,
    "generator": load_generator,
    "causal": load_causal,
  }
  with pytest.raises(ValueError, match=r"README\.md .* was cut off"):
    load.get(kind, load_encoder)(tmp_path / "out")


def test_the_card_of_a_run_has_its_results_and_its_contexts(
  checkpoints, tmp_path
):
  run = tmp_path / "run"
  trained(run, checkpoints)
  results = {"test/exact_match": 0.9284, "test/num_questions": 1344.0}
  (run / "results.json").write_text(json.dumps(results))
  export_model(run, tmp_path / "out")
  card = (tmp_path / "out/README.md").read_text()
  assert "trained with rag_jax, retriever and generator together" in card
  assert "| exact match | 0.928 |\n" in card
  assert "| questions | 1,344 |\n" in card
  assert "`<s> question </s> title </s> text </s>`, not on those that" in card
  assert "It reads 3 documents" in card


def test_no_results_are_published_that_the_run_does_not_have(
  checkpoints, tmp_path
):
  run = tmp_path / "run"
  trained(run, checkpoints)
  whole = with_digest({"test/exact_match": 0.3, "test/num_questions": 9.0})
  file = run / "results.json"
  for damaged in (
    json.dumps(whole | {"test/exact_match": 0.9}),
    json.dumps(whole)[:-9],
    "[]",
  ):
    file.write_text(damaged)
    with pytest.raises(ValueError, match=r"results\.json .*Remove it and"):
      export_model(run, tmp_path / "out")
  file.unlink()
  export_model(run, tmp_path / "out")
  assert "exact match" not in (tmp_path / "out/README.md").read_text()


def test_one_part_of_a_rag_is_exported_alone(checkpoints, tmp_path):
  source, inside = checkpoints.rag(), tmp_path / "inside"
  import_checkpoint(source, inside)
  rag = load_rag(source)
  export_model(inside, tmp_path / "generator", "generator")
  generator = load_generator(tmp_path / "generator")
  assert checkpoints.flat(generator.params) == checkpoints.flat(
    rag.generator.params
  )
  export_model(inside, tmp_path / "question", "dpr_question")
  encoder = load_encoder(tmp_path / "question")
  assert checkpoints.flat(encoder.params) == checkpoints.flat(
    rag.question_encoder.params
  )
  export_model(inside, tmp_path / "sequence", "rag_sequence")
  assert load_rag(tmp_path / "sequence").settings.kind == "sequence"


@pytest.mark.parametrize(
  ("name", "kind", "possible"),
  [
    ("dpr", "generator", "dpr_question, dpr_context, sentence_tra"),
    ("generator", "rag_token", "one of generator. Choose"),
    ("generator", "nonsense", "one of generator. Choose"),
  ],
)
def test_a_kind_that_a_model_cannot_be_is_named(
  checkpoints, tmp_path, name, kind, possible
):
  source = (
    checkpoints.dpr()
    if name == "dpr"
    else checkpoints.generator(checkpoints.bart)
  )
  import_checkpoint(source, tmp_path / "inside")
  with pytest.raises(ValueError, match=f"exported as kind '{kind}'; exp") as e:
    export_model(tmp_path / "inside", tmp_path / "out", kind)
  assert possible in str(e.value)


def trained(path, checkpoints, **changes):
  """Writes what a run leaves: config, tokenizer and model."""
  config = Config()
  e, g = config.encoder, config.generator
  e.num_layers, e.pooling, e.normalize = 0, "learned", True
  e.embed_dim, e.num_heads, e.projection_dim = 6, 2, 5
  e.learn_score_scale = True
  for field in dataclasses.fields(g):
    setattr(g, field.name, getattr(checkpoints.t5, field.name))
  g.vocab_size, g.scale_output, g.decoder_start_id = 0, False, -1
  config.data.n_docs, config.loss = 3, "rag_sequence"
  for name, value in changes.items():
    section, name = name.split("__")
    setattr(getattr(config, section), name, value)
  path.mkdir()
  (path / "config.json").write_text(to_json(config))
  tokenizer = train_tokenizer(["the capital of France is Paris"] * 3, 300)
  tokenizer.save(path / "tokenizer")
  size = tokenizer.vocab_size
  known = dataclasses.replace(g, vocab_size=size)
  rng = np.random.default_rng(0)
  shapes = {
    "token_embedding": {"embedding": (size, 6)},
    "pooling": {"kernel": (6, 1), "bias": (1,)},
    "projection": {"kernel": (6, 5), "bias": (5,)},
  }
  params = {
    "question_encoder": jax.tree.map(
      lambda shape: rng.normal(size=shape).astype(np.float32),
      shapes,
      is_leaf=lambda x: isinstance(x, tuple),
    ),
    "generator": checkpoints.generator_params(known),
    "log_score_scale": np.float32(1.5),
  }
  save_model(path / "model", params, {"step": 3, "tokenizer": "abc"})
  return config, params, tokenizer


def test_a_run_is_exported_as_it_was_trained(checkpoints, tmp_path):
  run = tmp_path / "run"
  config, params, tokenizer = trained(run, checkpoints)
  report = export_model(run, tmp_path / "out")
  rag = load_rag(tmp_path / "out")
  assert rag.settings.kind == "sequence"
  assert rag.settings.n_docs == 3
  assert rag.settings.max_combined_length == config.data.context_length
  assert rag.generator.fields["decoder_start_id"] == tokenizer.eos_id
  assert rag.generator.fields["tied_output"]
  assert not rag.generator.fields["scale_output"]
  assert checkpoints.flat(rag.generator.params) == checkpoints.flat(
    params["generator"]
  )
  # The retriever is DPR's, with the scale on the side of the questions.
  for part, scale in (
    (rag.question_encoder, float(np.exp(1.5))),
    (rag.passage_encoder, 1.0),
  ):
    _, expected = to_bert(
      config.encoder,
      params["question_encoder"],
      first_id=tokenizer.bos_id,
      max_positions=512,
      scale=scale,
    )
    assert checkpoints.flat(part.params) == checkpoints.flat(expected)
    assert part.tokenizer
  # Theirs counts the token that the decoder starts with.
  assert rag.generator.generation["max_length"] == config.data.target_length + 1
  assert "layer_0/self_attention/value/kernel" in str(report)


def test_a_closed_book_run_is_a_generator(checkpoints, tmp_path):
  run = tmp_path / "run"
  trained(run, checkpoints, data__n_docs=0)
  export_model(run, tmp_path / "out")
  assert load_generator(tmp_path / "out").fields["num_layers"] == 2


def test_a_model_without_its_config_is_no_workdir(checkpoints, tmp_path):
  trained(tmp_path / "run", checkpoints)
  with pytest.raises(
    ValueError, match=r"without its config; .* workdir, .*run"
  ):
    export_model(tmp_path / "run/model", tmp_path / "out")


def test_where_there_is_no_model_the_error_says_so(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=r"There is no model in .*nothing"
  ):
    export_model(tmp_path / "nothing", tmp_path / "out")


def test_a_damaged_model_directory_says_how_to_mend_it(checkpoints, tmp_path):
  inside = tmp_path / "inside"
  import_checkpoint(checkpoints.dpr(), inside)
  file = inside / "params.safetensors"
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.write_bytes(data)
  with pytest.raises(
    ValueError, match=r"was damaged.*Convert the checkpoint ag"
  ):
    export_model(inside, tmp_path / "out")


def test_what_was_converted_says_from_where(checkpoints, tmp_path):
  source = checkpoints.rag()
  import_checkpoint(source, tmp_path / "a")
  import_checkpoint(source, tmp_path / "b", "hf:facebook/rag-token-nq@main")
  assert origin_of(tmp_path / "a") == str(source)
  assert origin_of(source) == str(source)
  encoder = "hf:facebook/dpr-ctx_encoder-multiset-base"
  assert default_passage_encoder(str(tmp_path / "b")) == encoder
  assert default_passage_encoder("hf:facebook/rag-sequence-nq") == encoder
  for other in (str(tmp_path / "a"), str(source), "hf:me/rag-token-nq"):
    assert default_passage_encoder(other) == ""


def test_an_import_holds_the_tokenizers_and_float32(checkpoints, tmp_path):
  inside = tmp_path / "inside"
  import_checkpoint(checkpoints.rag(), inside)
  params, content = load_model(inside)
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}
  assert content["settings"]["n_docs"] == 5
  for folder in ("question_encoder_tokenizer", "generator_tokenizer"):
    assert (inside / folder / "tokenizer.json").exists()


def test_nothing_is_written_over_by_mistake(tmp_path):
  full = tmp_path / "full"
  full.mkdir()
  (full / "thesis.tex").touch()
  with pytest.raises(ValueError, match=r"is not empty; .* with --overwrite"):
    check_output("hf:org/name", full, overwrite=False)
  check_output("hf:org/name", full, overwrite=True)
  check_output("hf:org/name", tmp_path / "new", overwrite=False)
  with pytest.raises(ValueError, match="Input and output are the same directo"):
    check_output(full, str(full) + "/.", overwrite=True)
  with pytest.raises(
    ValueError, match=r"thesis\.tex is a file; expected a dir"
  ):
    check_output("hf:org/name", full / "thesis.tex", overwrite=True)


def test_large_exports_are_split(checkpoints, tmp_path):
  import_checkpoint(checkpoints.dpr(), tmp_path / "inside")
  export_model(tmp_path / "inside", tmp_path / "out", max_shard_bytes=1000)
  names = [p.name for p in (tmp_path / "out").glob("*.safetensors")]
  assert len(names) > 2
  before, after = (
    load_encoder(path) for path in (checkpoints.root / "dpr", tmp_path / "out")
  )
  assert checkpoints.flat(before.params) == checkpoints.flat(after.params)
