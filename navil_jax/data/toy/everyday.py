"""Questions about drawings in everyday words, each with its one true answer."""

import random
from collections import Counter
from collections.abc import Iterator

from navil_jax.data.toy.drawing import SHADES, SHAPES, Drawing, Thing

Asked = tuple[str, str, str]  # kind, question, answer
CAPTION = (
    *("Describe the picture.", "Describe the image.", "Describe this picture.", "What do you see?"),
    *("What is in the picture?", "What is in the image?", "What can you see?", "What is this a picture of?"),
    *("What does the picture show?", "What is drawn here?"),
)
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = ("no", "one", "two", "three", "four", "five")


def turns(rng: random.Random, drawing: Drawing) -> list[Asked]:
    """What can be asked of a drawing: about one question of each kind, in random words."""
    if drawing.writing:
        return list(_of_writing(rng, drawing))
    found = [("caption", rng.choice(CAPTION), caption(drawing))]
    for ask in (_of_color, _of_shape, _of_count, _of_presence, _of_two, _of_direction, _of_size, _of_number):
        found += ask(rng, drawing.things)
    return found


def caption(drawing: Drawing) -> str:
    """The one true sentence about a drawing, the left or upper thing first, larger groups first.

    Example: "A red circle."  "A red circle left of a blue square."  "Three red circles and a star."
    """
    things = drawing.things
    if len(things) == 2 and (direction := _direction(*things)):
        first, second = things
        if direction in ("right of", "below"):
            first, second = second, first
            direction = {"right of": "left of", "below": "above"}[direction]
        return _sentence(f"{_a(_look(first))} {direction} {_a(_look(second))}")
    groups = sorted((-n, *look) for look, n in Counter((t.color, t.name) for t in things).items())
    parts = [_a(f"{c} {s}") if n == -1 else f"{NUMBERS[-n]} {c} {many(s)}" for n, c, s in groups]
    return _sentence(" and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))))


def _of_writing(rng: random.Random, drawing: Drawing) -> Iterator[Asked]:
    writing = drawing.writing
    assert writing is not None
    what = "number" if writing.text.isdigit() else "word"
    forms = (
        "What does it say?",
        "What is written?",
        "What is written here?",
        "Read the text.",
        "What does the text say?",
    )
    own = (f"What {what} is this?", f"What {what} is written?", f"Read the {what}.", f"Which {what} do you see?")
    yield "word", rng.choice((*forms, *own)), writing.text
    yield "word", rng.choice((*forms, *own)), writing.text
    yield "color", rng.choice(_color_forms(rng.choice((f"the {what}", "the text", "it")))), writing.color
    yield "caption", rng.choice(CAPTION), f'The {what} "{writing.text}" in {writing.color}.'


def _of_color(rng: random.Random, things: tuple[Thing, ...]) -> Iterator[Asked]:
    thing = rng.choice(things)
    same = [other for other in things if other.name == thing.name]
    if len({other.color for other in same}) > 1:
        return
    if len(things) == 1:
        named = rng.choice((f"the {thing.name}", "it", "this", "the shape", "this shape", f"this {thing.name}"))
    else:
        named = f"the {thing.name}" if len(same) == 1 else f"the {many(thing.name)}"
    forms = _color_forms(named) if len(same) == 1 else _color_forms(named, "are")
    yield "color", rng.choice(forms), thing.color
    if rng.random() < 0.5 and len(same) == 1:
        right = rng.random() < 0.5
        asked = thing.color if right else rng.choice([c for c in SHADES if c != thing.color])
        yield "color", f"Is {named} {asked}?", "yes" if right else "no"


def _color_forms(named: str, verb: str = "is") -> tuple[str, ...]:
    return (
        f"What color {verb} {named}?",
        f"What colour {verb} {named}?",
        f"Which color {verb} {named}?",
        f"Which colour {verb} {named}?",
        f"What is the color of {named}?" if named != "it" else "What color is it?",
    )


def _of_shape(rng: random.Random, things: tuple[Thing, ...]) -> Iterator[Asked]:
    thing = rng.choice(things)
    same = [other for other in things if other.color == thing.color]
    if len(things) == 1:
        forms = ("What shape is this?", "What shape is it?", "What shape do you see?", "Which shape is this?")
        yield "shape", rng.choice((*forms, "What shape is in the picture?", "What shape is shown?")), thing.name
        yield "shape", rng.choice(("What is this?", "What is it?", "What is that?")), _sentence(_a(_look(thing)))
        if rng.random() < 0.4:
            right = rng.random() < 0.5
            asked = thing.name if right else rng.choice([s for s in SHAPES if s != thing.name])
            yield "shape", f"Is {rng.choice(('this', 'it'))} {_a(asked)}?", "yes" if right else "no"
    if len(same) == 1:
        color = thing.color
        forms = (
            f"Which shape is {color}?",
            f"What shape is {color}?",
            f"What is {color}?",
            f"What is the {color} shape?",
        )
        yield "shape", rng.choice((*forms, f"What shape is the {color} one?", f"Which one is {color}?")), thing.name


def _of_count(rng: random.Random, things: tuple[Thing, ...]) -> Iterator[Asked]:
    what = rng.choice(("shapes", "shapes", "objects", "things"))
    forms = (f"How many {what} are there?", f"How many {what} do you see?", f"How many {what} are in the picture?")
    yield "count", rng.choice((*forms, f"Count the {what}.")), str(len(things))
    name = rng.choice(things).name if rng.random() < 0.85 else rng.choice(SHAPES)
    number = sum(thing.name == name for thing in things)
    forms = (f"How many {many(name)} are there?", f"How many {many(name)} do you see?", f"Count the {many(name)}.")
    yield "count", rng.choice((*forms, f"How many {many(name)} are in the picture?")), str(number)
    if len(things) > 2:
        color = rng.choice(things).color
        yield "count", f"How many {color} shapes are there?", str(sum(thing.color == color for thing in things))


def _of_presence(rng: random.Random, things: tuple[Thing, ...]) -> Iterator[Asked]:
    thing, form = rng.choice(things), rng.choice(("both", "both", "shape", "color"))
    there = rng.random() < 0.5
    looks = {(other.name, other.color) for other in things}
    name, color = thing.name, thing.color
    while not there and _is_there(form, name, color, looks):
        if form != "color" and (form == "shape" or rng.random() < 0.5):
            name = rng.choice(SHAPES)
        else:
            color = rng.choice(list(SHADES))
    if form == "color":
        asked = rng.choice((f"Is there anything {color}?", f"Is there a {color} shape?", f"Is anything {color}?"))
    else:
        what = f"{color} {name}" if form == "both" else name
        forms = (f"Is there {_a(what)}?", f"Do you see {_a(what)}?", f"Is there {_a(what)} in the picture?")
        asked = rng.choice((*forms, f"Can you see {_a(what)}?", f"Are there any {many(what)}?"))
    yield "presence", asked, "yes" if there else "no"


def _is_there(form: str, name: str, color: str, looks: set[tuple[str, str]]) -> bool:
    return any((form == "color" or name == n) and (form == "shape" or color == c) for n, c in looks)


def _direction(one: Thing, other: Thing) -> str:
    """Where the first is from the second; empty where no one direction is clear."""
    aside = abs(one.x - other.x) - one.wide - other.wide
    upright = abs(one.y - other.y) - one.high - other.high
    if aside > 0 and abs(one.x - other.x) > 1.4 * abs(one.y - other.y):
        return "left of" if one.x < other.x else "right of"
    if upright > 0 and abs(one.y - other.y) > 1.4 * abs(one.x - other.x):
        return "above" if one.y < other.y else "below"
    return ""


def _of_two(rng: random.Random, things: tuple[Thing, ...]) -> Iterator[Asked]:
    if len(things) != 2 or not (direction := _direction(*things)):
        return
    one, other = things
    the, that = _named(one, things), _named(other, things)
    relative = direction.removesuffix(" of")
    yield "relation", rng.choice((f"Where is {the} relative to {that}?", f"Where is {the} from {that}?")), relative
    there = rng.random() < 0.5
    asked = direction if there else rng.choice([d for d in DIRECTIONS if d != direction])
    words = f"to the {asked}" if asked.endswith("of") and rng.random() < 0.5 else asked
    yield "relation", f"Is {the} {words} {that}?", "yes" if there else "no"
    yield "relation", f"Where is {the}?", _sentence(f"{direction} {that}")
    side = {"left of": "on the left", "right of": "on the right", "above": "at the top", "below": "at the bottom"}
    forms = (f"What is {side[direction]}?", f"Which shape is {side[direction]}?", f"What shape is {side[direction]}?")
    form = rng.choice(forms)
    yield "relation", form, _sentence(_a(_look(one))) if form == forms[0] else one.name


def _of_direction(rng: random.Random, things: tuple[Thing, ...]) -> Iterator[Asked]:
    """What is left of the square?"""
    if not 1 < len(things) < 4:
        return
    other = rng.choice(things)
    there = [(t, d) for t in things if t is not other and (d := _direction(t, other))]
    if not there:
        return
    one, direction = rng.choice(there)
    if sum(d == direction for _, d in there) > 1:
        return
    words = f"to the {direction}" if direction.endswith("of") and rng.random() < 0.5 else direction
    name = _named(other, things)
    yield (
        "relation",
        rng.choice((f"What is {words} {name}?", f"What do you see {words} {name}?")),
        _sentence(_a(_look(one))),
    )
    yield "relation", rng.choice((f"Which shape is {words} {name}?", f"What shape is {words} {name}?")), one.name


def _of_size(rng: random.Random, things: tuple[Thing, ...]) -> Iterator[Asked]:
    if len(things) != 2:
        return
    small, large = sorted(things, key=lambda thing: thing.area)
    if large.area < 1.7 * small.area or large.name == small.name:
        return
    word, one = rng.choice((("bigger", large), ("larger", large), ("smaller", small)))
    names = [small.name, large.name]
    rng.shuffle(names)
    form = rng.choice((f"Which shape is {word}?", f"Which is {word}, the {names[0]} or the {names[1]}?"))
    yield "size", form, one.name


def _of_number(rng: random.Random, things: tuple[Thing, ...]) -> Iterator[Asked]:
    if len(things) == 1 and rng.random() < 0.3:
        yield "presence", rng.choice(("Is there more than one shape?", "Are there two shapes?")), "no"


def _named(thing: Thing, things: tuple[Thing, ...]) -> str:
    """The shortest name that means this thing alone."""
    if sum(other.name == thing.name for other in things) == 1:
        return f"the {thing.name}"
    return f"the {_look(thing)}"


def _look(thing: Thing) -> str:
    return f"{thing.color} {thing.name}"


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def many(words: str) -> str:
    """The plural of a name."""
    return f"{words}es" if words.endswith("s") else f"{words}s"


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."
