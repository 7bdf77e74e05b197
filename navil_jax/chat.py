"""Talks with a trained model about images: `python -m navil_jax.chat --checkpoint runs/x --image cat.png`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shlex
import sys
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from navil_jax.config import MeshConfig
from navil_jax.config.ranges import Amount, Count, NotNegative, PositiveShare, Seed, read_as
from navil_jax.errors import Parser, UserError, explain, report_user_errors
from navil_jax.paths import at_home, given_path, new_file

if TYPE_CHECKING:
    from PIL import Image

    from navil_jax.data.images import ImagePatches
    from navil_jax.generate.assistant import Assistant
    from navil_jax.generate.sampling import Sampler

EXAMPLES = """
one question:
  python -m navil_jax.chat --checkpoint runs/x --image cat.png --prompt "What animal is this?"

two images; <image> says where each of them stands (otherwise they stand in front of the question):
  python -m navil_jax.chat --checkpoint runs/x --image a.png --image b.png \\
    --prompt "First <image> and then <image>: what changed?"

a conversation, if there is no --prompt:
  python -m navil_jax.chat --checkpoint runs/x
  > /image cat.png
  > What animal is this?
  A cat.
  > What colour is it?
  > /save talk.json

Exit status: 0 good, 2 bad input (one line says what), 130 after Ctrl-C.
"""
HELP = """/image FILE   adds an image to the next question, as a path alone does;
              <image> in the question says where (else in front of it)
/reset        forgets the conversation and its images
/save FILE    writes the conversation as JSON, in OpenAI's form; images are
              named by their paths
/help         shows this; Ctrl-C ends an answer
/quit         leaves, as Ctrl-D does, and Ctrl-C where a question is due"""


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.prompt is None and sys.stdin is None:
        raise UserError("stdin is closed, and questions are read from it; give one with --prompt")
    from navil_jax.convert import loading  # --help needs none of these
    from navil_jax.data.images import load_image
    from navil_jax.generate.sampling import Sampler
    from navil_jax.sharding import make_mesh

    sampler = Sampler(options.temperature, options.top_k, options.top_p, options.seed)
    if options.prompt is not None:
        _check_text("--prompt", options.prompt)
        if not options.prompt.strip() and not options.image:
            raise UserError("--prompt: is empty; give a question or an image")
    images = [load_image(file) for file in options.image]
    assistant = loading.load_assistant(options.checkpoint, make_mesh(MeshConfig()), reuse=True, int8=options.int8)
    if assistant.averaged:
        print("the running averages of the parameters answer, as in the run's evaluations", file=sys.stderr)
    conversation = Conversation(assistant, sampler, options.max_new_tokens)
    for name, image in zip(options.image, images, strict=True):
        conversation.add_image(image, name)
    if options.prompt is None:
        _talk(conversation)
    else:
        conversation.ask(options.prompt)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m navil_jax.chat",
        description="Talks with a trained model about images.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    text = "workdir of a training run, or its checkpoint folder"
    add("--checkpoint", required=True, type=given_path, metavar="DIR", help=text)
    text = "an image; may be given several times"
    add("--image", action="append", type=given_path, default=[], metavar="FILE", help=text)
    add("--prompt", metavar="TEXT", help="one question; without it, a conversation starts")
    add(
        "--temperature",
        type=read_as(NotNegative),
        default=0.0,
        help="0 (default): the likeliest token; higher: more varied answers",
    )
    add(
        "--top-p",
        type=read_as(PositiveShare),
        default=1.0,
        help="draw from the likeliest tokens with this probability together",
    )
    add("--top-k", type=read_as(Amount), default=0, help="draw from this many likeliest tokens; 0 (default): from all")
    add("--seed", type=read_as(Seed), default=0, help="of the random numbers if the temperature is not 0 (default: 0)")
    add(
        "--max-new-tokens", type=read_as(Count), default=1024, help="an answer ends there at the latest (default: 1024)"
    )
    text = "round the decoder's matrices to 8 bits: less memory, answers may differ a little"
    add("--int8", action="store_true", help=text)
    return parser


@dataclasses.dataclass
class Conversation:
    """The turns so far. The engine keeps what it has read of them, and reads only what follows."""

    assistant: Assistant
    sampler: Sampler
    max_new_tokens: int
    turns: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # questions with their <image>, answers
    images: list[ImagePatches] = dataclasses.field(default_factory=list)  # of these questions
    waiting: list[ImagePatches] = dataclasses.field(default_factory=list)  # for the next question
    names: list[str] = dataclasses.field(default_factory=list)  # of the files of all these images

    def add_image(self, source: str | Image.Image, name: str) -> None:
        """Raises `UserError` if it cannot be read."""
        self.waiting.append(self.assistant.read_image(source))
        self.names.append(os.path.abspath(name))

    def reset(self) -> None:
        self.turns, self.images, self.waiting, self.names = [], [], [], []

    def messages(self) -> list[dict[str, Any]]:
        """The turns so far, as OpenAI's interface has them."""
        names, found = iter(self.names), list[dict[str, Any]]()
        for question, answer in self.turns:
            found.append({"role": "user", "content": list(_parts(question, names))})
            found.append({"role": "assistant", "content": answer})
        return found

    def ask(self, question: str) -> str:
        """Prints the answer while it is made, and returns it. A question that fails leaves the conversation as it was.

        Raises:
          UserError: another number of `<image>` than of waiting images, or a conversation that is too long.
        """
        from navil_jax.data.prompt import PLACEHOLDER

        places = question.count(PLACEHOLDER)
        if places not in (0, len(self.waiting)):
            raise UserError(f"the question holds {PLACEHOLDER} {places} times for {len(self.waiting)} new images")
        if not places:
            question = f"{PLACEHOLDER}\n" * len(self.waiting) + question
        images = self.images + self.waiting
        pieces, cut = [], list[bool]()
        made = self.assistant.answer(
            self.turns, question, images, self.sampler, self.max_new_tokens, lambda: cut.append(True)
        )
        for piece in made:
            print(piece, end="", flush=True)
            pieces.append(piece)
        print(flush=True)
        if cut:
            print(
                f"... (cut at {self.max_new_tokens} tokens; --max-new-tokens allows more)", file=sys.stderr, flush=True
            )
        self.turns.append((question, "".join(pieces)))
        self.images, self.waiting = images, []
        return self.turns[-1][1]


def _parts(question: str, names: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Texts and images of a question in their order."""
    from navil_jax.data.prompt import PLACEHOLDER

    for number, text in enumerate(question.split(PLACEHOLDER)):
        if number:
            yield {"type": "image_url", "image_url": {"url": next(names)}}
        if text.strip():
            yield {"type": "text", "text": text.strip("\n")}


def _talk(conversation: Conversation) -> None:
    """Reads questions and commands until /quit, the end of the input, or Ctrl-C where it waits for one.

    A mistake is said in a line, Ctrl-C ends an answer, and the talk goes on.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history for input())
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no UTF-8 are a mistake of their line alone
    print("/help lists the commands")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line == "/quit":
            return
        try:
            _obey(line, conversation)
        except KeyboardInterrupt:
            print("\nstopped; this question is forgotten")
        except Exception as error:
            if (said := explain(error)) is None:
                raise
            print(f"error: {said}")


def _obey(line: str, conversation: Conversation) -> None:
    """Does what a line of a talk asks for. Raises `UserError` for a mistake."""
    command, _, argument = line.partition(" ")
    if command in ("/help", "/reset", "/quit") and argument:
        raise UserError(f"{command}: stands alone; leave out {argument.strip()!r:.60}")
    if command == "/help":
        print(HELP)
    elif command == "/reset":
        conversation.reset()
        print("starts anew")
    elif line == "/image":
        raise UserError("/image: name a file")
    elif command == "/image" or os.path.isfile(_file_name(line)):  # a path alone, as a terminal pastes it
        name = _file_name(argument if command == "/image" else line)
        conversation.add_image(name, name)
        print("goes with the next question")
    elif command == "/save":
        _save(conversation, argument.strip())
    elif "/" in command[1:] and line.startswith("/"):
        raise UserError(f"{line}: no such file, and no command")
    elif command.startswith("/"):
        raise UserError(f"no command {command}; /help lists them")
    elif line:
        _check_text("the question", line)
        conversation.ask(line)


def _save(conversation: Conversation, name: str) -> None:
    """Writes the conversation. Raises `UserError` where there is none, or a file already."""
    if not name:
        raise UserError("/save: name a file")
    if not conversation.turns:
        raise UserError("/save: there is no answer yet")
    try:
        path = new_file(_file_name(name))
        with path.open("x", encoding="utf-8") as file:
            json.dump({"messages": conversation.messages()}, file, ensure_ascii=False, indent=1)
    except FileExistsError:
        raise UserError(f"{name}: is there already; name another file") from None
    except argparse.ArgumentTypeError as error:
        raise UserError(str(error)) from None
    print(f"{len(conversation.turns)} questions and answers: {path}")


def _check_text(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what}: is no UTF-8 at character {error.start + 1}; write it again") from error


def _file_name(text: str) -> str:
    """A file's name as it is, or as a terminal writes one that is dropped on it: in quotes, or with backslashes."""
    text = text.strip()
    name = at_home(urllib.parse.unquote(text[len("file://") :]) if text.startswith("file://") else text)
    if not os.path.exists(name):
        with contextlib.suppress(ValueError):  # a quote without its end
            words = shlex.split(text)
            name = at_home(words[0]) if len(words) == 1 else name
    return name


if __name__ == "__main__":
    sys.exit(main())
