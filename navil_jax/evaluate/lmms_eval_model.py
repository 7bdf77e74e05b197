"""NaViL as a model of lmms-eval: `lmms-eval --model navil --model_args pretrained=DIR --tasks ...`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from navil_jax.config import MeshConfig
from navil_jax.convert.loading import load_assistant
from navil_jax.data.images import load_image
from navil_jax.errors import UserError
from navil_jax.generate.assistant import Question
from navil_jax.generate.engine import BATCH_SLOTS
from navil_jax.generate.sampling import Sampler
from navil_jax.sharding import make_mesh

MOST_TOKENS = 1024  # of tasks that say none, as lmms-eval's own models have it
# Settings of a task that have no meaning here: those of other models' images, and of search where there is none.
PASSED_OVER = {"image_aspect_ratio", "image_sizes", "modalities", "do_sample", "num_beams", "use_cache"}


class NaViL(lmms):
    """A checkpoint, many requests at a time.

    Args:
      pretrained: a run, a checkpoint, a Hugging Face folder, or an id on its hub.
      batch_size: requests decoded together; lmms-eval's default of 1 stands for `BATCH_SLOTS`.
      device, max_batch_size: are lmms-eval's and have no meaning; JAX takes the devices that it sees.
    """

    is_simple = True

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, device: Any = None, max_batch_size: Any = None, **others: Any
    ) -> None:
        super().__init__()
        if others:
            raise UserError(f"--model_args: navil knows no {sorted(others)[0]}; it takes pretrained and batch_size")
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise UserError(f"--batch_size: must be a number from 1, not {batch_size!r}")
        slots = BATCH_SLOTS if int(batch_size) == 1 else int(batch_size)
        self.assistant = load_assistant(pretrained, make_mesh(MeshConfig()), slots)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of their requests; one ends before the first text of a task's `until`."""
        answers: list[str] = []
        with tqdm(total=len(requests), desc="Model Responding", disable=self.rank != 0) as bar:
            for request, answer in self.assistant.answers(self._questions(requests)):
                answers.append(answer.text)
                context, settings = request.args[:2]
                self.cache_hook.add_partial("generate_until", (context, settings), answer.text)
                bar.update(1)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Is not there."""
        raise UserError("navil scores no given answers (loglikelihood); take a task of output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Is not there."""
        raise UserError("navil takes no tasks of several rounds; take one of output_type generate_until")

    def _questions(self, requests: Sequence[Any]) -> Iterator[tuple[Any, Question]]:
        for request in requests:
            context, settings, doc_to_visual, doc_id, task, split = request.args
            where = f"{task}, document {doc_id}"
            shown = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else []
            images = [self.assistant.read_image(_image(one, where)) for one in shown or []]
            yield request, question_of(self.assistant.prompt((), context, images), settings, where)


def question_of(prompt: Any, settings: Mapping[str, Any], where: str) -> Question:
    """A prompt with a task's `generation_kwargs`.

    Raises:
      UserError: a setting that cannot be kept.
    """
    given = dict(settings)
    until = given.pop("until", None) or []
    stops = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    if (given.get("num_beams") or 1) != 1:
        raise UserError(f"{where}: num_beams: {given['num_beams']}: there is no beam search; set it to 1")
    sampled = given.get("do_sample", True)
    temperature, top_p = given.pop("temperature", None) or 0.0, given.pop("top_p", None) or 1.0
    sampler = Sampler(temperature if sampled else 0.0, given.pop("top_k", None) or 0, top_p)
    most = given.pop("max_new_tokens", None) or given.pop("max_gen_toks", None) or MOST_TOKENS
    if strange := given.keys() - PASSED_OVER:
        raise UserError(f"{where}: generation_kwargs: {sorted(strange)[0]} is not supported; take it out of the task")
    return Question(prompt, sampler, int(most), stops)


def _image(one: Any, where: str) -> Image.Image:
    if not isinstance(one, Image.Image):
        raise UserError(f"{where}: {type(one).__name__} is no image; navil sees images only, no videos and no sound")
    return load_image(one, where)
