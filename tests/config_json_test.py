"""A config comes back from JSON equal, or the message says what is wrong."""

import json
import re

import pytest

from rag_jax.config import Config
from rag_jax.config_json import check_overrides
from rag_jax.config_json import differences
from rag_jax.config_json import from_json
from rag_jax.config_json import to_json
from rag_jax.config_json import unknown_field


def make():
  config = Config(seed=7, loss="rag_sequence")
  config.data.passages = "päth/with space.jsonl"
  config.optimizer.peak_lr = 1.1e-5
  config.optimizer.freeze = ("generator/encoder", "passage_encoder")
  config.encoder.normalize = True
  return config


def edited(change):
  """Returns the JSON of the defaults after `change`."""
  tree = json.loads(to_json(Config()))
  change(tree)
  return json.dumps(tree)


@pytest.mark.parametrize("config", [Config(), make()], ids=["defaults", "set"])
def test_json_gives_the_config_that_was_written(config):
  again = from_json(to_json(config))
  assert again == config
  assert hash(again) == hash(config)
  assert to_json(again) == to_json(config)


def test_json_has_one_setting_a_line():
  assert '\n    "n_docs": 4,\n' in to_json(Config())
  assert to_json(Config()).endswith("}\n")


def test_what_json_leaves_out_has_its_default():
  config = from_json('{"data": {"n_docs": 2}}')
  assert differences(Config(), config) == ["data.n_docs: 4 -> 2"]


@pytest.mark.parametrize(
  ("report", "refuse", "now"), [(0.9, 0.5, 0.9), (0.0, 0.5, 0.5), (0.3, 0, 0.3)]
)
def test_a_run_of_before_had_two_limits_of_recall_and_the_higher_holds(
  report, refuse, now
):
  def change(tree):
    tree["eval"]["min_index_recall"] = report
    tree["index"]["min_recall"] = refuse

  assert from_json(edited(change)).index.min_recall == now
  config = from_json(f'{{"eval": {{"min_index_recall": {report}}}}}')
  assert config.index.min_recall == report


def test_a_run_of_before_goes_on_with_the_words_that_it_had():
  def change(tree):
    del tree["index"]["word_rule"]

  assert from_json(edited(change)).index.word_rule == 1
  assert from_json(edited(lambda tree: None)).index.word_rule == 2


@pytest.mark.parametrize("end", [0, 1, 40, -3])
def test_json_that_was_cut_off_is_named(end):
  with pytest.raises(
    ValueError,
    match=(
      r"^run/config.json is not JSON \(.*\); the file was cut off or edited."
      " Restore it, or start in another workdir.$"
    ),
  ):
    from_json(to_json(make())[:end], "run/config.json")


@pytest.mark.parametrize(
  ("tree", "message"),
  [
    (
      {"data": {"n_dcos": 3}},
      "run/config.json: There is no setting data.n_dcos. Did you mean"
      " data.n_docs? All are in rag_jax/config.py.",
    ),
    (
      {"lost": "rag_token"},
      "run/config.json: There is no setting lost. Did you mean loss?",
    ),
    (
      {"data": 4},
      "run/config.json: data is int, expected an object of settings.",
    ),
    (
      [1, 2],
      "run/config.json: the whole is list, expected an object of settings.",
    ),
  ],
)
def test_json_of_something_else_is_refused(tree, message):
  with pytest.raises(ValueError, match="^" + re.escape(message)):
    from_json(json.dumps(tree), "run/config.json")


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("freeze", "generator", "optimizer.freeze='generator' is not a tuple of"),
    ("freeze", 3, "optimizer.freeze=3 is not a tuple of str."),
    ("freeze", ["a", 1], "optimizer.freeze=('a', 1) is not a tuple of str."),
    ("peak_lr", None, "optimizer.peak_lr=None is not a number."),
    ("schedule", "linaer", "schedule='linaer' is not one of ['constant', 'cos"),
  ],
)
def test_json_is_checked_like_any_config(name, value, message):
  text = edited(lambda tree: tree["optimizer"].update({name: value}))
  with pytest.raises(ValueError, match=re.escape(message)):
    from_json(text)


def test_json_of_all_but_finite_numbers_is_refused():
  text = edited(lambda tree: tree["optimizer"].update(peak_lr=float("nan")))
  with pytest.raises(ValueError, match=r"optimizer.peak_lr=nan is not a fini"):
    from_json(text)


def test_differences_are_named_with_both_values():
  assert differences(Config(), make()) == [
    "seed: 0 -> 7",
    "loss: 'rag_token' -> 'rag_sequence'",
    "data.passages: 'world_facts' -> 'päth/with space.jsonl'",
    "encoder.normalize: False -> True",
    "optimizer.peak_lr: 3e-05 -> 1.1e-05",
    "optimizer.freeze: () -> ('generator/encoder', 'passage_encoder')",
  ]
  assert differences(make(), make()) == []


@pytest.mark.parametrize(
  ("name", "hint"),
  [
    ("train.batch_sise", " Did you mean train.batch_size?"),
    ("optimiser.clip_norm", " Did you mean optimizer.clip_norm?"),
    ("seeed", " Did you mean seed?"),
    ("n_docs", " Did you mean data.n_docs?"),  # without its section
    ("wrong_section.path", " Did you mean tokenizer.path?"),
    ("zzz", ""),
  ],
)
def test_an_unknown_setting_gets_the_nearest_one(name, hint):
  assert unknown_field(name) == (
    f"There is no setting {name}.{hint} All are in rag_jax/config.py."
  )


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.data.n_dcos=3", "setting data.n_dcos. Did you mean data.n_docs"),
    ("-config.sed=3", "no setting sed. Did you mean seed?"),
    ("--config.encoder.tide", "encoder.tide. Did you mean encoder.tied?"),
    ("--config.optimizer=1", "There is no setting optimizer."),
    ("--config.=1", "There is no setting . All are in"),
  ],
)
def test_an_override_of_no_setting_is_refused(argument, message):
  argv = ["train.py", "--config=configs/a.py", "--config.seed=1", argument]
  with pytest.raises(ValueError, match=re.escape(message)):
    check_overrides(argv)


def test_known_overrides_and_other_flags_are_left_alone():
  check_overrides(
    [
      "tools/train.py",
      "--config=configs/a.py",
      "--workdir=/tmp/config.x=1",
      "--config.data.n_docs=8",
      "--config.encoder.tied",
      "-config.optimizer.peak_lr=1e-5",
      "--config.index.path",
      "config.not_a_flag=1",
      "--configuration.x=1",
      "--verbosity=1",
    ]
  )
