"""What a run starts from: checkpoints or another run, where the config says.

In: a config with init_from, of the whole or of a part. Out: the config with
the architecture that the checkpoints have, their parameters, and where their
tokenizers lie.
"""

import copy
import dataclasses

from absl import logging
from jaxtyping import PyTree

from rag_jax.config import Config
from rag_jax.config_rules import validate
from rag_jax.weights.load import checkpoint_kind
from rag_jax.weights.load import load_encoder
from rag_jax.weights.load import load_generator
from rag_jax.weights.saved import SavedModel
from rag_jax.weights.saved import is_ours
from rag_jax.weights.saved import read_saved


@dataclasses.dataclass(frozen=True, slots=True)
class Initial:
  """What checkpoints give; all of it may be empty.

  Attributes:
    params: by the parts of `RagModel`: "question_encoder", "passage_encoder",
      "generator". float32, on the host.
    tokenizer: directory of the generator's; "" if none was given.
    retriever_tokenizer: directory of the encoder's.
  """

  params: PyTree = dataclasses.field(default_factory=dict)
  tokenizer: str = ""
  retriever_tokenizer: str = ""


def load_initial(config: Config) -> tuple[Config, Initial]:
  """Reads the checkpoints that `config` names.

  Returns:
    A config whose architecture is theirs, and which describes the model from
    then on without them; and what they hold.

  Raises:
    FileNotFoundError: a checkpoint is not there.
    ValueError: it cannot be read, or does not fit the other settings.
  """
  config = copy.deepcopy(config)
  _start_both(config)
  params = {}
  tokenizer = retriever_tokenizer = ""
  encoder, generator = config.encoder, config.generator
  if encoder.init_from:
    loaded = load_encoder(encoder.init_from, "question")
    logging.info("%s:\n%s", encoder.init_from, loaded.report)
    for name, value in loaded.fields.items():
      setattr(encoder, name, value)
    params["question_encoder"] = loaded.params
    retriever_tokenizer = loaded.tokenizer
    if is_ours(encoder.init_from):
      _take_scores(config, read_saved(encoder.init_from))
    if not encoder.tied:
      where = encoder.passage_init_from or encoder.init_from
      passage = load_encoder(where, "passage")
      if passage.fields != loaded.fields:
        different = [
          f"{name}={value!r} and {passage.fields[name]!r}"
          for name, value in loaded.fields.items()
          if passage.fields[name] != value
        ]
        raise ValueError(
          f"The towers of {encoder.init_from} and {where} differ in"
          f" {', '.join(different)}. Expected two of one architecture; give"
          " another encoder.passage_init_from."
        )
      params["passage_encoder"] = passage.params
  if generator.init_from:
    loaded = load_generator(generator.init_from)
    logging.info("%s:\n%s", generator.init_from, loaded.report)
    for name, value in loaded.fields.items():
      setattr(generator, name, value)
    generator.init = "normal"
    params["generator"] = loaded.params
    tokenizer = loaded.tokenizer
  # A position table that is too short shows now.
  return validate(config), Initial(params, tokenizer, retriever_tokenizer)


def _start_both(config: Config) -> None:
  """Lets the parts that name nothing start from `config.init_from`."""
  where, encoder = config.init_from, config.encoder
  if not where:
    return
  if is_ours(where):
    saved = read_saved(where)
    if saved.encoder is not None and not encoder.init_from:
      encoder.init_from = where
      if "passage_encoder" in saved.params:
        encoder.tied = False
    has_generator = saved.generator is not None
  else:
    kind = checkpoint_kind(where)
    if kind != "rag":
      raise ValueError(
        f"init_from={where!r} is a checkpoint of kind {kind!r}; expected"
        " retriever and generator together: the workdir of a run, a model"
        " directory or a RAG checkpoint. Set encoder.init_from or"
        " generator.init_from instead."
      )
    encoder.init_from = encoder.init_from or where
    has_generator = True
  if has_generator and not config.generator.init_from:
    config.generator.init_from = where


def _take_scores(config: Config, saved: SavedModel) -> None:
  """Sets what documents are scored with to what a run has learned."""
  if config.encoder.tied and "passage_encoder" in saved.params:
    raise ValueError(
      f"encoder.init_from={config.encoder.init_from!r} holds two towers, but"
      " encoder.tied=True would keep that of the questions alone; expected two"
      " towers here as well. Set encoder.tied=False."
    )
  config.encoder.score_scale = saved.score_scale
  if saved.hybrid and config.index.hybrid:
    config.index.hybrid_dense, config.index.hybrid_bm25 = saved.hybrid
