"""Dialogues are read from their end, by retriever and generator, as told."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from rag_jax.config import DataConfig
from rag_jax.config import DialogueConfig
from rag_jax.config import PromptConfig
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenized import Wording
from rag_jax.corpus.tokenizer import load_tokenizer
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.data.context import ContextBuilder
from rag_jax.data.dialogue import Asked
from rag_jax.data.dialogue import TurnIds
from rag_jax.data.dialogue import without_start

PASSAGES = (
  Passage("a", "France", "The capital is Paris. It uses the Euro."),
  Passage("b", "Peru", "Lima is the capital, by the sea."),
)
TURNS = (
  "Is Lima by the sea?",
  "It is.",
  "What is the capital of France?",
  "P.",
)
ASKED = Asked("And its currency?", TURNS)
NAMES = DialogueConfig(user="U: ", assistant="A: ", separator=" | ")
BOS, EOS = 0, 2


@pytest.fixture(scope="module")
def tokenizer():
  texts = [f"{p.title} {p.text}" for p in PASSAGES] + [*TURNS, ASKED.question]
  return train_tokenizer(texts * 3, 420)


@pytest.fixture(scope="module")
def other():
  return train_tokenizer(
    ["what is the capital?", *TURNS] * 3, 400, uncased=True
  )


def builder(tokenizer, dialogue=None, retriever=None, wording=None, **data):
  config = DataConfig(**{"n_docs": 2, "context_length": 96, **data})
  prompt = config.context_style == "prompt"
  return ContextBuilder(
    tokenizer,
    TokenizedPassages(PASSAGES, tokenizer, 64),
    config,
    TokenizedPassages(PASSAGES, retriever, 64) if retriever else None,
    wording=wording or Wording(),
    dialogue=dialogue,
    prompt=PromptConfig() if prompt else None,
    joined=prompt,
  )


def read(array):
  """The rows of ids that a mask leaves."""
  tokens, mask = array
  return [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]


def test_speakers_are_named_in_turn_from_the_end(tokenizer):
  made = builder(tokenizer, NAMES, question_length=200, context_length=200)
  ids, context_ids = made.encode_questions([ASKED, "Why?"])
  whole = (
    "U: Is Lima by the sea? | A: It is. | U: What is the capital of France? |"
    " A: P. | U: And its currency?"
  )
  expected = tokenizer.encode([whole, "U: Why?"])
  assert read(made.questions(ids)) == [[BOS, *x, EOS] for x in expected]
  contexts, mask = made.contexts(context_ids, np.zeros((2, 0), np.int32))
  rows = read((contexts[:, 0], mask[:, 0]))
  assert rows == [[BOS, *x, EOS] for x in expected]
  assert made.counts["histories_cut"] == 0
  odd = made.encode_questions([Asked("Why?", ("Yes.",))])[0]
  assert odd == tokenizer.encode(["A: Yes. | U: Why?"])


def test_without_names_and_history_all_is_as_before(tokenizer, other):
  questions = ["What is Peru?", " a\n\nb ", ""]
  for style in ("question_first", "rag"):
    for retriever in (None, other):
      for prompt in ("", "query: "):
        made = builder(
          tokenizer, retriever=retriever, wording=Wording(prompt),
          context_style=style,
        )  # fmt: skip
        ids, context_ids = made.encode_questions(questions)
        reads = retriever or tokenizer
        assert ids == reads.encode([prompt + q for q in questions])
        assert context_ids == (reads if style == "rag" else tokenizer).encode(
          questions
        )
        assert not any(isinstance(x, TurnIds) for x in [*ids, *context_ids])
        assert made.words(questions) == questions


def test_a_dialogue_of_lines_is_the_text_that_it_was(tokenizer):
  """KILT's inputs, which were one text with several lines."""
  text = "\n".join((*TURNS, ASKED.question))
  made = builder(tokenizer)
  assert made.encode_questions([ASKED]) == made.encode_questions([text])
  assert made.words([ASKED]) == [text]


def test_the_retriever_may_read_fewer_turns(tokenizer, other):
  config = dataclasses.replace(NAMES, turns=3, retriever_turns=1)
  made = builder(tokenizer, config, other)
  ids, context_ids = made.encode_questions([ASKED])
  assert ids == other.encode(["A: P. | U: And its currency?"])
  assert context_ids == tokenizer.encode(
    ["A: It is. | U: What is the capital of France? | A: P. | "
     "U: And its currency?"]
  )  # fmt: skip
  assert made.words([ASKED]) == ["P.\nAnd its currency?"]
  none = builder(tokenizer, dataclasses.replace(NAMES, turns=0))
  assert none.encode_questions([ASKED]) == none.encode_questions(
    [ASKED.question]
  )
  assert none.words([ASKED]) == [ASKED.question]
  assert not none.reads_history
  assert made.reads_history


def slow_cut(prompt, before, question, room):
  """Takes one token after the other from the start of the earlier turns."""
  before = list(before)
  while before and len(prompt) + len(before) + len(question) > room:
    del before[0]
  return [*prompt, *before, *question]


@pytest.mark.parametrize("prompt", ["", "query: "])
@pytest.mark.parametrize("most", [0, 5, 500])
def test_earlier_turns_are_cut_from_their_start(tokenizer, prompt, most):
  config = dataclasses.replace(NAMES, history_length=most)
  text = NAMES.separator.join(
    ["U: " + TURNS[0], "A: " + TURNS[1], "U: " + TURNS[2], "A: " + TURNS[3], ""]
  )
  asked = "U: " + ASKED.question
  [head, question, joint] = tokenizer.encode(
    [prompt.strip(), asked, prompt + text + asked]
  )
  assert joint[: len(head)] == head
  assert joint[-len(question) :] == question
  before = joint[len(head) : -len(question)]
  for length in range(8, len(head) + len(before) + len(question) + 6):
    made = builder(
      tokenizer, config, question_length=length, context_length=length,
      wording=Wording(prompt),
    )  # fmt: skip
    ids, context_ids = made.encode_questions([ASKED])
    room = length - 2
    kept = slow_cut(head, before, question, room)
    with made.counting() as cut:
      assert read(made.questions(ids)) == [[BOS, *kept[:room], EOS]]
    whole = len(head) + len(before) + len(question)
    assert cut["histories_cut"] == (whole > room)
    alone = len(head) + len(question)
    assert cut["questions_cut"] == (alone > room)
    [own] = context_ids
    begin = max(own.before - (most or length // 2), 0)
    kept = slow_cut([], own[begin : own.before], question, room)
    with made.counting() as cut:
      tokens, mask = made.contexts(context_ids, np.zeros((1, 0), np.int32))
    assert read((tokens[:, 0], mask[:, 0])) == [[BOS, *kept[:room], EOS]]
    assert cut["histories_cut"] == (len(kept) < len(own))
    assert cut["contexts_cut"] == (len(question) > room)
    assert made.is_cut(ids[0], own) == (alone > room)


def test_a_limit_of_the_history_leaves_room_for_passages(tokenizer):
  config = dataclasses.replace(NAMES, history_length=6)
  made = builder(tokenizer, config)
  _, [ids] = made.encode_questions([ASKED])
  tokens, mask = made.contexts([ids], np.array([[0]]))
  [row] = read((tokens[0], mask[0]))
  passage = made.tokenized.tokens[0, : made.tokenized.lengths[0]].tolist()
  assert row == [BOS, *ids.fitted(500, 6), EOS, *passage]
  assert len(ids.fitted(500, 6)) == len(ids) - ids.before + 6


@pytest.mark.parametrize("most", [0, 7])
def test_in_the_style_rag_the_history_goes_before_the_question(
  tokenizer, other, most
):
  config = dataclasses.replace(NAMES, history_length=most)
  for retriever in (None, other):
    for length in range(24, 100, 3):
      made = builder(
        tokenizer, config, retriever, context_style="rag", question_length=12,
        context_length=length,
      )  # fmt: skip
      _, [ids] = made.encode_questions([ASKED])
      reads = retriever or tokenizer
      with made.counting() as cut:
        tokens, mask = made.contexts([ids], np.array([[0, 1]]))
      expected, shorter = [], 0
      for doc in PASSAGES:
        begin = max(ids.before - (most or length // 2), 0)
        for gone in range(begin, ids.before + 1):  # the slow way
          question = reads.decode_hf(ids[gone:])
          text = f"{doc.title} / {doc.text} // {question}".replace("  ", " ")
          [row], too_long = tokenizer.encode_inputs([text], length)
          if not too_long:
            break
        expected.append(row)
        shorter += gone > 0
      assert read((tokens[0], mask[0])) == expected
      assert cut["histories_cut"] == shorter


def test_turns_lose_their_first_tokens(tokenizer):
  ends = tokenizer.token_ends(TURNS)
  total = sum(map(len, ends))
  found = [without_start(TURNS, ends, n) for n in range(total + 1)]
  assert found[0] == TURNS
  assert found[-1] == ()
  assert found[len(ends[0])] == TURNS[1:]
  for before, after in itertools.pairwise(found):
    assert " ".join(before).endswith(" ".join(after))
    assert all(after)


CHAT = (
  "{% for m in messages %}{{ m.role[0] }}<{{ m.content }}>{% endfor %}"
  "{% if add_generation_prompt %}a<{% endif %}"
)


@pytest.fixture(scope="module")
def chatting(tokenizer, tmp_path_factory):
  """The tokenizer with a chat template."""
  folder = tmp_path_factory.mktemp("chat")
  tokenizer.save(folder)
  (folder / "manifest.json").unlink(missing_ok=True)
  path = folder / "tokenizer_config.json"
  config = json.loads(path.read_text()) | {"chat_template": CHAT}
  path.write_text(json.dumps(config))
  return load_tokenizer(folder)


TEMPLATE = (
  "{% for p in passages %}[{{ p.text }}]{% endfor %}"
  "{% for t in history %}({{ t.speaker }}: {{ t.text }}){% endfor %}"
  "{{ question }}"
)
PLAIN = "{% for p in passages %}[{{ p.text }}]{% endfor %}{{ question }}"
SHOWN = "[The capital is Paris. It uses the Euro.]"


def prompts(tokenizer, dialogue=None, length=400, **prompt):
  config = DataConfig(
    n_docs=1, context_style="prompt", context_length=length, question_length=90
  )
  return ContextBuilder(
    tokenizer,
    TokenizedPassages(PASSAGES, tokenizer, 64),
    config,
    dialogue=dialogue,
    prompt=PromptConfig(**prompt),
  )


@pytest.mark.parametrize(
  ("prompt", "expected"),
  [
    ({"template": PLAIN},
     SHOWN + "A: It is. | U: What is the capital of France? | A: P. | U: And"
     " its currency?"),
    ({"template": TEMPLATE},
     SHOWN + "(assistant: It is.)(user: What is the capital of France?)"
     "(assistant: P.)And its currency?"),
    # A chat begins with its user.
    ({"template": PLAIN, "chat": True, "system": "S"},
     "s<S>u<What is the capital of France?>a<P.>u<" + SHOWN
     + "And its currency?>a<"),
    ({"template": TEMPLATE, "chat": True},
     "u<" + SHOWN + "(assistant: It is.)(user: What is the capital of France?)"
     "(assistant: P.)And its currency?>a<"),
  ],
)  # fmt: skip
def test_prompts_show_earlier_turns(chatting, prompt, expected):
  made = prompts(chatting, dataclasses.replace(NAMES, turns=3), **prompt)
  ids, context_ids = made.encode_questions([ASKED])
  assert len(ids[0]) > len(context_ids[0])  # the retriever reads them too
  tokens, mask = made.contexts(context_ids, np.array([[0]]))
  assert chatting.decode(tokens[0, 0][mask[0, 0]]) == expected


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_that_is_too_long_loses_its_earlier_turns_first(
  chatting, chat
):
  wide = prompts(chatting, NAMES, template=PLAIN, chat=chat)
  write = wide.prompts.text
  bare = Passage("", "", "")

  def size(turns, question):
    text = write(question, [bare], turns)
    encode = (
      chatting.encode_special
      if chat
      else lambda x: chatting.encode_prompts(x, ends=False)
    )
    return len(encode([text])[0])

  ends = chatting.token_ends(TURNS)
  shortest = size((), ASKED.question)
  for length in range(shortest - 2, size(TURNS, ASKED.question) + 2):
    made = prompts(chatting, NAMES, length, template=PLAIN, chat=chat)
    _, context_ids = made.encode_questions([ASKED])
    with made.counting() as cut:
      tokens, mask = made.contexts(context_ids, np.array([[0]]))
    turns = TURNS  # the slow way
    for number in range(sum(map(len, ends)) + 1):
      turns = without_start(TURNS, ends, number)
      if size(turns, ASKED.question) <= length:
        break
    found = chatting.decode(tokens[0, 0][mask[0, 0]])
    assert mask[0, 0].sum() <= length
    assert cut["histories_cut"] == (turns != TURNS)
    assert cut["contexts_cut"] == 1
    if length >= shortest and turns != TURNS:
      # Fewer tokens of a text may be more of the prompt: a few more may go.
      assert found in [
        write(
          ASKED.question, [bare], without_start(TURNS, ends, number + more)
        ).strip()
        for more in range(4)
      ]
    elif length < shortest:
      assert turns == ()
      assert ASKED.question not in found
  limited = prompts(
    chatting, dataclasses.replace(NAMES, history_length=4), template=PLAIN,
    chat=chat,
  )  # fmt: skip
  _, context_ids = limited.encode_questions([ASKED])
  tokens, mask = limited.contexts(context_ids, np.array([[0]]))
  total = sum(map(len, ends))
  expected = write(
    ASKED.question, PASSAGES[:1], without_start(TURNS, ends, total - 4)
  )
  assert chatting.decode(tokens[0, 0][mask[0, 0]]) == expected.strip()
  assert limited.counts["histories_cut"] == 1
