"""Checks the settings of a config, alone and together.

In: a `Config` from a file in configs/ and the command line. Out: the same
config, or one message with every problem. config.py has the limits of single
fields; the rules between fields are here.
"""

from collections.abc import Collection, Iterator, Mapping
import dataclasses
import difflib
import itertools
import json
import math
import operator
import typing
from typing import Any

from rag_jax.config import Config
from rag_jax.config import IndexConfig
from rag_jax.config_model_rules import contrastive_problems
from rag_jax.config_model_rules import encoder_problems
from rag_jax.config_model_rules import generator_problems
from rag_jax.config_model_rules import rerank_problems
from rag_jax.config_models import LORA_GROUPS
from rag_jax.config_prompts import dialogue_problems
from rag_jax.config_prompts import prompt_problems

_MAX_INT = 2**31 - 1  # larger than any size
_LIMITS = {
  "least": (operator.ge, "must be at least"),
  "above": (operator.gt, "must be above"),
  "most": (operator.le, "must be at most"),
  "below": (operator.lt, "must be below"),
}


def fields(
  config: Any, prefix: str = ""
) -> Iterator[tuple[str, dataclasses.Field, Any]]:
  """Yields (dotted name, field, value) of every setting."""
  for field in dataclasses.fields(config):
    name, value = prefix + field.name, getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from fields(value, name + ".")
    else:
      yield name, field, value


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
  """Returns what is wrong with `value` given for `name`, or ""."""
  if value in choices:
    return ""
  close = difflib.get_close_matches(str(value), choices, n=1)
  hint = f" Did you mean {close[0]!r}?" if close else ""
  return f"{name}={value!r} is not one of {sorted(choices)}.{hint}"


def type_problem(name: str, field: dataclasses.Field, value: Any) -> str:
  """Returns what is wrong with the type or choice of `value`, or ""."""
  if "choices" in field.metadata:
    return check_choice(name, value, field.metadata["choices"])
  if typing.get_origin(field.type) is tuple:
    item, _ = typing.get_args(field.type)
    good = isinstance(value, tuple) and all(type(v) is item for v in value)
    return (
      "" if good else f"{name}={value!r} is not a tuple of {item.__name__}."
    )
  accepted, expected = {
    bool: (bool, "True or False"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "a str"),
  }[field.type]
  good = isinstance(value, accepted)
  good &= field.type is bool or not isinstance(value, bool)
  if not good:
    return f"{name}={value!r} is not {expected}."
  # The number is not shown: Python refuses to format thousands of digits.
  most = max(field.metadata.get("most", 0), _MAX_INT)
  if isinstance(value, int) and abs(value) > most:
    return (
      f"{name} is a number of {value.bit_length()} bits, which must be at most"
      f" {most}."
    )
  if isinstance(value, float) and not math.isfinite(value):
    return f"{name}={value} is not a finite number."
  return ""


def range_problem(name: str, field: dataclasses.Field, value: Any) -> str:
  """Returns what is wrong with the size of a number, or ""."""
  if field.type not in (int, float):
    return ""
  limits = {"least": 0, **field.metadata}
  for limit, (holds, what) in _LIMITS.items():
    if limit in limits and not holds(value, limits[limit]):
      why = field.metadata.get("why") if limit in field.metadata else None
      return f"{name}={value} {why or f'{what} {limits[limit]}.'}"
  return ""


def replace_fields(config: Any, values: Mapping[str, Any], name: str) -> Any:
  """Returns a copy of a section of a `Config` with values from a file.

  Args:
    config: the section.
    values: of some of its fields.
    name: of the section, for messages.

  Raises:
    ValueError: there is no such field, or a value is not possible.
  """
  known = {field.name: field for field in dataclasses.fields(config)}
  problems = [f"{name}.{k} is no setting." for k in values if k not in known]
  for key, value in values.items() if not problems else ():
    problem = type_problem(f"{name}.{key}", known[key], value)
    problems.append(
      problem or range_problem(f"{name}.{key}", known[key], value)
    )
  if problems := [problem for problem in problems if problem]:
    raise ValueError(
      "What was saved is no description of a model: "
      + " ".join(problems)
      + " Expected the fields as they were written. Save it again."
    )
  return dataclasses.replace(config, **values)


def _objective_problems(c: Config) -> Iterator[str]:
  """Yields what is wrong with `loss` and `retriever_loss` together."""
  own = c.retriever_loss not in ("marginal", "none")
  joined = c.loss in ("fid", "concatenate")
  if c.hf_loss and (joined or c.retriever_loss != "marginal"):
    yield (
      f"hf_loss=True has no loss={c.loss!r} with retriever_loss="
      f"{c.retriever_loss!r}; Hugging Face's are rag_token and rag_sequence,"
      " with 'marginal'. Set hf_loss=False."
    )
  if c.loss == "fid" and c.retriever_loss == "marginal":
    yield (
      "loss='fid' has no p(y|x,z) of single documents, so that its gradient"
      " does not reach the retriever: retriever_loss='marginal' is for the"
      " other losses. Set it to 'none', 'emdr2', 'pdist' or another one."
    )
  if c.loss == "concatenate" and c.retriever_loss != "none":
    yield (
      "loss='concatenate' has no p(y|x,z) of single documents, from which"
      f" retriever_loss={c.retriever_loss!r} could learn. Set it to 'none'."
    )
  if c.loss == "fid" and c.train.length_groups > 1:
    yield (
      "loss='fid' joins the contexts of a question, but train.length_groups="
      f"{c.train.length_groups} separates them. Set it to 1, and perhaps"
      " train.pack_contexts=True."
    )
  if c.retriever_loss in ("loop", "adist", "dkrr") and c.loss != "fid":
    what = "attends to"
    if c.retriever_loss == "loop":
      what = "leaves one document out of"
    yield (
      f"retriever_loss={c.retriever_loss!r} {what} all documents that the"
      f" generator reads at once, but loss={c.loss!r} reads each alone. Set"
      " loss='fid', or choose 'pdist'."
    )
  if own and c.data.n_docs == 1:
    yield (
      f"retriever_loss={c.retriever_loss!r} compares documents, but data.n_docs"
      "=1 reads a single one, whose p(z|x) is 1. Raise it, or set"
      " retriever_loss='none'."
    )
  if own and not c.data.n_docs:
    yield (
      f"retriever_loss={c.retriever_loss!r} trains a retriever, but data.n_docs"
      "=0 is a closed-book model without one. Set it to 'none' or 'marginal'."
    )
  if (
    own and not c.retriever_loss.startswith("emdr2") and c.train.accumulate > 1
  ):
    yield (
      f"retriever_loss={c.retriever_loss!r} is a mean over questions, but"
      f" train.accumulate={c.train.accumulate} weighs the parts of a batch by"
      " their target tokens. Set it to 1, or use 'emdr2'."
    )


def _lora_problems(c: Config) -> Iterator[str]:
  """Yields the problems of the adapters."""
  lora = c.lora
  if not lora.rank:
    return
  names = {*LORA_GROUPS, *itertools.chain(*LORA_GROUPS.values())}
  known = [f"{p}/{name}" for p in ("generator", "encoder") for name in names]
  if not lora.targets:
    yield (
      f"lora.rank={lora.rank} adds adapters, but lora.targets=() names no"
      " kernels. Name some, for instance ('generator/attention',), or set"
      " lora.rank=0."
    )
  for target in lora.targets:
    if problem := check_choice("lora.targets", target, known):
      yield problem
  if not any(target.startswith("encoder/") for target in lora.targets):
    return
  if not c.encoder.num_layers:
    yield (
      "lora.targets names kernels of the encoder's layers, but"
      " encoder.num_layers=0 has none. Leave them out."
    )
  learns = c.retriever_loss != "none" or c.contrastive.num_steps
  if not learns or not c.data.n_docs:
    yield (
      "lora.targets names kernels of the encoder, but retriever_loss="
      f"{c.retriever_loss!r} with data.n_docs={c.data.n_docs} trains no"
      " retriever. Leave them out, or let it learn."
    )


def _index_problems(i: IndexConfig) -> Iterator[str]:
  """Yields the problems of the index."""
  if 0.0 < i.scann_soar_overretrieve <= 1.0:
    # ScaNN 1.4.2 builds it with 1.0, and cannot open what it then saves.
    yield (
      f"index.scann_soar_overretrieve={i.scann_soar_overretrieve} must be above"
      " 1, or 0.0 for ScaNN's own."
    )
  if i.scann_soar_overretrieve and not i.scann_soar_lambda:
    yield (
      f"index.scann_soar_overretrieve={i.scann_soar_overretrieve} is for"
      " index.scann_soar_lambda above 0."
    )
  if i.kind == "device" and i.passages_per_shard:
    yield (
      f"index.passages_per_shard={i.passages_per_shard} is for an index on the"
      " host; index.kind='device' is spread over all devices. Set it to 0."
    )


def _hybrid_problems(c: Config) -> Iterator[str]:
  """Yields the problems of search by embeddings and words."""
  i = c.index
  if i.bm25_path and not i.hybrid:
    yield (
      f"index.bm25_path={i.bm25_path!r} is for index.hybrid=True. Set that, or"
      " index.bm25_path=''."
    )
  if not i.hybrid:
    return
  if not c.data.n_docs:
    yield (
      "index.hybrid=True searches documents, but data.n_docs=0 is closed book"
      " and reads none. Set index.hybrid=False, or data.n_docs to 2 or more."
    )
  for name in ("hybrid_dense", "hybrid_bm25"):
    if not getattr(i, name):
      yield (
        f"index.{name}=0.0 would stay 0, since the logarithm of a weight is"
        " what is learned. Start with a small one, for instance 0.01."
      )


def _in_step_problems(c: Config) -> Iterator[str]:
  """Yields the problems of search inside the compiled step."""
  if not c.index.refresh_rows:
    return
  for name, value, needed in (
    ("index.kind", c.index.kind, "device"),
    ("encoder.train_passage_encoder", c.encoder.train_passage_encoder, True),
    ("data.context_style", c.data.context_style, "question_first"),
    ("data.substitute_answers", c.data.substitute_answers, 0.0),
    ("data.substitute_subjects", c.data.substitute_subjects, 0.0),
    ("index.hybrid", c.index.hybrid, False),
  ):
    if value != needed:
      yield (
        f"index.refresh_rows={c.index.refresh_rows} searches and embeds inside"
        f" the step, which needs {name}={needed!r}, but it is {value!r}. Change"
        " it, or set index.refresh_rows=0."
      )
  if not c.data.n_docs:
    yield (
      f"index.refresh_rows={c.index.refresh_rows} is for an index, but"
      " data.n_docs=0 reads no documents. Set one of them otherwise."
    )


def _profile_problem(c: Config) -> str:
  """Returns what is wrong with train.profile_steps, or ""."""
  steps, num_steps = c.train.profile_steps, c.train.num_steps
  if not steps or (len(steps) == 2 and 1 <= steps[0] <= steps[1] <= num_steps):
    return ""
  return (
    f"train.profile_steps={steps} is no range of the steps 1 to"
    f" train.num_steps={num_steps}; expected (first, last), for instance"
    " (10, 12), or () to profile none."
  )


def _generation_problem(text: str) -> str:
  """Returns what is wrong with decoding.generation_config, or ""."""
  try:
    content = json.loads(text or "{}")
  except (ValueError, RecursionError) as error:
    content = error
  if isinstance(content, dict):
    return ""
  return (
    f"decoding.generation_config={text[:80]!r} is no JSON object, such as"
    ' {"repetition_penalty": 1.2}. Write one, or "" for what the checkpoint'
    " says."
  )


def _cross_problems(c: Config) -> Iterator[str]:
  """Yields the problems between settings of different sections."""
  yield from contrastive_problems(c)
  yield from encoder_problems(c)
  yield from generator_problems(c)
  yield from rerank_problems(c)
  if c.label_smoothing and c.generator.pointer:
    yield (
      f"label_smoothing={c.label_smoothing} smooths a softmax over the"
      " vocabulary, but generator.pointer=True mixes copies in. Set"
      " label_smoothing=0.0 or generator.pointer=False."
    )
  if c.hf_loss and c.generator.pointer:
    yield (
      "hf_loss=True is of models that Hugging Face has, and it has none with"
      " generator.pointer=True. Set one of them to False."
    )
  if c.eval.answers == "regex" and c.train.num_steps:
    yield (
      "eval.answers='regex' is for measuring: a regular expression is no answer"
      f" that can be taught, but train.num_steps={c.train.num_steps}. Set it to"
      " 0, or train on questions whose answers are text first."
    )
  if c.hf_loss and c.train.vocab_chunk:
    yield (
      "hf_loss=True needs all logits, but train.vocab_chunk="
      f"{c.train.vocab_chunk}. Set it to 0."
    )
  if c.hf_loss and c.train.length_groups > 1:
    yield (
      "hf_loss=True reads all contexts at one length, but train.length_groups="
      f"{c.train.length_groups}. Set it to 1."
    )
  if c.train.pack_contexts and (c.hf_loss or c.train.length_groups > 1):
    yield (
      "train.pack_contexts=True puts several contexts into a row, but with"
      f" hf_loss={c.hf_loss} and train.length_groups={c.train.length_groups}"
      " each has its own. Set it to False, or hf_loss=False and"
      " train.length_groups=1."
    )
  yield from _objective_problems(c)
  yield from _lora_problems(c)
  yield from prompt_problems(c)
  yield from dialogue_problems(c)
  if c.hf_loss and c.exclude_bos_score and c.train.accumulate > 1:
    yield (
      "exclude_bos_score=True looks at the first tokens of a whole batch, but"
      f" train.accumulate={c.train.accumulate} computes it in parts. Set it to"
      " 1."
    )
  if (
    c.optimizer.kind == "adafactor" and c.optimizer.momentum_dtype != "float32"
  ):
    yield (
      f"optimizer.momentum_dtype={c.optimizer.momentum_dtype!r} is for AdamW,"
      " but optimizer.kind='adafactor' keeps no momentum. Set it to 'float32'."
    )
  style = c.data.context_style
  if style != "question_first" and c.warmup.num_steps:
    yield (
      f"warmup.num_steps={c.warmup.num_steps} masks tokens, which"
      f" data.context_style={style!r} would lose: its contexts are strings. Set"
      " one of them to 0 or 'question_first'."
    )
  for name in ("substitute_answers", "substitute_subjects"):
    if style != "question_first" and getattr(c.data, name):
      yield (
        f"data.{name}={getattr(c.data, name)} needs"
        f" data.context_style='question_first', but it is {style!r}."
      )
  if c.warmup.num_steps and (
    c.warmup.span_max_tokens + 1 > c.data.target_length
  ):
    yield (
      f"warmup.span_max_tokens={c.warmup.span_max_tokens} and the end token do"
      f" not fit in data.target_length={c.data.target_length}."
    )
  if not c.encoder.train_passage_encoder and c.encoder.tied:
    yield (
      "encoder.train_passage_encoder=False keeps the passage embeddings as"
      " they are, but encoder.tied=True moves them with the question tower."
      " Set encoder.tied=False."
    )
  if c.index.path and c.encoder.train_passage_encoder:
    yield (
      f"index.path={c.index.path!r} is a fixed index, but"
      " encoder.train_passage_encoder=True makes it stale. Set"
      " encoder.train_passage_encoder=False, or index.path=''."
    )
  if not 0 < c.index.swap_steps < c.index.refresh_steps:
    yield (
      f"index.swap_steps={c.index.swap_steps} must be between 1 and"
      f" index.refresh_steps={c.index.refresh_steps} (exclusive), so that one"
      " rebuild is in use before the next begins."
    )
  yield from _index_problems(c.index)
  yield from _hybrid_problems(c)
  yield from _in_step_problems(c)
  if problem := _profile_problem(c):
    yield problem
  if c.exclude_bos_score and not (c.hf_loss and c.loss == "rag_sequence"):
    yield (
      "exclude_bos_score=True is for hf_loss=True and loss='rag_sequence', but"
      f" hf_loss={c.hf_loss}, loss={c.loss!r}. Set them, or"
      " exclude_bos_score=False."
    )
  problem = _generation_problem(c.decoding.generation_config)
  if problem:
    yield problem
  elif (
    not c.decoding.generation_config
    and c.decoding.min_new_tokens > c.data.target_length
  ):
    yield (
      f"decoding.min_new_tokens={c.decoding.min_new_tokens} is above"
      f" data.target_length={c.data.target_length}."
    )
  trained = not (
    c.tokenizer.path or c.encoder.init_from or c.generator.init_from
  )
  if c.tokenizer.vocab_size < 512 and trained:
    yield (
      f"tokenizer.vocab_size={c.tokenizer.vocab_size} is too small: 256 bytes"
      " and the special tokens come first. Use at least 512."
    )


def validate(config: Any) -> Config:
  """Returns `config` if every setting is possible.

  Raises:
    TypeError: `config` is no `Config`.
    ValueError: names every violation, with its value and what was expected.
  """
  if not isinstance(config, Config):
    raise TypeError(
      f"Expected a rag_jax.config.Config, got {type(config).__name__}. Does"
      " get_config() of the --config file return one?"
    )
  default = Config()
  sections = {
    f.name: type(getattr(default, f.name))
    for f in dataclasses.fields(Config)
    if dataclasses.is_dataclass(f.type)
  }
  problems = [
    f"{name} is {getattr(config, name)!r}, expected a {section.__name__}."
    for name, section in sections.items()
    if type(getattr(config, name)) is not section
  ]
  comparable = not problems
  for setting in fields(config) if comparable else ():
    problem = type_problem(*setting)
    comparable &= not problem
    problems.append(problem or range_problem(*setting))
  # Rules between settings compare numbers, so the types must be right.
  problems += _cross_problems(config) if comparable else ()
  problems = [p for p in problems if p]
  if problems:
    raise ValueError("The config is not valid:\n  " + "\n  ".join(problems))
  return config
