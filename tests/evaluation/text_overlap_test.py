"""ROUGE and BLEU beside their packages, and what was copied beside a loop."""

import math
import random
import re

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
import sacrebleu

from rag_jax.corpus.words import plain_words
from rag_jax.evaluation import text_overlap
from rag_jax.evaluation.text_overlap import bleu
from rag_jax.evaluation.text_overlap import bleu_counts
from rag_jax.evaluation.text_overlap import copied
from rag_jax.evaluation.text_overlap import rouge

_PARTS = ["the", "The", "cat", "cats", "sat", "don't", "3.5", "U.S.", "on_top",
          "x-ray", "1,000", "(mat)", "!", "sat,", "\n"]  # fmt: skip


def texts(seed, number, least=0):
  rng = random.Random(seed)
  return [
    " ".join(rng.choices(_PARTS, k=rng.randrange(least, 12)))
    for _ in range(number)
  ]


def test_english_is_scored_as_by_rouge_score_itself():
  theirs = RougeScorer(list(text_overlap.ROUGE))  # with its own tokenizer
  tokens = DefaultTokenizer(use_stemmer=False)
  any_ascii = random.Random(0)
  for text in texts(0, 100):
    noisy = text + "".join(chr(any_ascii.randrange(128)) for _ in range(20))
    assert plain_words(noisy) == tokens.tokenize(noisy)
  above = 0
  for one, other, third in zip(
    texts(1, 200), texts(2, 200), texts(3, 200), strict=True
  ):
    expected = theirs.score_multi([other, third], one)
    found = rouge(one, [other, third])
    assert found == {n: expected[n].fmeasure for n in text_overlap.ROUGE}
    above += found["rouge2"] > 0
  assert above > 50


@pytest.mark.parametrize(
  ("prediction", "answer", "unigrams", "bigrams"),
  [
    ("北京大学", "北京大學", 0.75, 2 / 3),
    ("東京タワー", "東京", 4 / 7, 0.4),
    ("Москва река", "москва", 2 / 3, 0.0),
    ("café au lait", "CAFE au lait", 2 / 3, 0.5),
    ("हिन्दी भाषा", "हिन्दी", 2 / 3, 0.0),
  ],
)
def test_other_scripts_have_words(prediction, answer, unigrams, bigrams):
  found = rouge(prediction, [answer])
  assert found["rouge1"] == pytest.approx(unigrams)
  assert found["rouge2"] == pytest.approx(bigrams)
  assert found["rougeL"] == pytest.approx(unigrams)


@pytest.mark.parametrize(
  ("one", "other"), [("", ""), ("", "cat"), ("cat", ""), ("?!", "?!")]
)
def test_a_text_without_words_shares_nothing(one, other):
  assert set(rouge(one, [other]).values()) == {0.0}


def test_no_answers_is_an_error():
  with pytest.raises(ValueError, match="no answers to compare"):
    rouge("cat", [])


def test_bleu_of_summed_counts_is_that_of_sacrebleu():
  predictions = [*texts(4, 60), "", "one"]
  references = [
    [*texts(5, 60, 1), "a", "one"],
    # Every third question has a single answer.
    [t if i % 3 else None for i, t in enumerate([*texts(6, 60, 1), "b", "1"])],
  ]
  counts = [
    bleu_counts(prediction, [a for a in accepted if a is not None])
    for prediction, *accepted in zip(predictions, *references, strict=True)
  ]
  expected = sacrebleu.corpus_bleu(predictions, references)
  assert expected.score > 5
  assert bleu(np.sum(counts, axis=0)) == pytest.approx(expected.score)
  assert bleu(bleu_counts("one", ["one"])) == 0.0  # no four tokens
  signature = text_overlap.bleu_signature()
  assert signature.endswith(f"version:{sacrebleu.__version__}")


def test_bleu_splits_chinese_by_character():
  prediction, answer = "他在北京大学学习。", "他在北京大学读书。"
  counts = bleu_counts(prediction, [answer])
  expected = sacrebleu.corpus_bleu(
    [prediction], [[answer]], tokenize="zh"
  )  # fmt: skip
  assert bleu(counts) == pytest.approx(expected.score)
  assert expected.score > 40


def test_copied_shares_are_those_of_a_loop():
  documents = ["The cat sat on the mat.", "A dog, in Paris."]

  def loop(answer):
    words = re.findall("[a-z]+", answer.lower())
    lists = [re.findall("[a-z]+", text.lower()) for text in documents]
    found = [any(w in theirs for theirs in lists) for w in words]
    windows = [words[i : i + 3] for i in range(len(words) - 2)]
    whole = [
      any(w == t[i : i + 3] for t in lists for i in range(len(t)))
      for w in windows
    ]
    return np.mean(found), np.mean(whole)

  for answer in (
    "the cat sat in Paris",
    "mat. A dog in Rome",
    "cat sat on cat",
  ):
    assert copied(answer, documents) == pytest.approx(loop(answer))
  assert copied("on the mat, a dog", documents) == (1.0, pytest.approx(1 / 3))
  words, trigrams = copied("Paris, France", documents)
  assert words == 0.5
  assert math.isnan(trigrams)
  assert all(map(math.isnan, copied("?", documents)))


def test_a_missing_package_is_named_with_the_command(monkeypatch):
  monkeypatch.setattr(text_overlap.importlib.util, "find_spec", lambda _: None)
  text_overlap._rouge_scorer.cache_clear()
  with pytest.raises(
    ImportError, match=r"rouge_score, which .* pip install -e \"\.\[eval\]\""
  ):
    rouge("cat", ["cat"])
  assert not text_overlap.is_installed("bleu")
  assert text_overlap.is_installed("em")
