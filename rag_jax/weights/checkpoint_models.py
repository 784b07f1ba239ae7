"""One model among the tensors of a checkpoint: an encoder, a generator.

In: its config and the files that hold its tensors, maybe beside others. Out:
what does not fit, or the model.
"""

from collections.abc import Callable, Sequence
from typing import Any

from rag_jax.weights.causal_configs import explicit_causal
from rag_jax.weights.causal_configs import num_layers
from rag_jax.weights.causal_configs import read_causal_config
from rag_jax.weights.causal_configs import read_causal_ids
from rag_jax.weights.causal_tensors import causal_architecture
from rag_jax.weights.causal_tensors import causal_names
from rag_jax.weights.config_fields import field_notes
from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.directory import CheckpointDirectory
from rag_jax.weights.encoder_configs import ENCODER_FIELDS
from rag_jax.weights.encoder_configs import family_name
from rag_jax.weights.encoder_configs import read_encoder_config
from rag_jax.weights.encoder_configs import read_special_ids
from rag_jax.weights.encoder_tensors import dpr
from rag_jax.weights.encoder_tensors import dpr_names
from rag_jax.weights.encoder_tensors import dpr_role
from rag_jax.weights.encoder_tensors import encoder_names
from rag_jax.weights.encoder_tensors import plain_encoder
from rag_jax.weights.generation_settings import GENERATION_NAMES
from rag_jax.weights.generator_configs import LmHead
from rag_jax.weights.generator_configs import explicit
from rag_jax.weights.generator_configs import read_generator_config
from rag_jax.weights.generator_configs import read_generator_ids
from rag_jax.weights.generator_tensors import generator_architecture
from rag_jax.weights.generator_tensors import generator_names
from rag_jax.weights.generator_tensors import shared_table
from rag_jax.weights.loaded import LoadedCausal
from rag_jax.weights.loaded import LoadedEncoder
from rag_jax.weights.loaded import LoadedGenerator
from rag_jax.weights.mapping import View
from rag_jax.weights.mapping import problems
from rag_jax.weights.mapping import take
from rag_jax.weights.pooling_modules import Modules
from rag_jax.weights.pooling_modules import dense_layer
from rag_jax.weights.report import Report
from rag_jax.weights.tensors import TensorFiles
from rag_jax.weights.tokenizer_files import check_tokenizer

Select = Callable[[str], str | None]  # a part's tensors, without its prefix


def whole(name: str) -> str:
  """Selects every tensor: the part is the whole."""
  return name


def _view(files: TensorFiles, select: Select, rename: Select) -> View:
  def renamed(stored: str) -> str | None:
    name = select(stored)
    return None if name is None else rename(name)

  return View(files, renamed)


def _kind(family: str, role: str, modules: Modules | None) -> str:
  if family == "dpr":
    return "dpr_question" if role == "question" else "dpr_context"
  return "sentence_transformers" if modules else family


def check_layers(origin: str, num_tensors: int, **layers: int) -> None:
  """Raises `ValueError` if there are more layers than tensors, before a loop.

  Args:
    origin: of the config.
    num_tensors: that the part has; a layer has several.
    layers: how many of them the config says there are, by our name.
  """
  for name, number in layers.items():
    if number > num_tensors:
      raise ValueError(
        f"{origin} says that there are {number} layers ({name}), but there are"
        f" {num_tensors} tensors in all. Expected some tensors for each layer."
        " The two files are of different checkpoints, or the config was edited:"
        " copy both again."
      )


class EncoderPart:
  """BERT, a relative, T5's encoder, or DPR."""

  def __init__(
    self,
    values: ConfigValues,
    files: TensorFiles,
    role: str,
    select: Select = whole,
    modules: Modules | None = None,
  ):
    family = self._family = family_name(values)
    is_dpr = family == "dpr"
    names = [name for name in map(select, files.names) if name is not None]
    if is_dpr:
      role = dpr_role(names, role)
      rename = dpr_names(names, role)
    else:
      rename = encoder_names(names, family)
    self._view = _view(files, select, rename)
    self.kind = _kind(family, role, modules)
    fields = read_encoder_config(
      values, has_pooler="pooler.dense.weight" in self._view
    )
    self._dense: View | None = None
    if modules is not None:
      for name, value in modules.fields.items():
        setattr(fields, name, value)
      if modules.dense is not None:
        self._dense = View(TensorFiles(modules.dense), whole)
    self._fields = fields
    check_layers(values.origin, len(names), num_layers=fields.num_layers)
    self._architecture = (
      dpr(fields, role) if is_dpr else plain_encoder(fields, family)
    )
    self._values, self._modules = values, modules

  @property
  def name(self) -> str:
    """Of its class in transformers."""
    return self._architecture.name

  def problems(self) -> list[str]:
    """Returns what does not fit."""
    found = problems(self._view, self._architecture)
    if self._dense is not None:
      found += [
        f"module Dense: {line}"
        for line in problems(self._dense, dense_layer(self._fields))
      ]
    return found

  def load(
    self, tokenizer: CheckpointDirectory | None, notes: Sequence[str] = ()
  ) -> LoadedEncoder:
    """Returns the encoder. Call it when there are no problems."""
    note = ""
    if tokenizer is not None:
      note = check_tokenizer(tokenizer, self._fields.vocab_size, "encoder")
    fields = {name: getattr(self._fields, name) for name in ENCODER_FIELDS}
    taken = take(self._view, self._architecture)
    params, told = taken.params, self._modules.notes if self._modules else ()
    report = Report.of(
      taken,
      note,
      *told,
      *notes,
      *field_notes(self._values, GENERATION_NAMES, self._family),
    )
    if self._dense is not None:
      taken = take(self._dense, dense_layer(self._fields))
      params = params | taken.params
      report += Report.of(taken)
    return LoadedEncoder(
      kind=self.kind,
      fields=fields,
      params=params,
      tokenizer=str(tokenizer.path) if tokenizer else "",
      special_ids=read_special_ids(self._values),
      max_tokens=self._modules.max_tokens if self._modules else 0,
      report=report,
    )


class GeneratorPart:
  """BART, one of its relatives, or T5."""

  def __init__(
    self, values: ConfigValues, files: TensorFiles, select: Select = whole
  ):
    model_type = values.text("model_type", "")
    names = [name for name in map(select, files.names) if name is not None]
    self._view = _view(files, select, generator_names(names, model_type))
    self._values = values
    self._fields = read_generator_config(values, self._lm_head(model_type))
    check_layers(
      values.origin,
      len(names),
      num_layers=self._fields.num_layers,
      num_decoder_layers=self._fields.num_decoder_layers,
    )
    self._architecture = generator_architecture(self._fields, model_type)

  def _lm_head(self, model_type: str) -> LmHead:
    view, table = self._view, shared_table(model_type)
    if "lm_head.weight" not in view:
      return "absent"
    if table not in view or view.equal("lm_head.weight", table):
      return "copy"
    return "own"

  @property
  def name(self) -> str:
    """Of its class in transformers."""
    return self._architecture.name

  def problems(self) -> list[str]:
    """Returns what does not fit."""
    return problems(self._view, self._architecture)

  def load(
    self,
    tokenizer: CheckpointDirectory | None,
    generation: dict[str, Any],
    notes: Sequence[str] = (),
  ) -> LoadedGenerator:
    """Returns the generator. Call it when there are no problems."""
    note = ""
    if tokenizer is not None:
      note = check_tokenizer(tokenizer, self._fields.vocab_size, "generator")
    taken = take(self._view, self._architecture)
    return LoadedGenerator(
      fields=explicit(self._fields),
      params=taken.params,
      tokenizer=str(tokenizer.path) if tokenizer else "",
      special_ids=read_generator_ids(self._values),
      generation=generation,
      report=Report.of(
        taken, note, *notes, *field_notes(self._values, GENERATION_NAMES)
      ),
    )


class CausalPart:
  """A decoder-only generator, which is always a whole checkpoint."""

  def __init__(self, values: ConfigValues, files: TensorFiles):
    model_type = values.text("model_type", "")
    self._view = _view(files, whole, causal_names(files.names, model_type))
    self._values = values
    check_layers(values.origin, len(files.names), num_layers=num_layers(values))
    self._fields = read_causal_config(values)
    self._architecture = causal_architecture(self._fields, model_type)

  @property
  def name(self) -> str:
    """Of its class in transformers."""
    return self._architecture.name

  def problems(self) -> list[str]:
    """Returns what does not fit."""
    return problems(self._view, self._architecture)

  def load(
    self, tokenizer: CheckpointDirectory | None, generation: dict[str, Any]
  ) -> LoadedCausal:
    """Returns the generator. Call it when there are no problems."""
    note = ""
    if tokenizer is not None:
      note = check_tokenizer(tokenizer, self._fields.vocab_size, "generator")
    taken = take(self._view, self._architecture)
    return LoadedCausal(
      fields=explicit_causal(self._fields),
      params=taken.params,
      tokenizer=str(tokenizer.path) if tokenizer else "",
      special_ids=read_causal_ids(self._values),
      generation=generation,
      report=Report.of(
        taken, note, *field_notes(self._values, GENERATION_NAMES)
      ),
    )
