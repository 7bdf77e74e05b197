"""Prompts of the reference codes, and how long their answers may be."""

import re
from collections.abc import Mapping
from typing import Literal

from navil_jax.evaluate.benchmarks.mathvista import CHOICE
from navil_jax.evaluate.benchmarks.mmmu import OPEN
from navil_jax.evaluate.questions.record import Record, text_of

Style = Literal["internvl", "vlmevalkit", "lmms_eval"]

SHORT = "Answer the question using a single word or phrase."
LETTER, LETTER_CN = "Answer with the option's letter from the given choices directly.", "请直接回答选项字母。"
DIRECT, DIRECT_CN = "Answer the question directly.", "请直接回答问题。"
CHINESE = re.compile("[\u4e00-\u9fff]")
YES_NO = " Please answer yes or no."
LMMS_CHOICE_CN = "请直接使用所提供的选项字母作为答案回答。"
LMMS_MMVET = (
    "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
)
LMMS_MATHS = {
    "integer": "Answer the question using a single integer number.",
    "float1": "Answer the question using a single floating-point number with one decimal place.",
    "float2": "Answer the question using a single floating-point number with two decimal places.",
    "list": "Answer the question using a Python list.",
}
IMAGE = "<image>"

# Most new tokens of an answer.
_INTERNVL = {"textvqa": 10, "gqa": 10, "ai2d": 10, "mmmu": 10, "mme": 20, "mmvet": 1000}
_INTERNVL |= dict.fromkeys(("docvqa", "infovqa", "chartqa", "mmbench", "ccbench", "scienceqa"), 100)
_LMMS = dict.fromkeys(("gqa", "ai2d", "chartqa", "scienceqa", "mme"), 16) | {"docvqa": 32, "infovqa": 32}
_LMMS |= {"mmmu": 128, "ocrbench": 128, "ccbench": 256, "mathvista": 16384}
_LMMS |= dict.fromkeys(("mmbench", "mmvet", "textvqa"), 1024)  # TextVQA: that of the model, most often
MOST_TOKENS: Mapping[Style, Mapping[str, int]] = {"internvl": _INTERNVL, "vlmevalkit": {}, "lmms_eval": _LMMS}
MOST = 4096  # where none is named; VLMEvalKit names none


def style_of(protocol: str) -> Style:
    """The code whose prompts belong to a protocol of scores."""
    if protocol.startswith("vlmevalkit"):
        return "vlmevalkit"
    return "lmms_eval" if protocol.startswith("lmms_eval") else "internvl"


def most_tokens(benchmark: str, style: Style) -> int:
    return MOST_TOKENS[style].get(benchmark, MOST)


def make_prompt(benchmark: str, style: Style, record: Record) -> str:
    """The text that a reference code hands to its model; where it places no images, they go in front."""
    if style == "vlmevalkit":
        return _placed(_vlmevalkit(benchmark, record), len(record.images))
    return _lmms(benchmark, record) if style == "lmms_eval" else _internvl(benchmark, record)


def _placed(text: str, images: int) -> str:
    if images <= 1:
        return f"{IMAGE}\n{text}" if images else text
    return "".join(f"Image-{number}: {IMAGE}\n" for number in range(1, images + 1)) + text


def _listed(record: Record, strip: bool = False) -> str:
    options = [f"{letter}. {text.strip() if strip else text}" for letter, text in record.options.items()]
    return "\n".join(options)


def _vlmevalkit(benchmark: str, record: Record) -> str:
    if benchmark in ("mmvet", "mathvista"):
        return _query(record)
    if benchmark == "mme":
        return f"{record.question} {SHORT}"
    if benchmark == "mmmu" or record.options:
        text = "\n".join(part for part in (record.hint, record.question, _listed(record)) if part)
        chinese = CHINESE.search(text)
        if record.options:
            return f"{text}\n{LETTER_CN if chinese else LETTER}"
        return f"{text}\n{DIRECT_CN if chinese else DIRECT}"
    return f"{record.question}\n{SHORT}"


def _query(record: Record) -> str:
    """The published prompt of MathVista, which VLMEvalKit's file has for its question."""
    return text_of(record.row.get("query")) or record.question


def _internvl(benchmark: str, record: Record) -> str:
    if benchmark == "mmvet":
        return f"{record.question} "
    if benchmark == "mathvista":
        return _query(record)
    if benchmark == "mmmu":
        question, options = record.question.strip(), _listed(record, strip=True)
        return "\n".join(part for part in (question, options, LETTER if options else SHORT) if part)
    if benchmark == "ocrbench":  # InternVL reports use VLMEvalKit for it
        return _vlmevalkit(benchmark, record)
    if record.options:
        last = LETTER_CN if benchmark == "ccbench" else LETTER
        return "\n".join(part for part in (record.hint, record.question, _listed(record), last) if part)
    return f"{record.question} {SHORT}"


def _lmms(benchmark: str, record: Record) -> str:
    question, options = record.question, _listed(record)
    if benchmark in ("mmbench", "ccbench"):
        text = " ".join(part for part in (record.hint, question, "There are several options:") if part)
        return f"{text}\n{options}\n\n{LMMS_CHOICE_CN if benchmark == 'ccbench' else LETTER}"
    if benchmark == "mmmu":
        is_open = record.line["question_type"] == OPEN
        return f"{question}\n\n{SHORT}" if is_open else f"{question}\n{options}\n\n{LETTER}"
    if benchmark == "mathvista":
        return _lmms_maths(record)
    if benchmark == "mmvet":
        return f"{LMMS_MMVET}{question}"
    if benchmark == "mme":
        return f"{question.strip().replace(YES_NO, '')}\n{SHORT}"
    if benchmark == "ocrbench":
        return question.strip()
    if benchmark == "chartqa":
        return f"{question}\nAnswer the question with a single word."
    if options:
        context = f"Context: {record.hint}\n" if record.hint else ""
        return f"{context}{question}\n{options}\n{LETTER}"
    return f"{question.capitalize() if benchmark == 'textvqa' else question}\n{SHORT}"


def _lmms_maths(record: Record) -> str:
    line, unit = record.line, text_of(record.row.get("unit"))
    text = f"{record.question} (Unit: {unit})" if unit else record.question
    if line["question_type"] == CHOICE:
        options = "\n".join(f"{chr(ord('A') + number)}. {option}" for number, option in enumerate(line["choices"]))
        return f"{text}\n{options}\n{LETTER}"
    precision = f"{line['precision']:g}" if line["answer_type"] == "float" and line["precision"] else ""
    return f"{text}\n{LMMS_MATHS.get(line['answer_type'] + precision, '')}".strip()
