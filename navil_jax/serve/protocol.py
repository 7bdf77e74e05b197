"""OpenAI's chat completions: a body -> questions, and answers -> bodies and chunks."""

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any

from navil_jax.data.prompt import image_tokens
from navil_jax.errors import UserError
from navil_jax.generate.assistant import Answer, Assistant, Question
from navil_jax.generate.batch import parse_line
from navil_jax.generate.engine import Token
from navil_jax.generate.messages import read_messages, read_number, read_stops
from navil_jax.generate.programs import length_of
from navil_jax.generate.sampling import Sampler
from navil_jax.serve.images import read_address, size_of
from navil_jax.serve.limits import Limits, Refusal

NOTHING = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}  # no effect anywhere
NOTHING |= {"dataset"}  # VLMEvalKit's LMDeployAPI tells which benchmark it asks
USED = {
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "n",
}
USED |= {"repetition_penalty", "logprobs", "top_logprobs", "stream", "stream_options"}
# Fields that are taken only with a value that asks for nothing.
IDLE: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that can be run: one question for each choice."""

    questions: tuple[Question, ...]
    stream: bool
    usage: bool  # whether the stream ends with a chunk of usage
    images: int


def read_body(body: bytes) -> dict[str, Any]:
    """The fields. Raises `UserError`, or `Refusal` for fields that are not known."""
    fields = parse_line(body)
    for name, value in fields.items():
        if name in IDLE and value not in IDLE[name]:
            raise UserError(f"{name}: is not supported here; leave it out")
        if name not in USED and name not in NOTHING and name not in IDLE:
            raise UserError(f"{name[:80]}: no such field")
    return fields


def check_model(wanted: Any, model: str) -> None:
    """Raises `Refusal` for another model than the one that is here."""
    if wanted != model:
        raise Refusal(404, f"the model {str(wanted)[:80]!r} is not here; there is {model!r}", "model_not_found")


def choices_of(fields: dict[str, Any], limits: Limits) -> int:
    """How many answers a body asks for. Raises `UserError`."""
    count = read_number(fields, "n", int, 1)
    if not 1 <= count <= limits.choices:
        raise UserError(f"n: must be from 1 to {limits.choices}")
    return count


def read_request(fields: dict[str, Any], assistant: Assistant, model: str, limits: Limits) -> Asked:
    """Reads images and makes prompts; takes a while. Raises `UserError`, or `Refusal` for another model."""
    check_model(fields.get("model", model), model)
    talk = read_messages(fields.get("messages"))
    if len(talk.images) > limits.images:
        raise UserError(f"messages: {len(talk.images)} images are over the limit of {limits.images}")
    contents = _contents(talk.images, assistant, limits)
    patches = [assistant.read_image(content, f"image {number}") for number, content in enumerate(contents, 1)]
    prompt = assistant.with_system(talk.system).prompt(talk.history, talk.question, patches)
    for name in ("max_tokens", "max_completion_tokens"):
        if (asked := read_number(fields, name, int, 1)) < 1:
            raise UserError(f"{name}: must be at least 1, not {asked}")
    room = assistant.engine.max_tokens - length_of(prompt)
    most = read_number(fields, "max_tokens", int, max(1, min(limits.new_tokens, room)))
    question = Question(
        prompt,
        _sampler(fields),
        read_number(fields, "max_completion_tokens", int, most),
        read_stops(fields.get("stop")),
        _logprobs(fields),
    )
    assistant.check(question)
    seeds = [(question.sampler.seed + number) % 2**32 for number in range(choices_of(fields, limits))]
    samplers = [dataclasses.replace(question.sampler, seed=seed) for seed in seeds]
    questions = tuple(dataclasses.replace(question, sampler=sampler) for sampler in samplers)
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise UserError("stream_options: must be an object")
    usage = _flag(options, "include_usage")
    return Asked(questions, _flag(fields, "stream"), usage, len(patches))


def _contents(addresses: Sequence[str], assistant: Assistant, limits: Limits) -> list[bytes]:
    """Bytes of the images; those that cannot fit are refused by their headers, before one is decoded."""
    contents, tokens = [], 0
    for number, address in enumerate(addresses, 1):
        name = f"image {number}"
        if assistant.config.model.vision is None:
            raise UserError("the model has no vision part; ask without images")
        content = read_address(address, name, limits)
        cost = image_tokens(*size_of(content, name, limits), assistant.config)
        tokens += cost.visual_tokens + cost.text_tokens
        if tokens > assistant.engine.max_tokens:
            limit = assistant.engine.max_tokens
            raise UserError(f"{name}: {tokens:,} tokens of images are over the limit of {limit:,}; shrink or drop some")
        contents.append(content)
    return contents


def _sampler(fields: dict[str, Any]) -> Sampler:
    default = Sampler()
    seed = read_number(fields, "seed", int, None)
    return Sampler(
        read_number(fields, "temperature", float, default.temperature),
        read_number(fields, "top_k", int, default.top_k),
        read_number(fields, "top_p", float, default.top_p),
        secrets.randbits(32) if seed is None else seed % 2**32,
        read_number(fields, "repetition_penalty", float, default.repetition_penalty),
    )


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value not in (None, True, False) or (isinstance(value, int | float) and not isinstance(value, bool)):
        raise UserError(f"{name}: must be true or false")
    return bool(value)


def _logprobs(fields: dict[str, Any]) -> int | None:
    top = read_number(fields, "top_logprobs", int, None)
    if _flag(fields, "logprobs"):
        return top or 0
    if top:
        raise UserError("top_logprobs: needs logprobs to be true")
    return None


class Reply:
    """What goes back for one request."""

    def __init__(self, assistant: Assistant, model: str, answers: Sequence[Answer]):
        self._assistant, self._answers = assistant, answers
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self._about = {"id": self.id, "created": int(time.time()), "model": model}

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt, once, and of all answers; those that the first answer's slot did not read again."""
        first, new = self._answers[0], sum(len(answer.tokens) for answer in self._answers)
        return {
            "prompt_tokens": first.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": first.prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": first.request.cached},
        }

    def body(self) -> dict[str, Any]:
        """All answers at once."""
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(answer, answer.tokens),
                "finish_reason": answer.reason,
            }
            for number, answer in enumerate(self._answers)
        ]
        return {**self._about, "object": "chat.completion", "choices": choices, "usage": self.usage()}

    def chunk(
        self, number: int, delta: dict[str, Any], tokens: Sequence[Token] = (), reason: str | None = None
    ) -> dict[str, Any]:
        """A step of an answer's stream."""
        logprobs = self._logprobs(self._answers[number], tokens) if tokens else None
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._about, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, if it is asked for."""
        return {**self._about, "object": "chat.completion.chunk", "choices": [], "usage": self.usage()}

    def _logprobs(self, answer: Answer, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Of all tokens but the stop token, which is no text."""
        if answer.request.logprobs is None:
            return None
        told = [
            {
                **self._scored(token.id, token.logprob or 0.0),
                "top_logprobs": [self._scored(other, logprob) for other, logprob in token.top],
            }
            for token in tokens
            if token.id != answer.request.stop_id
        ]
        return {"content": told, "refusal": None}

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._assistant.token_text(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}
