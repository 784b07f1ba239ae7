"""Generation settings: lengths, files, and everything that is refused."""

import dataclasses
import json

import pytest

from rag_jax.decoding.settings import GENERATION_CONFIG
from rag_jax.decoding.settings import GenerationSettings
from rag_jax.decoding.settings import read_generation_config
from rag_jax.decoding.settings import write_generation_config

# What facebook/bart-large-cnn ships, and one key that is its own.
BART_LARGE_CNN = {
  "_from_model_config": True,
  "bos_token_id": 0,
  "decoder_start_token_id": 2,
  "early_stopping": True,
  "eos_token_id": 2,
  "forced_bos_token_id": 0,
  "forced_eos_token_id": 2,
  "length_penalty": 2.0,
  "max_length": 142,
  "min_length": 56,
  "no_repeat_ngram_size": 3,
  "num_beams": 4,
  "pad_token_id": 1,
  "transformers_version": "4.27.0.dev0",
  "somebodys_key": {"a": [1, 2]},
}


def test_lengths_count_the_start_token_unless_they_are_of_new_tokens():
  settings = GenerationSettings(max_length=10, min_length=4)
  assert (settings.num_steps, settings.min_steps) == (9, 3)
  settings = GenerationSettings(
    max_length=10, min_length=4, max_new_tokens=10, min_new_tokens=4
  )
  assert (settings.num_steps, settings.min_steps) == (10, 4)
  settings = GenerationSettings()
  assert (settings.num_steps, settings.min_steps) == (20, 0)


def test_one_id_and_a_list_of_ids_are_the_same_setting():
  one, several = (
    GenerationSettings(eos_token_id=e, forced_eos_token_id=e) for e in (2, [2])
  )
  assert one == several
  assert hash(one) == hash(several)
  assert one.eos_token_id == one.forced_eos_token_id == (2,)


def test_ids_that_are_not_given_follow_hugging_face():
  settings = GenerationSettings(eos_token_id=(5, 6), bos_token_id=4)
  assert settings.pad_id == 5
  assert settings.start_id == 4
  settings = dataclasses.replace(
    settings, pad_token_id=0, decoder_start_token_id=0
  )
  assert settings.pad_id == settings.start_id == 0
  with pytest.raises(ValueError, match=r"decoder has to read.*Set decoder_st"):
    _ = GenerationSettings(eos_token_id=(2,)).start_id


def test_the_file_of_a_checkpoint_comes_back_whole(tmp_path):
  (tmp_path / GENERATION_CONFIG).write_text(json.dumps(BART_LARGE_CNN))
  settings = read_generation_config(tmp_path)
  assert settings.num_beams == 4
  assert settings.early_stopping is True
  assert settings.no_repeat_ngram_size == 3
  assert settings.eos_token_id == (2,)
  assert (settings.num_steps, settings.min_steps) == (141, 55)
  target = tmp_path / "out.json"
  write_generation_config(settings, target)
  assert json.loads(target.read_text()) == BART_LARGE_CNN
  assert read_generation_config(target) == settings


def test_what_was_set_here_is_written_and_read_again(tmp_path):
  settings = GenerationSettings(
    max_new_tokens=7,
    bad_words_ids=((3,), (4, 5)),
    eos_token_id=(2, 3),
    early_stopping="never",
    n_docs=3,
    seed=5,
    do_sample=True,
    top_p=0.5,
  )
  write_generation_config(settings, tmp_path)
  assert read_generation_config(tmp_path) == settings


def test_null_in_a_file_is_the_default():
  values = {"max_length": None, "top_k": None, "bad_words_ids": None}
  assert GenerationSettings.from_dict(values) == GenerationSettings()


def test_the_old_spelling_of_a_forced_bos_token_counts():
  values = {"force_bos_token_to_be_generated": True, "bos_token_id": 3}
  assert GenerationSettings.from_dict(values).forced_bos_token_id == 3
  values["forced_bos_token_id"] = 4
  assert GenerationSettings.from_dict(values).forced_bos_token_id == 4


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("num_beam_groups", 2),
    ("penalty_alpha", 0.6),
    ("typical_p", 0.9),
    ("guidance_scale", 1.5),
    ("suppress_tokens", [1]),
    ("renormalize_logits", True),
    ("min_p", 0.1),
    ("stop_strings", ["x"]),
  ],
)
def test_what_is_not_supported_is_refused_by_name_if_it_is_active(name, value):
  with pytest.raises(ValueError, match=rf"f\.json has .*{name}=.*Remove"):
    GenerationSettings.from_dict({name: value}, "f.json")


def test_what_is_not_supported_but_turned_off_is_no_problem():
  values = {
    "num_beam_groups": 1, "penalty_alpha": None, "typical_p": 1.0,
    "guidance_scale": 1, "diversity_penalty": 0.0, "low_memory": False,
    "suppress_tokens": [], "encoder_no_repeat_ngram_size": 0,
    "use_cache": True,
  }  # fmt: skip
  assert GenerationSettings.from_dict(values) == GenerationSettings()


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"max_length": 5, "min_length": 6}, "max_length=5.*below min_length=6"),
    ({"max_new_tokens": 2, "min_new_tokens": 3}, "below min_new_tokens=3"),
    ({"max_length": 1}, "max_length=1.*leaves no token to generate"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 leaves no token"),
    ({"min_length": -1}, "min_length=-1.*at least 0"),
    ({"max_length": 12}, "above the decoder's 10 learned positions"),
    ({"max_new_tokens": 11}, "above the decoder's 10 learned positions"),
    ({"num_beams": 0}, "num_beams=0 must be at least 1"),
    ({"num_return_sequences": 0}, "num_return_sequences=0 must be at least 1"),
    (
      {"num_return_sequences": 2},
      "num_return_sequences=2 is above num_beams=1",
    ),
    (
      {"num_return_sequences": 4, "num_beams": 3, "do_sample": True},
      "num_return_sequences=4 is above num_beams=3",
    ),
    ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
    ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0 must be above 0"),
    ({"top_k": -1}, "top_k=-1 must be at least 0"),
    ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size=-2 must be at least"),
    ({"top_p": 1.5}, "top_p=1.5 must lie between 0 and 1"),
    ({"length_penalty": float("nan")}, "length_penalty=nan is not a finite"),
    ({"length_penalty": 10**400}, "length_penalty=10+ is not a finite"),
    ({"early_stopping": "always"}, "early_stopping='always' is not True"),
    ({"early_stopping": 1}, "early_stopping=1 is not True, False or 'never'"),
    ({"num_beams": 2.0}, "num_beams=2.0 is not a whole number"),
    ({"max_length": "9"}, "max_length='9' is not a whole number"),
    ({"do_sample": "yes"}, "do_sample='yes' is not True or False"),
    ({"eos_token_id": ("a",)}, "eos_token_id=.*is not a token id or a list"),
    ({"bad_words_ids": ((),)}, "bad_words_ids=.*at least"),
    ({"bad_words_ids": ((3,), (30,))}, "bad_words_ids has the token id 30"),
    ({"forced_bos_token_id": 20}, "forced_bos_token_id has.*20.*from 0 to 19"),
    ({"eos_token_id": (-1,)}, "eos_token_id has the token id -1"),
    ({"n_docs": 0}, "n_docs=0 must be at least 1"),
    ({"n_docs": 5}, "n_docs=5 is above the 4 documents that were retrieved"),
  ],
)
def test_settings_that_cannot_work_are_named(settings, message):
  with pytest.raises(ValueError, match=message) as error:
    GenerationSettings(**settings).validate(
      vocab_size=20, max_positions=10, num_retrieved=4
    )
  assert "Change them where they are given" in str(error.value)


def test_all_problems_come_in_one_message():
  settings = GenerationSettings(
    max_length=5, min_length=9, temperature=-1.0, n_docs=0
  )
  with pytest.raises(ValueError, match="cannot work") as error:
    settings.validate()
  assert str(error.value).count("\n- ") == 3


def test_more_ends_than_tokens_cannot_be_searched_by_beams():
  settings = GenerationSettings(num_beams=2, eos_token_id=(0, 1))
  settings.validate(vocab_size=3)
  with pytest.raises(ValueError, match=r"eos_token_id has 2 ids.*only 2"):
    settings.validate(vocab_size=2)


def test_settings_that_work_are_returned():
  settings = GenerationSettings(
    max_length=11, num_beams=4, num_return_sequences=4, n_docs=4, top_p=0.0
  )
  assert settings is settings.validate(
    vocab_size=20, max_positions=10, num_retrieved=4
  )


def test_files_that_are_none_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="does not exist, expected Hugg"):
    read_generation_config(tmp_path)
  path = tmp_path / GENERATION_CONFIG
  path.write_text('{"num_beams": ')
  with pytest.raises(ValueError, match=r"is not JSON.*Restore it"):
    read_generation_config(path)
  path.write_bytes(b"\xff\xfe{}")
  with pytest.raises(ValueError, match="is not JSON"):
    read_generation_config(path)
  path.write_text("[4]")
  with pytest.raises(ValueError, match="holds a list, expected an object"):
    read_generation_config(path)
  path.write_text('{"bad_words_ids": 5}')
  with pytest.raises(ValueError, match=r"generation_config\.json: .*Correct"):
    read_generation_config(path)
