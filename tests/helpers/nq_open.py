"""A small natural_questions_open, as TFDS stores it."""

import tensorflow_datasets as tfds


def prepare_nq_open(data_dir, **splits):
  """Writes `splits`, lists of (question, answers); returns the folder."""
  tfds.disable_progress_bar()
  # Otherwise TFDS has two builders of that name.
  with tfds.core.registered.skip_registration():

    class NaturalQuestionsOpen(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")
      # Nothing of it is stored beside its code.
      pkg_dir_path = None
      code_path = None

      def _info(self):
        text = tfds.features.Text()
        features = {"question": text, "answer": tfds.features.Sequence(text)}
        return tfds.core.DatasetInfo(
          builder=self, features=tfds.features.FeaturesDict(features)
        )

      def _split_generators(self, dl_manager):
        return {
          name: self._generate_examples(rows) for name, rows in splits.items()
        }

      def _generate_examples(self, rows):
        for i, (question, answers) in enumerate(rows):
          yield i, {"question": question, "answer": answers}

  builder = NaturalQuestionsOpen(data_dir=data_dir, file_format="array_record")
  builder.download_and_prepare()
  return data_dir / "natural_questions_open" / "1.0.0"
