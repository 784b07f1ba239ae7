"""A run that starts from checkpoints has their shapes, weights and tokens."""

import copy
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from small_checkpoints import ENCODER
from small_checkpoints import GENERATOR
from small_checkpoints import V
from small_checkpoints import write_checkpoints

from rag_jax.config_json import from_json
from rag_jax.config_json import to_json
from rag_jax.corpus.tokenizer import load_tokenizer
from rag_jax.data.experiment import open_experiment
from rag_jax.decoding.answerer import make_decoder
from rag_jax.training.stages import stage_optimizer
from rag_jax.training.state import init_params
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.convert import import_checkpoint
from rag_jax.weights.export import TokenizerFiles
from rag_jax.weights.export import export_encoder
from rag_jax.weights.export import export_rag
from rag_jax.weights.init_from import load_initial
from rag_jax.weights.loaded import RagSettings
from rag_jax.weights.model_files import save_model
from rag_jax.weights.saved import SavedModel


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory):
  """Directories of a question encoder, a passage encoder and a generator."""
  root = tmp_path_factory.mktemp("checkpoints")
  return root, write_checkpoints(
    root, [q.question for q in tiny.split("train")]
  )


@pytest.fixture
def config(tiny, checkpoints):
  root, _ = checkpoints
  return tiny.config(
    encoder__init_from=str(root / "question"),
    encoder__passage_init_from=str(root / "passage"),
    encoder__tied=False,
    generator__init_from=str(root / "generator"),
    warmup__num_steps=0,
  )


def test_the_parameters_are_those_of_the_checkpoints(config, checkpoints):
  _, made = checkpoints
  before = copy.deepcopy(config)
  resolved, initial = load_initial(config)
  assert config == before
  assert resolved.encoder.embed_dim == 8
  assert resolved.generator.vocab_size == V
  experiment = open_experiment(resolved, initial=initial)
  params, _ = init_params(
    experiment.init, jax.random.key(0), experiment.mesh, initial.params
  )
  for part, name in (
    ("question_encoder", "question"),
    ("passage_encoder", "passage"),
    ("generator", "generator"),
  ):
    jax.tree.map(np.testing.assert_array_equal, params[part], made[name])


def test_retriever_and_generator_keep_their_own_tokenizers(config, tmp_path):
  resolved, initial = load_initial(config)
  first = open_experiment(
    resolved, initial=initial, tokenizer_path=tmp_path / "tokenizer"
  )
  assert first.retriever_tokenizer.vocab_size < first.tokenizer.vocab_size
  assert not first.context.one_tokenizer
  # Opened again, as serving does: from what the run saved, without the rest.
  again = open_experiment(resolved, tokenizer_path=tmp_path / "tokenizer")
  assert again.token_ids == first.token_ids


def test_what_is_not_given_is_fresh(config, checkpoints):
  _, made = checkpoints
  config.encoder.init_from = config.encoder.passage_init_from = ""
  resolved, initial = load_initial(config)
  experiment = open_experiment(resolved, initial=initial)
  assert experiment.context.one_tokenizer
  params, layout = init_params(
    experiment.init, jax.random.key(0), experiment.mesh, initial.params
  )
  assert jax.tree.structure(params) == jax.tree.structure(layout)
  jax.tree.map(
    np.testing.assert_array_equal, params["generator"], made["generator"]
  )


def test_a_part_that_does_not_fit_is_refused(config):
  resolved, initial = load_initial(config)
  resolved.generator.mlp_dim = 13
  experiment = open_experiment(resolved, initial=initial)
  with pytest.raises(ValueError, match=r"generator to start from .*mlp") as e:
    init_params(
      experiment.init, jax.random.key(0), experiment.mesh, initial.params
    )
  assert "(8, 12), expected (8, 13)" in str(e.value)


def test_towers_of_two_architectures_are_refused(config, checkpoints, tmp_path):
  _, made = checkpoints
  other = dataclasses.replace(ENCODER, activation="relu")
  ids = SpecialIds(pad=1, bos=0, eos=2)
  export_encoder(
    tmp_path / "other",
    other,
    made["passage"],
    kind="dpr_context",
    tokenizer=TokenizerFiles("", ids),
  )
  config.encoder.passage_init_from = str(tmp_path / "other")
  with pytest.raises(
    ValueError, match="differ in activation='gelu' and 'relu'"
  ):
    load_initial(config)


def test_inputs_longer_than_the_positions_are_refused(config):
  config.data.context_length = 51
  with pytest.raises(ValueError, match="max_positions=50 is below the longest"):
    load_initial(config)


def test_a_tokenizer_with_more_ids_than_the_table_is_refused(config, tmp_path):
  resolved, initial = load_initial(config)
  resolved.encoder.vocab_size = 300
  with pytest.raises(ValueError, match=r"encoder\.vocab_size=300 is below the"):
    open_experiment(resolved, initial=initial)


# What the file of a model from scratch sets, and what the checkpoints bring.
SCRATCH = {
  "encoder.num_layers": (0, 1),
  "encoder.pooling": ("learned", "cls"),
  "encoder.score_scale": (10.0, 1.0),
  "encoder.learn_score_scale": (True, False),
  "encoder.dropout": (0.0, 0.2),
  "generator.dropout": (0.0, 0.2),
  "generator.activation_dropout": (0.0, 0.3),
  "data.question_length": (28, 30),  # as many positions as there are
  "data.passage_length": (20, 30),
  "data.context_length": (40, 50),
  "data.target_length": (12, 25),
  "data.substitute_answers": (0.5, 0.0),
  "data.substitute_subjects": (0.5, 0.0),
  "optimizer.peak_lr": (2e-3, 3e-5),
  "optimizer.retriever_lr": (2e-3, 3e-5),
  "warmup.peak_lr": (2e-3, 3e-5),
  "warmup.num_steps": (4, 0),
  "decoding.num_beams": (1, 2),
}


def get(config, name):
  section, _, field = name.rpartition(".")
  return getattr(getattr(config, section) if section else config, field)


def put(config, name, value):
  section, _, field = name.rpartition(".")
  setattr(getattr(config, section) if section else config, field, value)


def from_scratch(config):
  """Returns what the command line names, beside a file of a fresh model."""
  for name, (value, _) in SCRATCH.items():
    put(config, name, value)
  names = ("encoder.init_from", "generator.init_from")
  return dict.fromkeys(names, "") | {"encoder.passage_init_from": ""}


def test_a_file_of_a_model_from_scratch_gives_way_to_checkpoints(
  config, caplog
):
  overridden = from_scratch(config)
  resolved, _ = load_initial(config, overridden)
  expected = {name: value for name, (_, value) in SCRATCH.items()}
  assert {name: get(resolved, name) for name in SCRATCH} == expected
  for name, (old, new) in SCRATCH.items():
    if name not in ("encoder.pooling", "warmup.peak_lr"):
      assert f"{name}: {old!r} -> {new!r}" in caplog.text
  # It describes the model from then on: of its JSON, nothing is left open.
  assert from_json(to_json(resolved)) == resolved


def test_what_the_command_line_sets_is_kept_beside_checkpoints(config, caplog):
  overridden = from_scratch(config)
  kept = {
    "encoder.score_scale": 2.0,
    "encoder.dropout": 0.0,  # also where that is the default
    "data.context_length": 44,
    "data.target_length": 16,
    "optimizer.peak_lr": 1e-3,
    "decoding.num_beams": 1,
    "decoding.min_new_tokens": 0,
  }
  for name, value in kept.items():
    overridden[name] = get(config, name)
    put(config, name, value)
  resolved, _ = load_initial(config, overridden)
  assert {name: get(resolved, name) for name in kept} == kept
  assert "encoder.score_scale=2.0, not 1.0: its scores are" in caplog.text
  assert "optimizer.peak_lr=0.001, not 3e-05: steps of this" in caplog.text
  assert resolved.data.question_length == 30
  # The length of answers that was chosen is that of the checkpoint no more.
  assert "max_length" not in resolved.decoding.generation_config


def test_a_file_that_names_the_checkpoints_chooses(config):
  from_scratch(config)
  overridden = {"generator.init_from": "another that the file names"}
  config.decoding.num_beams = 1
  resolved, _ = load_initial(config, overridden)
  for name, (chosen, brought) in SCRATCH.items():
    shape = name in ("encoder.num_layers", "encoder.pooling")
    assert get(resolved, name) == (brought if shape else chosen), name
  assert resolved.decoding.no_repeat_ngram_size == 3


def test_what_nobody_sets_is_brought(config):
  resolved, _ = load_initial(config)
  assert resolved.encoder.attention_dropout == ENCODER.attention_dropout
  assert resolved.generator.dropout == GENERATOR.dropout
  assert resolved.optimizer.hybrid_lr == config.optimizer.hybrid_lr
  assert resolved.warmup.retriever_lr == 3e-5


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("encoder.num_layers", 3, "encoder.num_layers=3, but the checkpoint has 1"),
    ("generator.norm", "pre", "generator.norm='pre', but the checkpoint has"),
    ("generator.init", "copy", "generator.init='copy', but the checkpoint has"),
  ],
)
def test_another_shape_on_the_command_line_is_refused(
  config, name, value, message
):
  put(config, name, value)
  with pytest.raises(ValueError, match=f"contradicts the che.*\n  {message}"):
    load_initial(config, {name: get(type(config)(), name)})


def test_another_pooling_and_normalisation_can_be_chosen(config, caplog):
  config.encoder.pooling, config.encoder.normalize = "mean", True
  resolved, _ = load_initial(config)
  assert (resolved.encoder.pooling, resolved.encoder.normalize) == (
    "mean",
    True,
  )
  assert "encoder.pooling='mean', not 'cls': embeddings differ" in caplog.text
  assert "20 is what sentence-transformers trains with" in caplog.text


def without_tokenizer(source, target):
  """Copies a checkpoint, as it is without its tokenizer."""
  shutil.copytree(source, target)
  for name in ("tokenizer.json", "tokenizer_config.json", "manifest.json"):
    (target / name).unlink()
  return str(target)


@pytest.mark.parametrize("part", ["encoder", "generator"])
@pytest.mark.parametrize("alone", [True, False])
def test_weights_without_their_tokenizer_are_refused(
  config, checkpoints, tmp_path, part, alone
):
  root, _ = checkpoints
  name = {"encoder": "question", "generator": "generator"}[part]
  where = without_tokenizer(root / name, tmp_path / "bare")
  if alone:  # otherwise the other one's tokenizer is there
    config.encoder.init_from = config.encoder.passage_init_from = ""
    config.generator.init_from = ""
  getattr(config, part).init_from = where
  with pytest.raises(
    FileNotFoundError,
    match=rf"{part}\.init_from='{where}' has weights, but no tokenizer; looked"
    r" for tokenizer\.json, vocab\.txt, vocab\.json with merges\.txt, spiece.*"
    r"Copy its files beside the weights; .*save_pretrained.*tokenizer\.path",
  ):
    load_initial(config)


def test_a_tokenizer_that_is_given_serves_weights_without_one(
  config, checkpoints, tmp_path, caplog
):
  root, _ = checkpoints
  where = without_tokenizer(root / "generator", tmp_path / "bare")
  config.encoder.init_from = config.encoder.passage_init_from = ""
  config.generator.init_from = where
  config.tokenizer.path = str(root / "generator_tokenizer")
  resolved, initial = load_initial(config)
  experiment = open_experiment(resolved, initial=initial)
  expected = load_tokenizer(config.tokenizer.path).fingerprint
  assert experiment.tokenizer.fingerprint == expected
  assert "is not the tokenizer" not in caplog.text


def test_another_tokenizer_than_the_checkpoint_s_is_warned_of(
  config, checkpoints, caplog
):
  root, _ = checkpoints
  config.tokenizer.path = str(root / "encoder_tokenizer")
  resolved, initial = load_initial(config)
  open_experiment(resolved, initial=initial)
  assert caplog.text.count("is not the tokenizer of the check") == 1
  assert str(root / "generator") in caplog.text


def test_no_tokenizer_is_trained_where_weights_were_loaded(config, tmp_path):
  resolved, _ = load_initial(config)
  with pytest.raises(
    FileNotFoundError, match=r"There is no tokenizer in .*Put its files back"
  ):
    open_experiment(resolved, tokenizer_path=tmp_path)


def test_answers_are_written_as_the_checkpoint_says(config):
  resolved, initial = load_initial(config)
  experiment = open_experiment(resolved, initial=initial)
  for answers in (resolved, from_json(to_json(resolved))):
    experiment = dataclasses.replace(experiment, config=answers)
    settings = make_decoder(experiment).settings
    assert settings.num_beams == 2
    assert settings.no_repeat_ngram_size == 3
    assert settings.min_steps == 2
    # The length that the config sets counts; here the tiny config's.
    assert settings.num_steps == resolved.data.target_length
    assert settings.forced_bos_token_id == 0
    assert settings.repetition_penalty == 1.5
    assert settings.eos_token_id == (experiment.tokenizer.eos_id,)
  # What answers are forced to begin with stands in the targets too.
  answer = experiment.tokenizer.encode(["Paris"])
  tokens, mask = experiment.context.targets(answer)
  assert tokens[mask].tolist() == [0, *answer[0], experiment.tokenizer.eos_id]
  settings = json.loads(resolved.decoding.generation_config)
  assert settings["bos_token_id"] == 0


def test_constants_of_the_original_do_not_learn(config):
  resolved, initial = load_initial(config)
  for fixed in (resolved.generator.fixed, ()):
    resolved.generator.fixed = fixed
    params = {"generator": initial.params["generator"]}
    optimizer = stage_optimizer(resolved, "train", params)
    grads = jax.tree.map(np.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    moved = bool(np.any(updates["generator"]["final_logits_bias"]))
    assert moved == (not fixed)
    assert np.all(updates["generator"]["token_embedding"]["embedding"])


def test_a_rag_brings_what_it_was_trained_with(
  config, checkpoints, tmp_path, caplog
):
  root, made = checkpoints
  ids = SpecialIds(pad=1, bos=0, eos=2)
  export_rag(
    tmp_path / "rag",
    SavedModel(
      origin="",
      params={
        "question_encoder": made["question"],
        "passage_encoder": made["passage"],
        "generator": made["generator"],
      },
      kind="rag_sequence",
      encoder=dataclasses.replace(ENCODER, tied=False),
      generator=GENERATOR,
      settings=RagSettings(
        kind="sequence",
        n_docs=3,
        max_combined_length=45,
        title_sep=" | ",
        doc_sep=" || ",
        prefix="read: ",
        do_deduplication=False,
        exclude_bos_score=True,
        label_smoothing=0.1,
      ),
      question_tokenizer=TokenizerFiles(str(root / "encoder_tokenizer"), ids),
      generator_tokenizer=TokenizerFiles(
        str(root / "generator_tokenizer"), ids
      ),
    ),
  )
  config.encoder.init_from = config.generator.init_from = str(tmp_path / "rag")
  overridden = {"encoder.init_from": "", "generator.init_from": ""}
  config.encoder.passage_init_from = ""
  config.encoder.tied, config.hf_loss = True, True
  resolved, initial = load_initial(config, overridden)
  data = resolved.data
  assert (resolved.loss, data.n_docs, data.context_length) == (
    "rag_sequence", 3, 45
  )  # fmt: skip
  assert (data.context_style, data.title_sep) == ("rag", " | ")
  assert (data.doc_sep, data.context_prefix) == (" || ", "read: ")
  assert (resolved.label_smoothing, resolved.exclude_bos_score) == (0.1, True)
  assert json.loads(resolved.decoding.generation_config)[
    "do_deduplication"
  ] is (False)
  assert not resolved.encoder.tied
  jax.tree.map(
    np.testing.assert_array_equal,
    initial.params["passage_encoder"],
    made["passage"],
  )
  config.data.title_sep = " / "  # by default so, and chosen
  overridden["data.title_sep"] = " / "
  resolved, _ = load_initial(config, overridden)
  assert resolved.data.title_sep == " / "
  assert "data.title_sep=' / ', not ' | ': it was trained on" in caplog.text


def test_a_question_encoder_alone_is_no_encoder_of_passages(config, caplog):
  config.encoder.tied, config.encoder.passage_init_from = True, ""
  load_initial(config)
  assert "is DPR's question encoder, and will embed" in caplog.text


def test_what_convert_hf_wrote_is_taken_as_the_checkpoint_is(
  config, checkpoints, tmp_path
):
  root, _ = checkpoints
  expected, first = load_initial(config)
  for name in ("question", "passage", "generator"):
    import_checkpoint(root / name, tmp_path / name)
  config.encoder.init_from = str(tmp_path / "question")
  config.encoder.passage_init_from = str(tmp_path / "passage")
  config.generator.init_from = str(tmp_path / "generator")
  resolved, initial = load_initial(config)
  jax.tree.map(np.testing.assert_array_equal, initial.params, first.params)
  for part in (resolved.encoder, expected.encoder):
    part.init_from = part.passage_init_from = ""
  resolved.generator.init_from = expected.generator.init_from = ""
  assert resolved == expected
  experiments = [
    open_experiment(resolved, initial=start) for start in (initial, first)
  ]
  assert len({e.token_ids for e in experiments}) == 1


@pytest.fixture
def finished(tiny, tmp_path):
  """A function that writes what a run with some settings leaves."""

  def write(**changes):
    path = tmp_path / "run"
    config = tiny.config(**changes)
    experiment = open_experiment(config, tokenizer_path=path / "tokenizer")
    params, _ = init_params(experiment.init, jax.random.key(3), experiment.mesh)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
      lambda x: (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32), params
    )
    (path / "config.json").write_text(to_json(config))
    content = {"step": 3, "tokenizer": experiment.token_ids}
    save_model(path / "model", params, content)
    return str(path), jax.tree.map(np.asarray, params), experiment

  return write


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_starts_from_the_weights_of_another(tiny, finished, tied):
  shape = {
    "encoder__embed_dim": 12,
    "encoder__tied": tied,
    "encoder__learn_score_scale": True,
    "generator__mlp_dim": 20,
    "generator__init": "copy",
    "generator__norm": "pre",
    "generator__embedding_norm": False,
    "generator__relative_buckets": 32,
  }
  path, params, before = finished(**shape)
  # Another schedule, and no word of the shape.
  config = tiny.config(
    init_from=path,
    encoder__learn_score_scale=True,
    optimizer__schedule="cosine",
    train__num_steps=20,
  )
  resolved, initial = load_initial(config)
  assert resolved.encoder.tied == tied
  experiment = open_experiment(resolved, initial=initial)
  assert experiment.token_ids == before.token_ids
  start, _ = init_params(
    experiment.init, jax.random.key(0), experiment.mesh, initial.params
  )
  jax.tree_util.tree_map_with_path(
    lambda path, x, y: np.testing.assert_allclose(
      x, y, rtol=1e-6 if "scale" in str(path[-1]) else 0
    ),
    dict(start),
    params,
  )
  assert resolved.encoder.score_scale == pytest.approx(
    float(np.exp(params["log_score_scale"])), rel=1e-6
  )


def test_a_run_starts_with_the_learned_weights_of_words(tiny, finished):
  path, params, _ = finished(index__hybrid=True)
  resolved, _ = load_initial(tiny.config(init_from=path, index__hybrid=True))
  learned = np.exp([float(x) for x in jax.tree.leaves(params["hybrid"])])
  found = [resolved.index.hybrid_bm25, resolved.index.hybrid_dense]
  np.testing.assert_allclose(sorted(found), sorted(learned), rtol=1e-6)


def test_one_part_of_a_run_is_enough_and_another_may_win(
  tiny, finished, checkpoints
):
  root, made = checkpoints
  path, params, _ = finished()
  config = tiny.config(
    init_from=path, generator__init_from=str(root / "generator"),
    warmup__num_steps=0,
  )  # fmt: skip
  _, initial = load_initial(config)
  jax.tree.map(
    np.testing.assert_array_equal,
    {k: initial.params[k] for k in ("question_encoder", "generator")},
    {
      "question_encoder": params["question_encoder"],
      "generator": made["generator"],
    },
  )


def test_where_one_tower_would_be_lost_it_is_refused(tiny, finished):
  path, _, _ = finished(encoder__tied=False)
  with pytest.raises(ValueError, match=r"passage encoder, but encoder\.tied"):
    load_initial(tiny.config(encoder__init_from=path))


def test_one_part_is_not_the_whole(tiny, checkpoints, tmp_path):
  root, _ = checkpoints
  with pytest.raises(ValueError, match="of kind 'bart'; expected retriever"):
    load_initial(tiny.config(init_from=str(root / "generator")))
  with pytest.raises(FileNotFoundError, match="There is no directory"):
    load_initial(tiny.config(init_from=str(tmp_path / "none")))
