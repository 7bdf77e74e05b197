"""A language model that judges answers, behind any endpoint with OpenAI's chat completions."""

import functools
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from navil_jax.errors import UserError
from navil_jax.evaluate.benchmarks.circular import options_of
from navil_jax.evaluate.benchmarks.mathvista import CHOICE
from navil_jax.evaluate.benchmarks.mmmu import OTHER, answers_of, is_open
from navil_jax.evaluate.benchmarks.scoring import Benchmark, Line, letters
from navil_jax.evaluate.journal import Journal

KEY = "OPENAI_API_KEY"  # of the environment
ALWAYS = ("mmvet", "mathvista")  # benchmarks that have no score without a judge
SOMETIMES = ("mmbench", "ccbench", "mmmu")  # those with a protocol that asks one of answers which no rule reads
MOST_TOKENS, SECONDS = 128, 120
TRIES, WAIT = 4, 2.0  # of one call that fails on its way, and seconds before the next
BUSY = (408, 409, 429, 500, 502, 503, 504)

CHOICE_PROMPT = """A model answered a question with options in its own words. Which option did it choose?

Question: {question}
Options:
{options}
Answer of the model: {prediction}

Reply with the letter of that option and nothing else. Reply {none} if the answer fits none of them."""
NUMBER_PROMPT = """Take the final answer out of a model's response to a question.

{question}

Response of the model: {prediction}

Reply with {form} and nothing else."""
GRADE_PROMPT = """Grade a model's answer to a question about an image, given the true answer. In the true answer <AND>
stands between parts that are all needed, and <OR> between parts of which one is enough.

Question: {question}
True answer: {answer}
Answer of the model: {prediction}

Reply with a number from 0.0 (nothing is right) to 1.0 (all is right) in steps of 0.1, and nothing else."""
FORMS = {"integer": "the integer", "float": "the number, as a decimal fraction", "list": "the Python list"}


class Judge:
    """Asks an endpoint.

    Args:
      url: of its API (http://host:8000/v1) or of its chat completions.
      model: its name there.

    Raises:
      UserError: the address is none.
    """

    def __init__(self, url: str, model: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--judge {url}: is no address; give one such as http://localhost:8000/v1")
        self.url = url if url.endswith("/chat/completions") else f"{url.rstrip('/')}/chat/completions"
        self.model = model

    def ask(self, prompt: str, call: int) -> str:
        """The reply. The first call is greedy; each further one is warmer by a half, as the reference codes have it.

        Raises:
          UserError: the endpoint refuses, or cannot be reached again and again.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": MOST_TOKENS}
        request = urllib.request.Request(
            self.url,
            json.dumps({**body, "temperature": 0.5 * (call - 1)}).encode(),
            {"Content-Type": "application/json"} | self._key(),
        )
        for attempt in range(1, TRIES + 1):
            try:
                with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                    return str(json.load(answer)["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {error.reason}"
                if error.code not in BUSY:
                    break
            except (OSError, ValueError) as error:
                problem = str(getattr(error, "reason", error))
            except (KeyError, IndexError, TypeError):
                problem = "its reply is no chat completion"
                break
            if attempt < TRIES:
                time.sleep(WAIT * attempt)
        raise UserError(f"--judge {self.url}: {problem}; mend it and run the same command again, which goes on")

    def _key(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {}


def judged_lines(
    benchmark: Benchmark, protocol: str, lines: list[dict[str, Any]], judge: Judge, path: Path
) -> Iterator[dict[str, Any]]:
    """The lines with the judge's replies, asked as the protocol asks; what the file has is not asked again."""
    with Journal(path) as journal:
        for line in lines:
            said = journal.get(line["id"])
            if said is None:
                said = _asked(benchmark, protocol, line, judge)
                journal.add({"id": line["id"], "replies": said})
            else:
                said = said["replies"]
            yield _with_replies(line, functools.partial(_said_of, said))


def _asked(benchmark: Benchmark, protocol: str, line: Line, judge: Judge) -> dict[str, list[str]]:
    """Scores the line with a judge that is asked, and gives its replies: of the line, or of each of its rows."""
    said: dict[str, list[str]] = {}

    def asker(row: Line) -> Callable[[int], str]:
        prompt = judge_prompt(benchmark.name, protocol, line, row)

        def ask(call: int) -> str:
            said.setdefault(_key_of(row), []).append(judge.ask(prompt, call))
            return said[_key_of(row)][-1]

        return ask

    benchmark.protocols[protocol].score(_with_replies(line, asker))
    return said


def _said_of(said: Mapping[str, list[str]], row: Line) -> list[str] | None:
    return said.get(_key_of(row))


def _key_of(row: Line) -> str:
    return str(row.get("index", ""))


def _with_replies(line: Line, replies: Callable[[Line], Any]) -> dict[str, Any]:
    if "passes" in line:
        rows = [(row, replies(row)) for row in line["passes"]]
        return {**line, "passes": [{**row, "judge_replies": of} if of is not None else row for row, of in rows]}
    of = replies(line)
    return {**line, "judge_replies": [] if of is None else of}


def judge_prompt(benchmark: str, protocol: str, line: Line, row: Line) -> str:
    """What the judge is asked of a line, or of one of its rows; our own words, not those of the reference codes."""
    question, prediction = line["question"], row["prediction"]
    if benchmark == "mmvet":
        answer = line["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        return GRADE_PROMPT.format(question=question, answer=answer, prediction=prediction)
    if benchmark == "mathvista":
        form = FORMS.get(line["answer_type"], "it")
        form = "the letter of the option" if line["question_type"] == CHOICE else form
        return NUMBER_PROMPT.format(question=line.get("query") or question, prediction=prediction, form=form)
    if benchmark == "mmmu":
        options = letters(["; ".join(answers_of(line)), OTHER] if is_open(line) else line["options"])
    else:
        options = options_of(row)
    none = "E" if protocol.startswith("lmms_eval") else "Z"
    return CHOICE_PROMPT.format(question=question, options=_listed(options), prediction=prediction, none=none)


def _listed(options: Mapping[str, str]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())
