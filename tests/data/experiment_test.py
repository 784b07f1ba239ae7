"""What a config names is opened once, fits together, or is refused."""

import dataclasses
import json

from flax import linen as nn
import jax
import numpy as np
import pytest

from rag_jax.corpus.passages import PassageList
from rag_jax.corpus.tokenizer import load_tokenizer
from rag_jax.data.experiment import check_n_docs
from rag_jax.data.experiment import example_batch
from rag_jax.data.experiment import open_experiment
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.bm25 import Bm25Settings


@pytest.fixture(scope="module")
def experiment(tiny):
  return open_experiment(tiny.config())


def shapes(experiment):
  boxed = jax.eval_shape(experiment.init, jax.random.key(0))
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
    for path, x in jax.tree_util.tree_leaves_with_path(boxed)
  }


def test_the_parts_fit_together(experiment, tiny):
  assert len(experiment.passages) == len(experiment.tokenized) == 40
  assert experiment.config == tiny.config()
  assert experiment.model.generator.config.vocab_size == (
    experiment.tokenizer.vocab_size
  )
  assert experiment.tokenizer.vocab_size <= 600
  assert dict(experiment.mesh.shape) == {
    "data": jax.device_count(),
    "fsdp": 1,
    "tensor": 1,
  }
  assert not experiment.closed_book


def test_the_tokenizer_learns_from_passages_and_questions(experiment):
  # Each occurs in one of the two alone, often enough to be one token.
  words = ["What", "The"]
  assert [len(ids) for ids in experiment.tokenizer.encode(words)] == [1, 1]


def prompted(tiny, **changes):
  config = tiny.config()
  config.data.context_style = "prompt"
  config.data.substitute_answers = 0.0
  config.warmup.num_steps = 0
  for name, value in changes.items():
    setattr(config, name, value)
  return config


def test_a_prompt_holds_all_documents_if_they_are_joined(tiny):
  single = open_experiment(prompted(tiny)).context
  assert not single.prompts.joined
  config = prompted(tiny, loss="concatenate", retriever_loss="none")
  config.prompt.template = "{{ question }}{{ passages|length }}"
  joined = open_experiment(config).context
  _, ids = joined.encode_questions(["Why?"])
  tokens, mask = joined.contexts(ids, np.array([[0, 1]]))
  assert tokens.shape == (1, 1, 40)
  assert joined.tokenizer.decode(tokens[mask]) == "Why?2"


def test_hf_loss_needs_padding_of_its_own(experiment, tiny, tmp_path):
  experiment.tokenizer.save(tmp_path)
  file = tmp_path / "tokenizer_config.json"
  settings = json.loads(file.read_text())
  assert settings.pop("pad_token") == "<pad>"
  file.write_text(json.dumps(settings))
  config = tiny.config()
  config.tokenizer.path = str(tmp_path)
  open_experiment(config)
  config.hf_loss = True
  with pytest.raises(
    ValueError,
    match=(
      "hf_loss=True recognises padding by its id, but the generator's tokenizer"
      r" pads with its end token \(2\), .* Set hf_loss=False"
    ),
  ):
    open_experiment(config)


def test_the_example_has_the_shapes_of_the_config(experiment):
  batch = example_batch(experiment.config)
  assert batch.context_tokens.shape == (1, 2, 40)
  assert batch.target_tokens.shape == (1, 8)
  assert batch.question_tokens.shape == (1, 16)
  assert batch.doc_tokens.shape == (1, 2, 24)
  assert batch.context_mask.all()


@pytest.fixture(scope="module")
def retriever(experiment, tiny):
  """Fresh parameters of the question tower."""
  with tiny.compiling():
    boxed = jax.jit(experiment.init)(jax.random.key(0))
  return {"question_encoder": nn.meta.unbox(boxed)["question_encoder"]}


def test_closed_book_has_the_same_parameters(experiment, tiny):
  closed_book = open_experiment(tiny.config(data__n_docs=0))
  assert closed_book.closed_book
  assert shapes(closed_book) == shapes(experiment)


def test_a_tokenizer_is_saved_once_and_opened_again(tiny, tmp_path):
  path = tmp_path / "tokenizer"
  made = open_experiment(tiny.config(), tokenizer_path=path)
  # Were it trained again, it would have another size.
  config = tiny.config(tokenizer__vocab_size=512)
  opened = open_experiment(config, tokenizer_path=path)
  assert opened.tokenizer.fingerprint == made.tokenizer.fingerprint
  assert load_tokenizer(path).fingerprint == made.tokenizer.fingerprint


def test_the_retriever_may_have_an_uncased_tokenizer(tiny, tmp_path):
  config = tiny.config(tokenizer__retriever="uncased")
  made = open_experiment(config, tokenizer_path=tmp_path)
  opened = open_experiment(config, tokenizer_path=tmp_path)
  assert opened.token_ids == made.token_ids
  assert made.retriever_tokenizer is not made.tokenizer
  for text in ("Zürich", "ZURICH"):
    ids, context_ids = made.context.encode_questions([text])
    assert made.retriever_tokenizer.decode(ids[0]) == "zurich"
    assert made.tokenizer.decode(context_ids[0]) == text


def test_a_tokenizer_can_be_brought(experiment, tiny, tmp_path):
  experiment.tokenizer.save(tmp_path / "mine")
  config = tiny.config(
    tokenizer__path=str(tmp_path / "mine"), tokenizer__vocab_size=512
  )
  opened = open_experiment(config, tokenizer_path=tmp_path / "copy")
  assert opened.tokenizer.fingerprint == experiment.tokenizer.fingerprint
  # The run keeps one of its own, in case the other one changes.
  assert (tmp_path / "copy" / "tokenizer.json").exists()


def test_a_tokenizer_that_is_not_there_is_refused(tiny, tmp_path):
  config = tiny.config(tokenizer__path=str(tmp_path / "mine"))
  with pytest.raises(
    FileNotFoundError, match=r"no tokenizer in .*/mine; .*set tokenizer"
  ):
    open_experiment(config)


def test_other_passages_can_be_read_than_the_config_names(
  experiment, retriever, tiny, tmp_path
):
  experiment.tokenizer.save(tmp_path)
  first = dataclasses.replace(experiment.passages[0], text="Other.")
  passages = PassageList([first, *experiment.passages[1:3]], origin="mine")
  opened = open_experiment(
    tiny.config(), tokenizer_path=tmp_path, passages=passages
  )
  assert opened.passages is passages
  index = opened.index_builder.build(retriever)
  assert index.num_passages == 3
  assert index.passages_fingerprint == passages.fingerprint
  # Row by row, as those of the config are embedded.
  all_of_them = experiment.index_builder.build(retriever)
  same = np.isclose(index.embeddings, all_of_them.embeddings[:3], rtol=1e-5)
  assert same.all(axis=1).tolist() == [False, True, True]


def test_more_documents_than_passages_are_refused(tiny, experiment):
  with pytest.raises(
    ValueError,
    match=r"n_docs=41, but .*/passages\.jsonl has only 40 passages\. Lower"
    r" n_docs \(data\.n_docs in a config\), or bring more passages\.",
  ):
    open_experiment(tiny.config(data__n_docs=41))
  check_n_docs(40, experiment.passages)


def test_another_number_of_passages_than_expected_is_refused(tiny):
  with pytest.raises(
    ValueError, match=r"has 40 passages, but data\.num_passages=41\. Correct"
  ):
    open_experiment(tiny.config(data__num_passages=41))


def test_a_mesh_of_other_devices_is_refused(tiny):
  with pytest.raises(
    ValueError, match=r"mesh\.data=3.*need 3 devices, but there are 1\."
  ):
    open_experiment(tiny.config(mesh__data=3), devices=jax.devices()[:1])


def test_a_config_that_cannot_be_is_refused_first(tiny):
  config = tiny.config()
  config.data.n_docs = -1
  with pytest.raises(ValueError, match=r"data\.n_docs=-1 must be at least 0"):
    open_experiment(config)


def test_missing_passages_are_refused(tiny):
  with pytest.raises(
    FileNotFoundError, match=r"There is no file .*/passage\.jsonl"
  ):
    open_experiment(
      tiny.config(data__passages=str(tiny.root / "passage.jsonl"))
    )


def test_words_are_indexed_only_if_they_are_searched(experiment, tiny):
  assert experiment.bm25 is None
  assert example_batch(experiment.config).bm25_scores is None
  assert set(experiment.identity) == {"passages", "tokenizer"}
  hybrid = open_experiment(tiny.config(index__hybrid=True))
  assert hybrid.bm25.num_passages == 40
  assert example_batch(hybrid.config).bm25_scores.shape == (1, 2)
  new = {"hybrid/log_dense": (), "hybrid/log_bm25": ()}
  found = {k.removesuffix("/value"): v for k, v in shapes(hybrid).items()}
  known = {k.removesuffix("/value"): v for k, v in shapes(experiment).items()}
  assert found == known | new


def test_a_saved_index_of_words_is_opened_if_it_is_of_the_passages(
  experiment, tiny, tmp_path
):
  settings = Bm25Settings(k1=1.2, stemmer="english")
  for name, fingerprint in (
    ("good", experiment.passages.fingerprint),
    ("other", "1a2b"),
  ):
    Bm25Index.build(
      experiment.passages, passages_fingerprint=fingerprint, settings=settings
    ).save(tmp_path / name)
  config = tiny.config(
    index__hybrid=True, index__bm25_path=str(tmp_path / "good")
  )
  assert open_experiment(config).bm25.settings == settings
  config.index.bm25_path = str(tmp_path / "other")
  with pytest.raises(ValueError, match="was built of other passages"):
    open_experiment(config)
