"""Cross-encoders against PyTorch's classes, one pair at a time, from strings.

The reference: tiny random models that `save_pretrained` wrote with a tokenizer,
and a loop over the pairs. Texts are longer than the positions in some pairs.
"""

import functools
import random

import numpy as np
import pytest
from small_encoder import write_encoder
from small_search import ANIMALS
from small_search import PLACES
from small_search import build
from small_search import sentence
import tokenizers
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers.processors import RobertaProcessing
from tokenizers.processors import TemplateProcessing
import torch
import transformers

from rag_jax.api import pickles
from rag_jax.search.reranker import Reranker
from rag_jax.weights.cross_encoder import load_cross_encoder

pytestmark = pytest.mark.parity

WORDS = sorted({w for a in ANIMALS for p in PLACES
                for w in sentence(a, p).split()})  # fmt: skip
V, POSITIONS = 60, 24
SIZES = {
  "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2,
  "num_attention_heads": 4, "intermediate_size": 40, "num_labels": 1,
}  # fmt: skip
# Class, its config, and whether pairs are as RoBERTa's.
CLASSES = {
  "bert": (
    transformers.BertForSequenceClassification,
    transformers.BertConfig(**SIZES, max_position_embeddings=POSITIONS),
  ),
  "roberta": (
    transformers.RobertaForSequenceClassification,
    transformers.RobertaConfig(
      **SIZES, max_position_embeddings=POSITIONS + 2, type_vocab_size=1,
      layer_norm_eps=1e-5, hidden_act="gelu_new",
    ),
  ),
  "xlm-roberta": (
    transformers.XLMRobertaForSequenceClassification,
    transformers.XLMRobertaConfig(
      **SIZES, max_position_embeddings=POSITIONS + 2, type_vocab_size=1
    ),
  ),
  "mpnet": (
    transformers.MPNetForSequenceClassification,
    transformers.MPNetConfig(**SIZES, max_position_embeddings=POSITIONS + 2),
  ),
  "distilbert": (
    transformers.DistilBertForSequenceClassification,
    transformers.DistilBertConfig(
      vocab_size=V, dim=32, n_layers=2, n_heads=4, hidden_dim=40,
      max_position_embeddings=POSITIONS, num_labels=1,
    ),
  ),
}  # fmt: skip


@functools.cache
def reference(kind):
  model_class, config = CLASSES[kind]
  model = model_class(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.normal_(0.0, 0.2, generator=generator)
      if name.lower().endswith(("layernorm.weight", "layer_norm.weight")):
        x += 1
  return model


def tokenizer(kind):
  """Returns one of whole words, with the pairs of the family."""
  like_bert = "bert" in kind and "roberta" not in kind
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  if not like_bert:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
  vocab = {word: i for i, word in enumerate([*special, *WORDS])}
  unk = special[1] if like_bert else special[3]
  inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=unk))
  inner.pre_tokenizer = pre_tokenizers.Whitespace()
  names = ["input_ids", "attention_mask"]
  if like_bert:
    inner.post_processor = TemplateProcessing(
      single="[CLS] $A [SEP]",
      pair="[CLS] $A [SEP] $B:1 [SEP]:1",
      special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names += ["token_type_ids"] if kind == "bert" else []
    pad, start, end = special[0], special[2], special[3]
  else:
    inner.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    pad, start, end = special[1], special[0], special[2]
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, pad_token=pad, unk_token=unk, cls_token=start,
    sep_token=end, model_input_names=names,
  )  # fmt: skip


def save(kind, path):
  reference(kind).save_pretrained(path)
  tokenizer(kind).save_pretrained(path)
  return path


def logits(kind, path, question, texts, length=POSITIONS):
  """Returns PyTorch's, of each pair alone, as CrossEncoder reads it."""
  theirs = transformers.AutoTokenizer.from_pretrained(path)
  found = []
  for text in texts:
    inputs = theirs(
      [question], [text], truncation=True, max_length=length,
      return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
      found.append(reference(kind)(**inputs).logits[0, 0].item())
  return np.array(found)


KINDS = pytest.mark.parametrize("kind", list(CLASSES))


@KINDS
def test_logits_are_those_of_pytorch(kind, tmp_path):
  path = save(kind, tmp_path)
  chosen = random.Random(0)
  questions = [" ".join(chosen.choices(WORDS, k=n)) for n in (3, 40, 9)]
  lengths = (5, 0, 40, 10, 1, 19)
  texts = [" ".join(chosen.choices(WORDS, k=n)) for n in lengths]
  loaded = load_cross_encoder(path)
  assert not [note for note in loaded.report.notes if "does not know" in note]
  found = Reranker.open(path, batch_size=8).score(questions, [texts] * 3)
  for question, ours in zip(questions, found, strict=True):
    expected = logits(kind, path, question, texts)
    assert np.std(expected) > 0.03
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_a_shorter_length_cuts_pairs_as_in_transformers(tmp_path):
  path = save("bert", tmp_path)
  texts = [" ".join(WORDS), " ".join(WORDS[:4])]
  (found,) = Reranker.open(path, length=12).score([texts[0]], [texts])
  expected = logits("bert", path, texts[0], texts, length=12)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_types_of_the_two_texts_are_read(tmp_path):
  """Without them, BERT's logits would be others."""
  path = save("bert", tmp_path)
  (found,) = Reranker.open(path).score([WORDS[3]], [[WORDS[4]]])
  inputs = tokenizer("bert")([WORDS[3]], [WORDS[4]], return_tensors="pt")
  inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
  with torch.no_grad():
    other = reference("bert")(**inputs).logits[0, 0].item()
  assert abs(found[0] - other) > 1e-3


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_a_search_is_ordered_as_a_loop_in_pytorch_orders_it(
  kind, tmp_path, searched
):
  path = save(kind, tmp_path / "model")
  question = "where do the owls of the north live"
  for mode in ("dense", "hybrid"):
    (first,) = searched.search([question], 20, mode=mode)
    read = [f"{h.passage.title} {h.passage.text}" for h in first]
    expected = logits(kind, path, question, read)
    order = np.argsort(-expected, kind="stable")[:6]
    reranker = Reranker.open(path, candidates=20)
    (hits,) = searched.search([question], 6, mode=mode, reranker=reranker)
    assert [h.passage.id for h in hits] == [first[i].passage.id for i in order]
    scores = [hit.score for hit in hits]
    np.testing.assert_allclose(scores, expected[order], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
  root = tmp_path_factory.mktemp("searched")
  texts = [sentence(a, p) for a in ANIMALS for p in PLACES]
  for i, text in enumerate(texts):
    (root / "corpus").mkdir(exist_ok=True)
    (root / "corpus" / f"{i}.txt").write_text(text)
  write_encoder(root / "encoder", texts)
  return build(root / "corpus", root / "encoder", root / "index")


def test_a_pickle_is_converted_once_and_computes_the_same(tmp_path):
  path = save("distilbert", tmp_path / "model")
  torch.save(reference("distilbert").state_dict(), path / "pytorch_model.bin")
  (path / "model.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="pytorch_model"):
    Reranker.open(path)
  where = pickles.converted(str(path), tmp_path / "cache", as_is=True)
  assert where == pickles.converted(str(path), tmp_path / "cache", as_is=True)
  (found,) = Reranker.open(where).score([WORDS[1]], [WORDS[2:5]])
  expected = logits("distilbert", path, WORDS[1], WORDS[2:5])
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
