"""RAG checkpoints are asked as transformers asks them, from the question on.

The reference: `generate` of a RAG with its retriever, on small random models in
the layout of facebook/rag-*, with the files of real tokenizers.
"""

import json
import pickle

import numpy as np
from processes import run_tool
import pytest
import small_hf_rag as small
import small_search
import torch

from rag_jax.api import pickles
from rag_jax.retrieval.retriever import Embedder
from rag_jax.serving.pipeline import RagPipeline
from rag_jax.weights.directory import open_directory
from rag_jax.weights.load import load_rag
from rag_jax.weights.saved import is_ours
from rag_jax.weights.tensors import TensorFiles

pytestmark = pytest.mark.parity

MAX_LENGTH = 14


@pytest.fixture(scope="module", params=["token", "sequence"])
def kind(request):
  return request.param


@pytest.fixture(scope="module")
def saved(kind, tmp_path_factory):
  """Directories of the RAG and of the encoder of passages."""
  return small.paths(tmp_path_factory.mktemp(kind), kind, pickled=True)


@pytest.fixture(scope="module")
def expected(saved, kind):
  """A function (settings) -> what transformers answers."""
  model = small.reference(*saved, kind)
  return lambda **settings: small.answers(*model, small.QUESTIONS, **settings)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return small.write_passages(tmp_path_factory.mktemp("corpus") / "p.jsonl")


@pytest.fixture(scope="module")
def converted(saved, tmp_path_factory):
  """The two directories as the tools read pickles."""
  cache = tmp_path_factory.mktemp("cache")
  return [pickles.converted(str(path), cache) for path in saved]


def text_of(ids, pipeline):
  return [pipeline.experiment.tokenizer.tokens([i])[0] for i in ids]


@pytest.mark.parametrize("num_beams", [1, 4])
def test_tokens_are_those_of_transformers(
  expected, converted, corpus, num_beams
):
  settings = {"num_beams": num_beams, "max_length": MAX_LENGTH}
  model, encoder = converted
  assert is_ours(model)
  pipeline = RagPipeline.from_checkpoint(
    model, corpus, passage_encoder=encoder, generation=settings
  )
  ours = pipeline.answer(small.QUESTIONS)
  theirs = expected(**settings)
  for answer, (text, ids) in zip(ours, theirs, strict=True):
    assert answer.text == text
    size = len(answer.tokens)
    assert list(answer.tokens) == text_of(ids[:size], pipeline)
    assert set(ids[size:]) <= {1}  # padding
  # Equality means something: answers and documents differ by the question.
  assert len({answer.text for answer in ours}) > 1
  assert len({answer.docs[0].id for answer in ours}) > 1
  assert {len(answer.docs) for answer in ours} == {small.N_DOCS}


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_the_command_answers_as_transformers_with_what_the_hub_has(
  saved, expected, corpus, tmp_path, monkeypatch
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  model, encoder = saved
  process = run_tool(
    "ask.py",
    f"--model={model}",
    f"--passage_encoder={encoder}",
    f"--corpus={corpus}",
    "--num_beams=4",
    "--json",
    *small.QUESTIONS,
  )
  assert process.returncode == 0, process.stderr
  ours = [json.loads(line)["text"] for line in process.stdout.splitlines()]
  # No length is given: the default differs between the kinds.
  assert ours == [text for text, _ in expected(num_beams=4)]
  assert "are a pickle: they are converted once" in process.stderr


def test_safetensors_are_asked_where_they_lie_and_the_file_says_how(
  kind, expected, saved, corpus, tmp_path
):
  model = small.save_rag(tmp_path / "rag", kind, pickled=False)
  settings = {"num_beams": 2, "max_length": 9, "min_length": 4}
  if kind == "sequence":  # transformers 5 does not read the file for it
    settings |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    settings |= {"forced_eos_token_id": 2}
  file = model / "generation_config.json"
  said = json.loads(file.read_text()) if file.exists() else {}
  small.write_json(file, **said | settings)
  encoder = small.save_passage_encoder(tmp_path / "encoder", pickled=False)
  pipeline = RagPipeline.from_checkpoint(
    str(model), corpus, passage_encoder=str(encoder)
  )
  texts = [answer.text for answer in pipeline.answer(small.QUESTIONS)]
  assert texts == [text for text, _ in expected(**settings)]


@pytest.fixture(scope="module")
def searchable(saved, converted, corpus, tmp_path_factory):
  """What tools/build_index.py makes of the corpus for this model."""
  path = tmp_path_factory.mktemp("search") / "index"
  small_search.build(corpus, converted[1], path, question_encoder=converted[0])
  return path


def test_a_search_directory_is_answered_from_without_embedding(
  converted, corpus, searchable, monkeypatch
):
  model, encoder = converted
  first = RagPipeline.from_checkpoint(
    model, corpus, passage_encoder=encoder, generation={"max_length": 9}
  ).answer(small.QUESTIONS)

  def embed(*_):
    raise AssertionError("the embeddings are there")

  monkeypatch.setattr(Embedder, "passages", embed)
  pipeline = RagPipeline.from_checkpoint(
    model, searchable, generation={"max_length": 9}
  )
  for one, other in zip(pipeline.answer(small.QUESTIONS), first, strict=True):
    assert one.tokens == other.tokens
    assert [d.id for d in one.docs] == [d.id for d in other.docs]


def test_embeddings_of_another_encoder_are_refused(
  converted, searchable, tmp_path
):
  other = small.save_passage_encoder(tmp_path / "other", False, seed=9)
  with pytest.raises(ValueError, match="were embedded with other weights"):
    RagPipeline.from_checkpoint(
      converted[0], searchable, passage_encoder=str(other)
    )


def test_a_folder_of_documents_is_answered_from(converted, tmp_path):
  (tmp_path / "France.txt").write_text("The capital of France is Paris.")
  (tmp_path / "peru.md").write_text("# Peru\n\nThe capital is Lima.")
  model, encoder = converted
  pipeline = RagPipeline.from_checkpoint(
    model, tmp_path, passage_encoder=encoder, generation={"max_length": 9}
  )
  (answer,) = pipeline.answer(small.QUESTIONS[0])
  # Fewer than the model reads: all are read.
  assert {doc.id for doc in answer.docs} == {"France.txt", "peru.md"}


class Bomb:
  """What a pickle may hold beside weights."""

  def __reduce__(self):
    """Returns what loading it would run."""
    return (print, ("It was run.",))


def flip(file):
  """Changes one bit of the weights, which torch does not notice."""
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 64
  file.write_bytes(data)


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (lambda f: f.write_bytes(f.read_bytes()[:-5000]), "cannot be read as wei"),
    (lambda f: flip(f), "bin is damaged: .*data/.* does not have its checksum"),
    (lambda f: f.write_bytes(b"no pickle"), "cannot be read as weights"),
    (
      lambda f: f.write_bytes(pickle.dumps({"a": Bomb()}, 2)),
      "holds other objects, which are never loaded",
    ),
    (lambda f: torch.save({"a": Bomb()}, f), "which are never loaded"),
    (lambda f: torch.save([torch.zeros(2)], f), "holds a list that is no dict"),
    (
      lambda f: torch.save({"a": torch.zeros(2).to_sparse()}, f),
      "a tensor that is not dense numbers",
    ),
  ],
)
def test_a_pickle_that_is_more_or_less_than_weights_is_refused(
  tmp_path, capsys, spoil, message
):
  path = small.save_passage_encoder(tmp_path / "encoder")
  spoil(path / "pytorch_model.bin")
  with pytest.raises(ValueError, match=message):
    pickles.import_any(str(path), str(tmp_path / "out"))
  assert capsys.readouterr().out == ""
  assert not (tmp_path / "out").exists()
  assert {f.name for f in tmp_path.iterdir()} == {"encoder"}


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_old_files_shards_and_half_precision_are_read(tmp_path, legacy, shards):
  path = small.save_passage_encoder(tmp_path / "encoder")
  file = path / "pytorch_model.bin"
  state = torch.load(file, weights_only=True)
  names = sorted(state)
  state[names[0]] = state[names[0]].bfloat16()
  file.unlink()
  parts = {
    f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin": names[i::shards]
    for i in range(shards)
  }
  if shards == 1:
    parts = {"pytorch_model.bin": names}
  else:
    small.write_json(
      path / "pytorch_model.bin.index.json",
      weight_map={n: part for part, some in parts.items() for n in some},
    )
  for part, some in parts.items():
    torch.save(
      {name: state[name] for name in some},
      path / part,
      _use_new_zipfile_serialization=not legacy,
    )
  pickles._write_safetensors(open_directory(str(path)), tmp_path / "out")
  read = open_directory(str(tmp_path / "out"))
  files = TensorFiles(read)
  assert files.names == names
  for name in names:
    if state[name].dtype.is_floating_point:
      expected = state[name].float().numpy()
      np.testing.assert_array_equal(files.read(name), expected)


def test_without_a_passage_encoder_the_error_says_what_to_give(
  converted, corpus
):
  with pytest.raises(ValueError, match="--passage_encoder=hf:facebook/dpr-ctx"):
    RagPipeline.from_checkpoint(converted[0], corpus)


def test_a_model_without_tokenizers_is_refused(kind, corpus, tmp_path):
  model = small.save_rag(tmp_path / "rag", kind, pickled=False)
  for file in (model / "generator_tokenizer").iterdir():
    file.unlink()
  with pytest.raises(FileNotFoundError, match="no generator_tokenizer in"):
    RagPipeline.from_checkpoint(str(model), corpus)


def test_what_was_converted_holds_the_same_model(converted, saved, tmp_path):
  rag = load_rag(converted[0])
  assert rag.settings.n_docs == small.N_DOCS
  assert rag.generator.tokenizer.startswith(converted[0])
  state = torch.load(saved[0] / "pytorch_model.bin", weights_only=True)
  np.testing.assert_array_equal(
    rag.generator.params["token_embedding"]["embedding"],
    state["rag.generator.model.shared.weight"].numpy(),
  )
