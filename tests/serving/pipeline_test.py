"""A finished run answers, follows its passages, and says what is wrong."""

import json
import re
import shutil

import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import pytest

from rag_jax.artifacts import MANIFEST
from rag_jax.data.questions import load_questions
from rag_jax.evaluation.answers import exact_match
from rag_jax.serving.explanation import explain
from rag_jax.serving.pipeline import RagPipeline
from rag_jax.training.model_files import load_model
from rag_jax.training.model_files import save_model

FRANCE = "What is the capital of France?"
NAMES = ("Newtown", "Marburg", "Baldor", "Kelmar", "Santa Rosa", "Lorwick",
         "Tanovia", "Zorbville")  # fmt: skip
PARTS = ("config.json", "tokenizer", "model", "index")  # of what is served


@pytest.fixture(scope="module", autouse=True)
def _compile_once(learned):
  """Keeps what is compiled, since every pipeline compiles its own."""
  settings = {
    "jax_compilation_cache_dir": str(learned.workdir / ".jax_cache"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
  }
  before = {name: jax.config.values[name] for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  # Whether there is a cache is asked once, at the first compilation.
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def pipeline(learned):
  return RagPipeline.load(learned.workdir)


@pytest.fixture(scope="module")
def held_out(learned):
  """A question about the capital of each country of the test split."""
  questions = {}
  for question in load_questions(str(learned.passages.parent), "test"):
    if question.relation == "capital":
      country = question.id.rpartition("/capital/")[0]
      questions.setdefault(country, question)
  return questions


@pytest.fixture(scope="module")
def right(pipeline, held_out):
  """Those of the questions that are answered right."""
  answers = pipeline.answer([q.question for q in held_out.values()])
  return {
    country: question
    for (country, question), answer in zip(
      held_out.items(), answers, strict=True
    )
    if exact_match(answer.text, question.answers)
  }


@pytest.fixture
def run(learned, tmp_path):
  """A copy of the run, to be damaged."""
  copy = tmp_path / "run"
  copy.mkdir()
  for part in PARTS:
    path = learned.workdir / part
    (shutil.copytree if path.is_dir() else shutil.copy)(path, copy / part)
  return copy


def write_jsonl(path, records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return path


def change_config(run, section, **values):
  config = json.loads((run / "config.json").read_text())
  config[section] |= values
  (run / "config.json").write_text(json.dumps(config))


def with_capitals(learned, held_out, capitals):
  """Returns the passages, with other capitals of some countries."""
  records = learned.records()
  by_id = {record["id"]: record for record in records}
  for country, capital in capitals.items():
    record = by_id[f"{country}/capital"]
    true = held_out[country].answers[0]
    assert true in record["text"]
    record["text"] = record["text"].replace(true, capital)
  return records


def test_capitals_that_were_never_asked_for_are_answered(learned, pipeline):
  asked = load_questions(str(learned.passages.parent), "test")
  asked = [q for q in asked if q.relation == "capital"]
  answers = pipeline.answer([q.question for q in asked])
  scores = [
    exact_match(answer.text, question.answers)
    for answer, question in zip(answers, asked, strict=True)
  ]
  assert np.mean(scores) >= 0.3
  # What is served is what was measured at the end of the run.
  measured = learned.results["test/exact_match/capital"]
  np.testing.assert_allclose(np.mean(scores), measured, atol=1.5 / len(asked))


def test_an_answer_comes_with_the_passages_it_was_read_from(learned, pipeline):
  (answer,) = pipeline.answer(FRANCE)
  assert (answer.question, answer.text) == (FRANCE, "Paris")
  assert answer.log_prob == pytest.approx(sum(answer.token_log_probs))
  assert -1 < answer.log_prob < 0
  by_id = {record["id"]: record for record in learned.records()}
  assert answer.docs[0].id == "country/FR/capital"
  assert len(answer.docs) == 2
  for doc in answer.docs:
    record = by_id[doc.id]
    assert (doc.title, doc.text) == (record["title"], record["text"])
  assert answer.docs[0].posterior > 0.9
  for sums in (
    sum(doc.prior for doc in answer.docs),
    sum(doc.posterior for doc in answer.docs),
    *np.sum([doc.token_posteriors for doc in answer.docs], axis=0),
  ):
    assert sums == pytest.approx(1)
  assert explain(answer).startswith("Paris   (p = 0.")


def test_several_questions_are_answered_as_each_alone(pipeline, held_out):
  questions = [q.question for q in list(held_out.values())[:4]]
  together = pipeline.answer(questions)
  assert together == [pipeline.answer(question)[0] for question in questions]
  assert together == pipeline.answer(tuple(questions))
  assert len({answer.text for answer in together}) > 1
  assert pipeline.answer([]) == []


def test_other_numbers_of_documents_can_be_read(pipeline, right):
  question = right["country/FR"].question
  trained = pipeline.answer(question)[0]
  for n_docs in (1, 3):
    answer = pipeline.answer(question, n_docs=n_docs)[0]
    assert len(answer.docs) == n_docs
    assert sum(doc.prior for doc in answer.docs) == pytest.approx(1)
    assert answer.retrieved[0] == trained.retrieved[0]
    assert answer.text == trained.text
  assert pipeline.answer(question, n_docs=2) == [trained]
  assert pipeline.answer(question) == [trained]


def test_one_changed_passage_changes_its_answer_and_no_other(
  learned, pipeline, held_out, right, tmp_path
):
  records = with_capitals(learned, held_out, {"country/FR": "Zorbville"})
  changed = [r for r in records if r not in learned.records()]
  assert [r["id"] for r in changed] == ["country/FR/capital"]
  corpus = write_jsonl(tmp_path / "edited.jsonl", records)
  edited = RagPipeline.load(learned.workdir, corpus=corpus)
  (answer,) = edited.answer(FRANCE)
  assert answer.text == "Zorbville"
  assert "Zorbville" in answer.docs[0].text
  assert answer.docs[0].posterior > 0.9
  assert pipeline.answer(FRANCE)[0].text == "Paris"
  others = [q for c, q in right.items() if c != "country/FR"]
  for question, other in zip(
    others, edited.answer([q.question for q in others]), strict=True
  ):
    assert exact_match(other.text, question.answers)


def test_most_answers_follow_their_passages(learned, held_out, right, tmp_path):
  assert len(right) >= 5
  capitals = {c: NAMES[i % len(NAMES)] for i, c in enumerate(right)}
  corpus = write_jsonl(
    tmp_path / "edited.jsonl", with_capitals(learned, held_out, capitals)
  )
  edited = RagPipeline.load(learned.workdir, corpus=corpus)
  answers = edited.answer([q.question for q in right.values()])
  expected = list(capitals.values())
  follow = [a.text == name for a, name in zip(answers, expected, strict=True)]
  assert np.mean(follow) >= 0.6


def test_a_corpus_may_have_fewer_passages_than_were_read_in_training(
  learned, pipeline, tmp_path
):
  records = [r for r in learned.records() if r["id"] == "country/FR/capital"]
  corpus = write_jsonl(tmp_path / "one.jsonl", records)
  one = RagPipeline.load(learned.workdir, corpus=corpus)
  for n_docs in (0, 1):
    (answer,) = one.answer(FRANCE, n_docs=n_docs)
    assert answer.text == "Paris"
    assert [doc.prior for doc in answer.docs] == [1.0]
  with pytest.raises(
    ValueError, match=r"n_docs=2, but .*one\.jsonl has only 1"
  ):
    one.answer(FRANCE, n_docs=2)


def test_one_device_answers_for_a_model_that_was_trained_on_many(pipeline, run):
  change_config(run, "mesh", data=4, fsdp=2)
  many = RagPipeline.load(run)
  assert many.answer(FRANCE) == pipeline.answer(FRANCE)


def test_loading_writes_nothing(learned, run, tmp_path):
  def files():
    return {p: p.stat().st_mtime_ns for p in run.rglob("*")}

  before = files()
  RagPipeline.load(run).answer(FRANCE)
  corpus = write_jsonl(tmp_path / "same.jsonl", learned.records())
  RagPipeline.load(run, corpus=corpus)
  assert files() == before


def test_a_question_longer_than_the_encoder_takes_is_said_to_be_cut(pipeline):
  (answer,) = pipeline.answer(FRANCE + " Tell me, please." * 9)
  assert answer.question_cut
  assert "Note: the question is longer than the model takes" in explain(answer)
  assert not pipeline.answer(FRANCE)[0].question_cut


def test_closed_book_answers_without_documents(run):
  change_config(run, "data", n_docs=0)
  shutil.rmtree(run / "index")  # such a run has none
  closed = RagPipeline.load(run)
  (answer,) = closed.answer(FRANCE)
  assert answer.docs == ()
  assert "closed book" in explain(answer)
  with pytest.raises(
    ValueError,
    match=r"n_docs=3, but this model was trained closed book .* Leave n_docs",
  ):
    closed.answer(FRANCE, n_docs=3)


def test_a_closed_book_model_refuses_a_corpus(learned, run):
  change_config(run, "data", n_docs=0)
  with pytest.raises(
    ValueError,
    match=r"passages\.jsonl was given, but the model in .*run was trained"
    r" closed book .*Leave the corpus away",
  ):
    RagPipeline.load(run, corpus=learned.passages)


@pytest.mark.parametrize("name", ["nothing", "empty", "file"])
def test_what_is_no_workdir_is_refused(tmp_path, name):
  (tmp_path / "empty").mkdir()
  (tmp_path / "file").write_text("text")
  with pytest.raises(
    FileNotFoundError,
    match=rf"No config\.json in .*{name}; expected the --workdir of a training"
    rf" run\. Train first: python tools/train\.py .*--workdir=.*{name}",
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
  with pytest.raises(FileNotFoundError, match=message):
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
    match=r"no manifest\.json in .*/index: no index was built .*Build the",
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


def test_passages_that_have_changed_since_are_refused(learned, run, tmp_path):
  records = learned.records()
  records[7]["text"] += " Or not."
  changed = write_jsonl(tmp_path / "changed.jsonl", records)
  change_config(run, "data", passages=str(changed))
  with pytest.raises(
    ValueError,
    match=r"/index was built of other passages: .*Set data\.passages to those",
  ):
    RagPipeline.load(run)


def test_another_tokenizer_is_refused(run):
  path = run / "tokenizer" / "tokenizer.json"
  tokenizer = json.loads(path.read_text())
  vocab = tokenizer["model"]["vocab"]
  one, other = list(vocab)[300:302]
  vocab[one], vocab[other] = vocab[other], vocab[one]
  path.write_text(json.dumps(tokenizer))
  with pytest.raises(
    ValueError,
    match=r"The tokenizer in .*/tokenizer is not the one that the model in"
    r" .*/model was trained with.*Put the old files back",
  ):
    RagPipeline.load(run)


def test_a_damaged_tokenizer_is_refused(run):
  cut_off(run / "tokenizer" / "tokenizer.json")
  with pytest.raises(
    ValueError, match=r"The tokenizer in .*/tokenizer cannot be read .*cut"
  ):
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
    ("", r"corpus\.jsonl holds no passages\. Expected at least one\."),
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
