"""QuestionSource: the questions of a benchmark as samples, to find what training data have in common with them."""

import dataclasses

from navil_jax.data.formats import files
from navil_jax.data.sample import Sample, check_index
from navil_jax.evaluate.questions.layouts import Questions


@dataclasses.dataclass(frozen=True)
class QuestionSource:
    """A `Source` of the questions of a split, with their images and without answers."""

    questions: Questions

    def __len__(self) -> int:
        return len(self.questions.records)

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        record = self.questions.records[index]
        images = tuple(image() for image in record.images)
        key = f"{self.questions.benchmark}/{self.questions.split}/{record.id}"
        return Sample(key, images, ((record.question, ""),))

    def texts(self) -> list[str]:
        return [record.question for record in self.questions.records]

    def stamp(self) -> str:
        """What the files are known by."""
        return files.stamp(files.version(str(path)) for path in self.questions.files if path.is_file())
