"""Settings are checked before anything expensive, all problems at once."""

import copy
import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from rag_jax import config_json
from rag_jax.config import Config
from rag_jax.config_rules import fields
from rag_jax.config_rules import validate
from rag_jax.models.batch import RagBatch
from rag_jax.models.rag import build_model

JOINED = {
  "loss": "concatenate",
  "retriever_loss": "none",
  "data__context_style": "prompt",
}

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def make(**settings):
  """Returns the defaults with `settings`, whose "__" stands for a dot."""
  config = Config()
  for name, value in settings.items():
    *sections, last = name.split("__")
    part = config
    for section in sections:
      part = getattr(part, section)
    setattr(part, last, value)
  return config


def refused(config):
  with pytest.raises(ValueError, match="The config is not valid") as info:
    validate(config)
  return str(info.value).splitlines()[1:]


def get_config(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config


def test_the_defaults_are_valid_and_come_back_as_they_are():
  config = Config()
  assert validate(config) is config
  assert config == Config()


def test_two_configs_do_not_share_their_sections():
  make(data__n_docs=9)
  assert Config().data.n_docs == 4


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
  ("name", "value", "problem"),
  [
    (
      "index.kind",
      "ivfpq",
      " is not one of ['auto', 'device', 'exact', 'scann'].",
    ),
    ("index.min_recall", 1.1, " must be at most 1."),
    ("index.min_recall", -0.1, " must be at least 0."),
    ("index.scann_dims_per_block", 0, " must be at least 1."),
    (
      "index.scann_anisotropic_threshold",
      1.0,
      " must be below 1; 0.0 turns it off.",
    ),
    ("index.scann_anisotropic_threshold", -0.1, " must be at least 0."),
    ("encoder.score_scale", -1.0, " must be at least 0."),
    ("generator.decoder_start_id", -2, " must be at least -1."),
    ("optimizer.b1", 1.0, " must be below 1."),
    ("data.informal_questions", 1.5, " must be at most 1."),
    ("encoder.num_layers", 99_999_999, " must be at most 1000."),
    ("generator.num_layers", 1001, " must be at most 1000."),
    ("generator.num_decoder_layers", 1001, " must be at most 1000."),
    ("generator.norm", 7, " is not one of ['post', 'pre']."),
    ("encoder.attention_dropout", 1.0, " must be below 1."),
    ("generator.activation_dropout", 1.0, " must be below 1."),
    (
      "exclude_bos_score",
      True,
      " is for hf_loss=True and loss='rag_sequence', but hf_loss=False,"
      " loss='rag_token'. Set them, or exclude_bos_score=False.",
    ),
    (
      "decoding.generation_config",
      "[2]",
      ' is no JSON object, such as {"repetition_penalty": 1.2}. Write one, or'
      ' "" for what the checkpoint says.',
    ),
    (
      "decoding.generation_config",
      "{2}",
      ' is no JSON object, such as {"repetition_penalty": 1.2}. Write one, or'
      ' "" for what the checkpoint says.',
    ),
    (
      "loss",
      "rag_tokens",
      " is not one of ['concatenate', 'fid', 'rag_sequence', 'rag_token']. Did"
      " you mean 'rag_token'?",
    ),
    (
      "encoder.pooling",
      "Mean",
      " is not one of ['cls', 'learned', 'max', 'mean', 'pooler']. Did you mean"
      " 'mean'?",
    ),
    ("train.num_steps", 10.0, " is not a whole number."),
    ("seed", True, " is not a whole number."),
    ("seed", None, " is not a whole number."),
    ("optimizer.peak_lr", "1e-4", " is not a number."),
    ("optimizer.b1", False, " is not a number."),
    ("encoder.tied", 1, " is not True or False."),
    ("index.path", None, " is not a str."),
    ("data.passages", pathlib.PurePosixPath("a.jsonl"), " is not a str."),
    ("optimizer.freeze", "generator", " is not a tuple of str."),
    ("optimizer.freeze", ["generator"], " is not a tuple of str."),
    ("optimizer.freeze", ("generator", 1), " is not a tuple of str."),
    ("train.profile_steps", "2,3", " is not a tuple of int."),
    ("train.profile_steps", (2.0, 3.0), " is not a tuple of int."),
    *(
      (
        "train.profile_steps",
        steps,
        " is no range of the steps 1 to train.num_steps=1000; expected (first,"
        " last), for instance (10, 12), or () to profile none.",
      )
      for steps in ((3,), (0, 3), (4, 3), (4, 1001))
    ),
    ("seed", -1, " must be at least 0."),
    ("data.n_docs", -1, " must be at least 0."),
    ("optimizer.clip_norm", -0.5, " must be at least 0."),
    ("train.batch_size", 0, " must be at least 1."),
    ("mesh.fsdp", 0, " must be at least 1."),
    ("optimizer.peak_lr", NAN, " is not a finite number."),
    ("encoder.score_scale", INF, " is not a finite number."),
    (
      "encoder.embed_dim",
      130,
      " must be a multiple of encoder.num_heads=4, or encoder.head_dim be"
      " given.",
    ),
    ("generator.dropout", 1.0, " must be below 1."),
    ("encoder.dropout", 1.5, " must be below 1."),
    ("optimizer.b2", 1.0, " must be below 1."),
    (
      "index.device_recall_target",
      0.0,
      " must be above 0 and at most 1, which is exact.",
    ),
    (
      "index.device_recall_target",
      1.5,
      " must be above 0 and at most 1, which is exact.",
    ),
    ("warmup.span_max_words", 0, " must be at least 1."),
    (
      "generator.max_positions",
      64,
      " is below the longest input (data.context_length=96,"
      " data.target_length=16). Lower the lengths.",
    ),
    (
      "data.context_length",
      7,
      " leaves no room for a question and a passage; use at least 8.",
    ),
    (
      "index.path",
      "gs://b/index",
      " is a fixed index, but encoder.train_passage_encoder=True makes it"
      " stale. Set encoder.train_passage_encoder=False, or index.path=''.",
    ),
    (
      "encoder.train_passage_encoder",
      False,
      " keeps the passage embeddings as they are, but encoder.tied=True moves"
      " them with the question tower. Set encoder.tied=False.",
    ),
    *(
      (
        "index.swap_steps",
        steps,
        " must be between 1 and index.refresh_steps=50 (exclusive), so that one"
        " rebuild is in use before the next begins.",
      )
      for steps in (0, 50)
    ),
    (
      "tokenizer.vocab_size",
      300,
      " is too small: 256 bytes and the special tokens come first. Use at"
      " least 512.",
    ),
  ],
)
def test_what_is_not_possible_is_named_with_its_value(name, value, problem):
  config = make(**{name.replace(".", "__"): value})
  assert refused(config) == [f"  {name}={value!r}{problem}"]


def test_soar_can_only_be_what_scann_opens_again():
  settings = {"index__scann_soar_lambda": 1.5}
  validate(make(**settings, index__scann_soar_overretrieve=1.1))
  assert refused(make(**settings, index__scann_soar_overretrieve=1.0)) == [
    "  index.scann_soar_overretrieve=1.0 must be above 1, or 0.0 for ScaNN's"
    " own."
  ]
  assert refused(make(index__scann_soar_overretrieve=1.1)) == [
    "  index.scann_soar_overretrieve=1.1 is for index.scann_soar_lambda above"
    " 0."
  ]


def test_a_setting_without_effect_is_refused():
  settings = {"optimizer__momentum_dtype": "bfloat16"}
  validate(make(**settings))
  assert refused(make(**settings, optimizer__kind="adafactor")) == [
    "  optimizer.momentum_dtype='bfloat16' is for AdamW, but optimizer.kind="
    "'adafactor' keeps no momentum. Set it to 'float32'."
  ]


def test_what_looks_at_a_whole_batch_is_not_computed_in_parts():
  settings = {
    "hf_loss": True, "exclude_bos_score": True, "loss": "rag_sequence"
  }  # fmt: skip
  validate(make(**settings))
  assert refused(make(**settings, train__accumulate=2)) == [
    "  exclude_bos_score=True looks at the first tokens of a whole batch, but"
    " train.accumulate=2 computes it in parts. Set it to 1."
  ]


@pytest.mark.parametrize(
  ("settings", "problem"),
  [
    ({"loss": "fid"}, "retriever_loss='marginal' is for the other losses"),
    ({"loss": "fid", "retriever_loss": "emdr2", "train__length_groups": 2},
     "loss='fid' joins the contexts of a question"),
    ({"loss": "fid", "retriever_loss": "none", "hf_loss": True},
     "hf_loss=True has no loss='fid'"),
    ({**JOINED, "hf_loss": True},
     "hf_loss=True has no loss='concatenate'"),
    ({**JOINED, "retriever_loss": "marginal"},
     "loss='concatenate' has no p(y|x,z) of single documents, from which"
     " retriever_loss='marginal' could learn. Set it to 'none'"),
    ({**JOINED, "retriever_loss": "emdr2"}, "retriever_loss='emdr2' could"),
    ({"hf_loss": True, "retriever_loss": "pdist"}, "with 'marginal'"),
    ({"retriever_loss": "loop"}, "Set loss='fid', or choose 'pdist'"),
    ({"data__context_style": "prompt", "prompt__chat": True,
      "dialogue__turns": 3}, "Set it to an even number, or to -1"),
    ({"retriever_loss": "reward", "data__n_docs": 1}, "a single one, whose"),
    ({"retriever_loss": "adist"}, "'adist' attends to all documents"),
    ({"retriever_loss": "emdr2", "data__n_docs": 0}, "a closed-book model"),
    ({"retriever_loss": "replug", "train__accumulate": 2},
     "is a mean over questions"),
    ({"retriever_temperature": 0.0}, "retriever_temperature"),
    ({"target_temperature": -1.0}, "target_temperature"),
    ({"retriever_loss": "kl"}, "retriever_loss"),
  ],
  ids=str,
)  # fmt: skip
def test_objectives_that_do_not_exist_are_refused(settings, problem):
  [found] = refused(make(**settings))
  assert problem in found


def test_objectives_that_exist_are_not_refused():
  for loss in ("rag_token", "rag_sequence", "fid"):
    for retriever_loss in ("none", "emdr2", "emdr2_token", "pdist", "replug"):
      validate(make(loss=loss, retriever_loss=retriever_loss))
  validate(make(loss="fid", retriever_loss="loop", train__pack_contexts=True))
  validate(make(**JOINED, train__length_groups=4))
  validate(make(retriever_loss="emdr2", train__accumulate=2))


PROMPT = {"data__context_style": "prompt"}
NO_LOOP = {"prompt__template": "{{ question }}"}


@pytest.mark.parametrize(
  ("settings", "problem"),
  [
    ({**PROMPT, **NO_LOOP}, "prompt.template='{{ question }}' does not use"),
    ({**PROMPT, "prompt__template": "{%"}, "prompt.template is no Jinja tem"),
    ({**PROMPT, "prompt__template": "{{ question }}{{ passages }}{{ n }}"},
     "prompt.template uses ['n'], but there are only ['history', 'passages',"),
    ({**PROMPT, "prompt__template": "{{ question }}{{ passages[1] }}"},
     "prompt.template fails for 0 passages"),
    ({"dialogue__turns": 0, "dialogue__history_length": 5},
     "dialogue.history_length=5 limits earlier turns, but with dialogue.turns"),
    ({"dialogue__history_length": 96},
     "dialogue.history_length=96 leaves no room for the question in data.cont"),
    ({"dialogue__retriever_turns": 1, "data__n_docs": 0},
     "dialogue.retriever_turns=1 is for a retriever, but data.n_docs=0"),
    ({"dialogue__separator": "", "dialogue__user": "Q: "},
     "dialogue.separator='' leaves nothing between turns."),
    ({"dialogue__turns": -2}, "dialogue.turns=-2 must be at least -1"),
    ({**PROMPT, "prompt__system": "Be brief."},
     "prompt.system='Be brief.' is a message of a chat, but prompt.chat=False."
     " Set prompt.chat=True, or write the text into prompt.template."),
    ({**PROMPT, "prompt__chat": True, "prompt__before_answer": "\n"},
     "prompt.before_answer='\\n' is for plain prompts, but with prompt.chat=T"),
    ({**PROMPT, "prompt__chat": True, "prompt__shot_separator": "#"},
     "prompt.shot_separator='#' is for plain prompts"),
    ({"prompt__shots": "a.jsonl"},
     "prompt.shots='a.jsonl' is for data.context_style='prompt', but it is"
     " 'question_first'. Set that, or leave out the settings of prompts."),
    ({"prompt__chat": True}, "prompt.chat='True' is for data.context_style"),
    ({"prompt__stop": "\n", "data__context_style": "rag"}, "but it is 'rag'"),
    ({"loss": "concatenate", "retriever_loss": "none"},
     "loss='concatenate' puts all documents into one prompt, which needs"
     " data.context_style='prompt', but it is 'question_first'. Set that, or"),
    ({**PROMPT, "decoding__mode": "concatenate"},
     "loss='rag_token' and decoding.mode='concatenate': a run reads all doc"),
    ({**PROMPT, "loss": "concatenate", "retriever_loss": "none",
      "decoding__mode": "rag_sequence"},
     "loss='concatenate' and decoding.mode='rag_sequence': a run reads all"),
    ({**PROMPT, "warmup__num_steps": 1},
     "warmup.num_steps=1 masks tokens, which data.context_style='prompt' woul"),
    ({**PROMPT, "data__substitute_answers": 0.5},
     "data.substitute_answers=0.5 needs data.context_style='question_first',"
     " but it is 'prompt'."),
    ({**PROMPT, "data__substitute_subjects": 0.5},
     "data.substitute_subjects=0.5 needs"),
    ({**PROMPT, "index__refresh_rows": 9, "index__kind": "device"},
     "which needs data.context_style='question_first', but it is 'prompt'"),
  ],
  ids=str,
)  # fmt: skip
def test_prompts_that_cannot_be_are_refused(settings, problem):
  [found] = refused(make(**settings))
  assert problem in found


def test_prompts_that_can_be_are_not_refused():
  validate(make(**PROMPT))
  validate(make(**PROMPT, **NO_LOOP, data__n_docs=0))
  validate(make(**PROMPT, prompt__chat=True, prompt__system="Be brief."))
  validate(make(**PROMPT, prompt__shots="a.jsonl", prompt__stop="\n"))
  validate(make(**JOINED))
  validate(make(**JOINED, decoding__mode="concatenate"))
  validate(make(**PROMPT, decoding__mode="rag_sequence"))


def test_groups_of_lengths_are_for_our_losses():
  validate(make(train__length_groups=4))
  assert refused(make(train__length_groups=4, hf_loss=True)) == [
    "  hf_loss=True reads all contexts at one length, but"
    " train.length_groups=4. Set it to 1."
  ]
  assert refused(make(train__length_groups=0))
  validate(make(train__pack_contexts=True))
  for other in ({"hf_loss": True}, {"train__length_groups": 2}):
    [problem] = refused(make(train__pack_contexts=True, **other))
    assert "train.pack_contexts=True puts several contexts" in problem


CONTRASTIVE = {"contrastive__num_steps": 5}


@pytest.mark.parametrize(
  ("settings", "problem"),
  [
    (
      {"data__n_docs": 0},
      "contrastive.num_steps=5 trains a retriever, but data.n_docs=0 is",
    ),
    (
      {"contrastive__batch_size": 1},
      "contrastive.batch_size=1 with contrastive.negatives=0 compares a",
    ),
    (
      {"contrastive__chunk": 48},
      "contrastive.batch_size=64 must be a multiple of contrastive.chunk=48",
    ),
    (
      {"eval__answers": "regex", "train__num_steps": 0},
      "contrastive.mask_answers=True looks for answers as text, but",
    ),
    (
      {"contrastive__temperature": 0.0},
      "contrastive.temperature=0.0 must be above 0.",
    ),
    ({"contrastive__negatives": -1}, "contrastive.negatives=-1 must be at"),
  ],
)
def test_the_contrastive_stage_refuses_what_it_cannot_do(settings, problem):
  [line] = refused(make(**CONTRASTIVE, **settings))
  assert problem in line


def test_the_retriever_learns_by_contrast_alone_too():
  settings = {
    "lora__rank": 2, "lora__targets": ("encoder/mlp",),
    "encoder__num_layers": 1, "retriever_loss": "none",
  }  # fmt: skip
  assert "trains no retriever" in refused(make(**settings))[0]
  validate(make(**settings, **CONTRASTIVE))
  validate(make(**CONTRASTIVE, contrastive__batch_size=1,
                contrastive__negatives=1))  # fmt: skip


def test_a_span_has_to_fit_into_the_target_if_there_is_a_warmup():
  settings = {"warmup__span_max_tokens": 16, "data__target_length": 16}
  assert refused(make(**settings, warmup__num_steps=1)) == [
    "  warmup.span_max_tokens=16 and the end token do not fit in"
    " data.target_length=16."
  ]
  validate(make(**settings, warmup__num_steps=0))


@pytest.mark.parametrize(
  "settings",
  [
    {"data__n_docs": 0},
    {"encoder__train_passage_encoder": False, "encoder__tied": False},
    {
      "index__path": "gs://b/index",
      "encoder__train_passage_encoder": False,
      "encoder__tied": False,
    },
    {"tokenizer__path": "a/tokenizer", "tokenizer__vocab_size": 0},
    {"optimizer__peak_lr": 1, "optimizer__freeze": ("generator/encoder",)},
    {"generator__num_layers": 0, "encoder__num_layers": 12},
    {"train__num_steps": 0, "train__validate_steps": 0},
  ],
)
def test_these_are_possible(settings):
  validate(make(**settings))


def test_all_violations_are_in_one_message():
  config = make(
    seed=-1,
    loss="rag",
    data__n_docs=2.5,
    optimizer__peak_lr=float("nan"),
    train__batch_size=0,
  )
  problems = refused(config)
  assert [p.strip().partition("=")[0] for p in problems] == [
    "seed",
    "loss",
    "data.n_docs",
    "optimizer.peak_lr",
    "train.batch_size",
  ]


def test_all_contradictions_are_in_one_message():
  config = make(
    encoder__num_heads=3,
    generator__num_heads=5,
    optimizer__b1=1.0,
    tokenizer__vocab_size=1,
  )
  problems = refused(config)
  assert [p.split()[0].partition("=")[0] for p in problems] == [
    "optimizer.b1",
    "encoder.embed_dim",
    "generator.embed_dim",
    "tokenizer.vocab_size",
  ]


def test_what_is_no_config_is_refused():
  with pytest.raises(
    TypeError, match=r"Expected a rag_jax.config.Config, got dict. Does get_con"
  ):
    validate(dataclasses.asdict(Config()))


def test_a_setting_that_does_not_exist_cannot_be_set():
  with pytest.raises(AttributeError, match="n_dcos"):
    Config().data.n_dcos = 3


@pytest.mark.parametrize(
  ("settings", "problem"),
  [
    ({"data__passage_length": 3}, "data.passage_length=3 leaves no room"),
    ({"encoder__score_scale": 0.0}, "encoder.score_scale=0.0 makes every"),
    ({"index__swap_steps": 50}, "index.swap_steps=50 must be between 1 and"),
    (
      {"index__kind": "device", "index__passages_per_shard": 9},
      "index.passages_per_shard=9 is for an index on the host",
    ),
    (
      {"index__word_rule": 3},
      "index.word_rule=3 is no rule for what a word is; expected 2, or 1",
    ),
    (
      {"index__bm25_path": "bm25"},
      "index.bm25_path='bm25' is for index.hybrid=True. Set that, or",
    ),
    (
      {"rerank__init_from": "a", "data__n_docs": 0},
      "rerank.init_from='a' chooses documents, but data.n_docs=0 is closed",
    ),
    (
      {"rerank__init_from": "a", "rerank__candidates": 3},
      "rerank.candidates=3 passages are fewer than the data.n_docs=4 that are",
    ),
    (
      {"index__hybrid": True, "data__n_docs": 0},
      "index.hybrid=True searches documents, but data.n_docs=0 is closed book",
    ),
    (
      {"index__hybrid": True, "index__hybrid_bm25": 0.0},
      "index.hybrid_bm25=0.0 would stay 0, since the logarithm of a weight is",
    ),
    (
      {"index__hybrid": True, "index__hybrid_dense": 0.0},
      "index.hybrid_dense=0.0 would stay 0, since the logarithm of a weight is",
    ),
    (
      {
        "index__refresh_rows": 9,
        "index__kind": "device",
        "index__hybrid": True,
      },
      "needs index.hybrid=False, but it is True",
    ),
    (
      {"index__refresh_rows": 9, "index__kind": "exact"},
      "index.refresh_rows=9 searches and embeds inside the step, which needs"
      " index.kind='device', but it is 'exact'. Change it, or set index.refr",
    ),
    (
      {
        "index__refresh_rows": 9,
        "index__kind": "device",
        "encoder__tied": False,
        "encoder__train_passage_encoder": False,
      },
      "needs encoder.train_passage_encoder=True, but it is False",
    ),
    (
      {
        "index__refresh_rows": 9,
        "index__kind": "device",
        "data__context_style": "rag",
      },
      "needs data.context_style='question_first', but it is 'rag'",
    ),
    (
      {
        "index__refresh_rows": 9,
        "index__kind": "device",
        "data__substitute_answers": 0.5,
      },
      "needs data.substitute_answers=0.0, but it is 0.5",
    ),
    (
      {"index__refresh_rows": 9, "index__kind": "device", "data__n_docs": 0},
      "index.refresh_rows=9 is for an index, but data.n_docs=0 reads no",
    ),
    (
      {"generator__kind": "causal", "loss": "fid", "retriever_loss": "none"},
      "loss='fid' joins the states of an encoder, but generator.kind='causal'",
    ),
    (
      {"generator__kind": "causal", "decoding__mode": "fid"},
      "decoding.mode='fid' joins the states of an encoder",
    ),
    (
      {"generator__kind": "causal", "hf_loss": True},
      "hf_loss=True is of transformers' RAG",
    ),
    (
      {"generator__kind": "causal", "train__pack_contexts": True},
      "train.pack_contexts=True is of encoders",
    ),
    (
      {"generator__kind": "causal", "generator__pointer": True},
      "generator.pointer=True is of encoder-decoders",
    ),
    (
      {"generator__kind": "causal", "causal__max_positions": 110},
      "causal.max_positions=110 is below the 111 tokens of a prompt and its",
    ),
    (
      {"generator__kind": "causal", "causal__num_kv_heads": 3},
      "num_heads=4 must be a multiple of num_kv_heads=3",
    ),
    (
      {"encoder__truncate_dim": 129},
      "encoder.truncate_dim=129 is above the 128 numbers of an embedding",
    ),
    (
      {"causal__num_layers": 3},
      "The section causal describes a decoder-only generator, but",
    ),
    ({"data": None}, "data is None, expected a DataConfig"),
    ({"generator__relative_buckets": 4}, "relative_buckets=4 must be 0"),
    ({"generator__relative_buckets": 9}, "relative_buckets=9 must be 0"),
    (
      {"encoder__relative_buckets": 6},
      "encoder.relative_buckets=6 must be 0 (none) or an even number",
    ),
    (
      {"encoder__relative_buckets": 32, "encoder__relative_max_distance": 16},
      "encoder.relative_max_distance=16 must be above half of encoder.relative",
    ),
    ({"generator__init": "copy"}, "generator.init='copy' copies only with"),
    ({"data__substitute_answers": 1.5}, "substitute_answers=1.5 must be at"),
  ],
)
def test_settings_that_cannot_work_are_refused(settings, problem):
  (message,) = refused(make(**settings))
  assert problem in message


def changed(field, value):
  """Returns another possible value."""
  if "choices" in field.metadata:
    others = [c for c in field.metadata["choices"] if c != value]
    return others[0] if others else value  # causal.norm has a single choice
  if field.type is bool:
    return not value
  if field.type is int:
    return value + 64
  if field.type is float:
    return value / 2 + 0.125
  if field.type == tuple[int, ...]:
    return (3, 4)
  return "some/path" if field.type is str else ("generator/a", "encoder")


DEFAULTS = """
from rag_jax.config import Config

def get_config():
  return Config()
"""

# A process of its own: ml_collections warns of how it imports the file.
PRINT_CONFIG = """
from absl import app
from ml_collections import config_flags
from rag_jax import config_json

CONFIG = config_flags.DEFINE_config_file("config")
app.run(lambda argv: print(config_json.to_json(CONFIG.value)))
"""


def test_every_setting_can_be_set_on_the_command_line(tmp_path):
  (tmp_path / "defaults.py").write_text(DEFAULTS)
  (tmp_path / "print_config.py").write_text(PRINT_CONFIG)
  expected = {n: changed(field, v) for n, field, v in fields(Config())}
  assert {type(v) for v in expected.values()} == {int, float, str, bool, tuple}
  argv = [f"--config.{name}={value}" for name, value in expected.items()]
  config_json.check_overrides(argv)
  printed = subprocess.run(
    [sys.executable, "print_config.py", "--config=defaults.py", *argv],
    cwd=tmp_path,
    check=True,
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
  ).stdout
  config = Config()
  for name, value in expected.items():
    section, _, last = name.rpartition(".")
    setattr(getattr(config, section) if section else config, last, value)
  # As text, which tells 1 from 1.0 and from True.
  assert printed.strip() == config_json.to_json(config).strip()


ALL_CONFIGS = pytest.mark.parametrize(
  "make_config",
  [
    pytest.param(Config, id="defaults"),
    *(pytest.param(get_config(path), id=path.stem) for path in CONFIGS),
  ],
)


@ALL_CONFIGS
def test_every_config_is_valid_and_comes_back_from_json(make_config):
  config = validate(make_config())
  assert config_json.from_json(config_json.to_json(config)) == config


@ALL_CONFIGS
def test_the_model_of_every_config_takes_its_batches(make_config):
  config = make_config()
  data = config.data
  b, k = 2, max(data.n_docs, 1)
  v = config.generator.vocab_size or config.tokenizer.vocab_size

  def tokens(name, *shape):
    return {
      f"{name}_tokens": jax.ShapeDtypeStruct(shape, "int32"),
      f"{name}_mask": jax.ShapeDtypeStruct(shape, "bool"),
    }

  inputs = tokens("context", b, k, data.context_length)
  inputs["target_tokens"] = jax.ShapeDtypeStruct(
    (b, data.target_length), "int32"
  )
  if data.n_docs:
    inputs |= tokens("question", b, data.question_length)
    inputs |= tokens("doc", b, k, data.passage_length)
  model = build_model(config, vocab_size=v, decoder_start_id=2)

  def forward(key, arrays):
    batch = RagBatch(target_mask=None, **arrays)
    out, _ = model.init_with_output(key, batch)
    return out.doc_scores, out.target_logits

  doc_scores, target_logits = jax.eval_shape(forward, jax.random.key(0), inputs)
  assert doc_scores.shape == (b, k)
  assert target_logits.shape == (b, k, data.target_length, v)


def test_a_config_knows_what_was_set():
  config = Config(seed=3)
  assert config.is_set("seed")
  assert not config.data.is_set("n_docs")
  config.data.n_docs = config.data.n_docs  # a default that was chosen
  config.encoder.dropout = 0.5
  for again in (config, copy.deepcopy(config), copy.copy(config)):
    assert again.data.is_set("n_docs")
    assert not again.data.is_set("context_length")
    assert again.encoder.is_set("dropout")
    assert again == config
    assert hash(again) == hash(config)
  again = copy.deepcopy(config)
  again.data.context_length = 50
  assert not config.data.is_set("context_length")
  # Made anew, what differs from its default was set.
  assert dataclasses.replace(config.encoder).is_set("dropout")
