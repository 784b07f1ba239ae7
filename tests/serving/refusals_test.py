"""What cannot be served is refused, and the message says what to do."""

import json
import re
import shutil

import pytest

from rag_jax.artifacts import MANIFEST
from rag_jax.artifacts import with_digest
from rag_jax.artifacts import write_manifest
from rag_jax.serving.pipeline import RagPipeline
from rag_jax.weights.model_files import load_model
from rag_jax.weights.model_files import save_model

FRANCE = "What is the capital of France?"


def test_a_closed_book_model_refuses_a_corpus(learned, run, change_config):
  change_config("data", n_docs=0)
  with pytest.raises(
    ValueError,
    match=r"passages\.jsonl was given, but the model in .*run was trained"
    r" closed book .*Omit the corpus",
  ):
    RagPipeline.load(run, corpus=learned.passages)


@pytest.mark.parametrize("name", ["nothing", "empty", "file"])
def test_what_is_no_workdir_is_refused(tmp_path, name):
  (tmp_path / "empty").mkdir()
  (tmp_path / "file").write_text("text")
  with pytest.raises(
    FileNotFoundError,
    match=rf"No config\.json in .*{name}; expected the --workdir of a training"
    rf" run\. .*Train first: rag-jax train .*--workdir=.*{name}",
  ):
    RagPipeline.load(tmp_path / name)


def test_a_run_that_has_not_ended_is_refused(run):
  (run / "model" / MANIFEST).unlink()  # cut off while it was written
  message = (
    r"There is no manifest\.json in .*/model: no model was built there, or the"
    r" build was cut off .*Run the training command of this workdir again"
  )
  with pytest.raises(FileNotFoundError, match=message):
    RagPipeline.load(run)
  shutil.rmtree(run / "model")
  with pytest.raises(
    FileNotFoundError,
    match=r"no manifest\.json, since there is no directory .*/model\. .*Run the"
    r" training command of this workdir again",
  ):
    RagPipeline.load(run)


def cut_off(path):
  path.write_bytes(path.read_bytes()[:-100])


def flip_bit(path):
  data = bytearray(path.read_bytes())
  data[-1000] ^= 4
  path.write_bytes(data)


def remove(path):
  path.unlink()


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (cut_off, "was cut off: it has [0-9]+ bytes"),
    (flip_bit, "was damaged: its content changed"),
    (remove, "is missing from"),
  ],
)
@pytest.mark.parametrize(
  ("file", "remedy"),
  [
    ("model/params.safetensors", "Run the training command of this workdir"),
    ("index/embeddings.npy", "Build the index again"),
  ],
)
def test_a_damaged_file_is_named(run, file, remedy, damage, message):
  damage(run / file)
  with pytest.raises(ValueError, match=message) as error:
    RagPipeline.load(run)
  assert file.rpartition("/")[2] in str(error.value)
  assert remedy in str(error.value)


def test_a_missing_index_is_refused(run):
  shutil.rmtree(run / "index")
  with pytest.raises(
    FileNotFoundError,
    match=r"no manifest\.json, since there is no directory .*/index\. .*Build",
  ):
    RagPipeline.load(run)


def test_an_index_of_other_weights_is_refused(run):
  params, content = load_model(run / "model")
  embedding = params["question_encoder"]["token_embedding"]["embedding"]
  params["question_encoder"]["token_embedding"]["embedding"] = embedding.at[
    9, 9
  ].add(1e-3)
  save_model(run / "model", params, content)
  with pytest.raises(
    ValueError,
    match=r"/index was built by other weights: .*Use the weights that built it",
  ):
    RagPipeline.load(run)


def test_passages_that_have_changed_since_are_refused(
  learned, run, tmp_path, write_jsonl, change_config
):
  records = learned.records()
  records[7]["text"] += " Or not."
  changed = write_jsonl("changed.jsonl", records)
  change_config("data", passages=str(changed))
  with pytest.raises(
    ValueError,
    match=r"/index was built of other passages: .*Set data\.passages to those",
  ):
    RagPipeline.load(run)


def swap_two_tokens(run):
  path = run / "tokenizer" / "tokenizer.json"
  tokenizer = json.loads(path.read_text())
  vocab = tokenizer["model"]["vocab"]
  one, other = list(vocab)[300:302]
  vocab[one], vocab[other] = vocab[other], vocab[one]
  path.write_text(json.dumps(tokenizer))


def test_an_edited_tokenizer_is_refused(run):
  swap_two_tokens(run)
  with pytest.raises(ValueError, match=r"tokenizer\.json in .*Put the old "):
    RagPipeline.load(run)


@pytest.mark.parametrize("manifest", ["another", "none"])
def test_another_tokenizer_is_refused(run, manifest):
  if manifest == "none":
    (run / "tokenizer" / MANIFEST).unlink()
  else:
    swap_two_tokens(run)
    write_manifest(run / "tokenizer", kind="tokenizer", format=1, content={})
  with pytest.raises(
    ValueError,
    match=r"The tokenizer in .*/tokenizer has no manifest, or not"
    r".*/model was trained; .*Put the old files back",
  ):
    RagPipeline.load(run)


def forget(run, *names):
  """Makes the model one of before its manifest named these."""
  params, content = load_model(run / "model")
  for name in names:
    del content[name]
  save_model(run / "model", params, content)


def test_a_tokenizer_of_before_there_were_manifests_is_compared(run, caplog):
  forget(run, "tokenizer_manifest")
  (run / "tokenizer" / MANIFEST).unlink()
  RagPipeline.load(run)
  assert "tokenizer has no manifest.json: an older version" in caplog.text
  swap_two_tokens(run)
  with pytest.raises(
    ValueError,
    match=r"The tokenizer in .*/tokenizer is not the one that the model in"
    r" .*/model was trained with.*Put the old files back",
  ):
    RagPipeline.load(run)


def test_a_damaged_tokenizer_is_refused(run):
  cut_off(run / "tokenizer" / "tokenizer.json")
  with pytest.raises(ValueError, match=r"tokenizer\.json in .* was cut off"):
    RagPipeline.load(run)


@pytest.mark.parametrize(
  ("section", "values"),
  [
    ("encoder", {"score_scale": 3.0}),
    ("generator", {"norm_eps": 1e-2}),
    ("data", {"n_docs": 1}),
  ],
)
def test_a_setting_that_decides_answers_is_not_changed_by_accident(
  run, change_config, section, values, caplog
):
  text = (run / "config.json").read_text()
  content = json.loads(text)
  content[section] |= values
  (run / "config.json").write_text(json.dumps(content))
  with pytest.raises(
    ValueError, match=r'config\.json was damaged.*remove the line "sha256"'
  ):
    RagPipeline.load(run)
  # One of another run is whole, but not of this model.
  (run / "config.json").write_text(json.dumps(with_digest(content)))
  (name,) = values
  with pytest.raises(
    ValueError,
    match=rf"(?s)not the config that the model.*\s{section}\.{name}: ",
  ):
    RagPipeline.load(run)
  (run / "config.json").write_text(text)
  change_config(section, **values)  # on purpose
  RagPipeline.load(run)
  assert "config.json was edited after the model was trained" in caplog.text
  assert f"{section}.{name}: " in caplog.text


def test_runs_of_before_there_were_digests_are_served(run, change_config):
  forget(run, "config", "tokenizer_manifest")
  (run / "tokenizer" / MANIFEST).unlink()
  change_config("data", n_docs=1)
  RagPipeline.load(run)


def test_no_other_tokenizer_is_trained_for_one_that_is_missing(run):
  shutil.rmtree(run / "tokenizer")
  with pytest.raises(
    FileNotFoundError,
    match=r"No tokenizer\.json in .*/tokenizer; expected the tokenizer that the"
    r" model in .*/model was trained with\. Put its files back",
  ):
    RagPipeline.load(run)
  assert not (run / "tokenizer").exists()


@pytest.mark.parametrize("damage", [cut_off, flip_bit])
def test_a_damaged_config_is_refused(run, damage):
  if damage is flip_bit:
    data = (run / "config.json").read_bytes()
    (run / "config.json").write_bytes(b"\xff" + data[1:])
  else:
    cut_off(run / "config.json")
  with pytest.raises(
    ValueError, match=r"config\.json is not JSON .*cut off or edited\. Restore"
  ):
    RagPipeline.load(run)


@pytest.mark.parametrize(
  ("question", "error", "message"),
  [
    ("", ValueError, r"Question 2 of 2 is empty: ''\. Ask something"),
    (" \t\n", ValueError, r"Question 2 of 2 is empty: ' \\t\\n'\. Ask"),
    (7, TypeError, r"Question 2 of 2 is 7, of type int; expected text\. Pass"),
    (None, TypeError, r"Question 2 of 2 is None, of type NoneType; expected"),
    (b"Who?", TypeError, r"Question 2 of 2 is b'Who\?', of type bytes;"),
    ("a\0b", ValueError, r"Question 2 of 2 holds a NUL .*Remove the character"),
    ("\ud800", ValueError, r"Question 2 of 2 holds half of a surrogate pair"),
  ],
)
def test_what_is_no_question_is_refused(pipeline, question, error, message):
  with pytest.raises(error, match=message):
    pipeline.answer([FRANCE, question])


@pytest.mark.parametrize(
  ("n_docs", "message"),
  [
    (10_000, r"n_docs=10000, but .*passages\.jsonl has only [0-9]+ passages\."),
    (-1, r"n_docs=-1; expected 1 or more, or 0 for as many as in training\."),
  ],
)
def test_impossible_numbers_of_documents_are_refused(pipeline, n_docs, message):
  with pytest.raises(ValueError, match=message):
    pipeline.answer(FRANCE, n_docs=n_docs)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", r"corpus\.jsonl holds no passages: .* Expected at least one"),
    (
      '{"id": "a", "title": "A", "text": "b"}\n{"id": "b", "title": ',
      r"corpus\.jsonl:2: not valid JSON .*Expected one complete JSON object",
    ),
    (
      '{"id": "a", "title": "A"}\n',
      r"corpus\.jsonl:1: no field 'text'; .*Add or rename the field",
    ),
  ],
)
def test_a_corpus_that_cannot_be_read_is_refused_with_its_line(
  learned, tmp_path, text, message
):
  corpus = tmp_path / "corpus.jsonl"
  corpus.write_text(text)
  with pytest.raises(ValueError, match=message):
    RagPipeline.load(learned.workdir, corpus=corpus)


def test_a_missing_corpus_is_refused(learned, tmp_path):
  with pytest.raises(
    FileNotFoundError,
    match=rf"There is no file {re.escape(str(tmp_path))}/corpus\.jsonl\."
    r" Expected .*correct the path",
  ):
    RagPipeline.load(learned.workdir, corpus=tmp_path / "corpus.jsonl")
