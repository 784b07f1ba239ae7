"""Pairs of texts are those of the tokenizers library, cut as it cuts them."""

import itertools

import pytest
import tokenizers
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers.processors import RobertaProcessing
from tokenizers.processors import TemplateProcessing
import transformers

from rag_jax.corpus.pairs import PairTemplate
from rag_jax.corpus.tokenizer import Tokenizer

WORDS = [f"w{i}" for i in range(9)]
VOCAB = {x: i for i, x in enumerate(["<pad>", "<s>", "</s>", "?", *WORDS])}
SPECIAL = [("<s>", 1), ("</s>", 2)]
BERT = TemplateProcessing(
  single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=SPECIAL
)
PROCESSORS = {
  "bert": BERT,
  "roberta": RobertaProcessing(("</s>", 2), ("<s>", 1)),
  "one mark between": TemplateProcessing(
    single="$A", pair="$A </s> $B:1", special_tokens=SPECIAL
  ),
  "none": None,
}


NAMES = ["input_ids", "token_type_ids", "attention_mask"]


def make(processor, names=NAMES):
  inner = tokenizers.Tokenizer(models.WordLevel(VOCAB, unk_token="?"))
  inner.pre_tokenizer = pre_tokenizers.Whitespace()
  if processor is not None:
    inner.post_processor = processor
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, pad_token="<pad>", bos_token="<s>",
    eos_token="</s>", unk_token="?", model_input_names=names,
  )  # fmt: skip


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pairs_of_all_lengths_are_cut_as_in_the_library(kind):
  theirs, ours = make(PROCESSORS[kind]), Tokenizer(make(PROCESSORS[kind]))
  template = PairTemplate.of(ours)
  for n, m in itertools.product(range(10), range(10)):
    first, second = " ".join(WORDS[:n]), " ".join(WORDS[::-1][:m])
    encoded = ours.encode([first, second])
    for length in range(template.num_special, 24):
      expected = theirs(
        [first], [second], truncation="longest_first", max_length=length
      )
      tokens, types = template.join(*encoded, length)
      assert list(tokens) == expected.input_ids[0], (n, m, length)
      assert list(types) == expected.token_type_ids[0], (n, m, length)


def test_types_are_those_that_the_model_of_the_tokenizer_gets():
  typed = PairTemplate.of(Tokenizer(make(BERT)))
  assert (typed.types, typed.num_types) == ((0, 1), 2)
  names = ["input_ids", "attention_mask"]
  plain = PairTemplate.of(Tokenizer(make(BERT, names)))
  assert (plain.types, plain.num_types) == ((0, 0), 1)
  assert plain.special == typed.special == ((1,), (2,), (2,))


def test_the_text_of_a_special_token_stays_text():
  template = PairTemplate.of(Tokenizer(make(BERT)))
  tokenizer = Tokenizer(make(BERT))
  tokens, _ = template.join(*tokenizer.encode(["w1 </s>", "<s> w2"]), 30)
  assert tokens.count(1) == 1
  assert tokens.count(2) == 2


def test_a_tokenizer_that_turns_the_texts_around_is_refused():
  turned = TemplateProcessing(
    single="$A", pair="$B </s> $A", special_tokens=SPECIAL
  )
  with pytest.raises(ValueError, match=r"one after the other .*\[1, None, 0\]"):
    PairTemplate.of(Tokenizer(make(turned)))
