"""Configs from recipe files, flags and JSON: `python -m navil_jax.train --config configs/x.py --config.a.b=c`.

A recipe is a Python file with `get_config() -> Config`. Flags change single fields, addressed by their dotted key; an
entry of a tuple of dataclasses is addressed by its number: `--config.data.sources.0.weight=2`. Values are read by the
type that stands at the field in `config`, and every mistake is a `UserError` that names the key.
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import os
import re
import runpy
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from navil_jax.config import Config, validate
from navil_jax.config.plain import entry_class, keys, plain, required, type_name, typed
from navil_jax.errors import Parser, UserError

PREFIX = "--config."


def parse(
    argv: Sequence[str],
    description: str,
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
    default: Config | None = None,
    command: str = "train",
) -> tuple[Config, argparse.Namespace]:
    """Reads a command's arguments.

    Args:
      argv: arguments without the program's name: `--config FILE`, any number of `--config.a.b=c` or `--config.a.b c`
        (each key once), and the command's own options.
      description: what `--help` says above the options; below them stands every config key.
      add_options: adds the command's own options.
      default: the config if no --config is given; None: one must be given.
      command: what stands behind `python -m navil_jax.`, for the help.

    Returns:
      The validated config and the command's own options.

    Example:
      parse(["--config", "tiny.py", "--config.model.decoder.depth=2"], "Trains.")
      -> (Config(model=ModelConfig(decoder=DecoderConfig(depth=2, ...))), Namespace(config="tiny.py"))
    """
    parser = Parser(
        prog=f"python -m navil_jax.{command}",
        description=description,
        epilog=describe(Config),
    )
    text = "recipe: Python file with get_config()"
    parser.add_argument("--config", required=default is None, type=os.path.expanduser, metavar="FILE", help=text)
    if add_options:
        add_options(parser)
    overrides, rest = split_overrides(argv)
    options = parser.parse_args(rest)
    config = default if default is not None and not options.config else load_config(options.config)
    return apply_overrides(config, overrides), options


def split_overrides(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Key -> text of every --config.KEY=TEXT, and all other arguments. Raises `UserError` for a key given twice."""
    overrides: dict[str, str] = {}
    rest, arguments = [], iter(argv)
    for argument in arguments:
        if not argument.startswith(PREFIX):
            rest.append(argument)
            continue
        key, equals, text = argument.removeprefix(PREFIX).partition("=")
        if not equals:
            text = next(arguments, PREFIX)
            if text.startswith("--"):
                raise UserError(f"{PREFIX}{key}: no value given, write {PREFIX}{key}=VALUE")
        if key in overrides:
            raise UserError(f"{PREFIX}{key}: is given twice, as {overrides[key]!r} and {text!r}; give it once")
        overrides[key] = text
    return overrides, rest


def load_config(path: str | Path) -> Config:
    """Runs a recipe's `get_config()` and checks the types of all fields. It may import the recipes beside it.

    Args:
      path: file; if there is none at `configs/...`, the recipe of this name that comes with the package.

    Raises:
      UserError: no such file, syntax error or exception (with its line), no `get_config`, not a `Config`, a field of
        the wrong type or an impossible value.
    """
    path = found_recipe(Path(path))
    try:
        with neighbours_importable(path.resolve().parent):
            config = runpy.run_path(str(path))["get_config"]()
    except KeyError as error:
        if error.args != ("get_config",):
            raise UserError(f"{path}:{_line(path, error)}: KeyError: {error}") from error
        raise UserError(f"{path}: defines no get_config(), a recipe must return its Config from it") from error
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: syntax error: {error.msg}") from error
    except Exception as error:
        raise UserError(f"{path}:{_line(path, error)}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config() returned {type(config).__name__}, not navil_jax.config.Config")
    try:
        config = _at_home(typed(plain(config), Config, ""))
        _check(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config


def named_object(name: str, known: Mapping[str, str], where: str) -> Any:
    """What a config names: by a key of `known`, whose values are "module:attribute", or so itself.

    Args:
      where: begins the message of an error, such as "config.evaluators".

    Raises:
      UserError: no such name (with the nearest one), module or attribute; or the module fails when it is imported.
    """
    module, colon, attribute = known.get(name, name).partition(":")
    if not (module and colon and attribute):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        names = ", ".join(sorted(known))
        raise UserError(f"{where}: no {name!r}; the nearest is {near!r}, all are {names}; or module:name of your own")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except UserError:
        raise
    except Exception as error:  # the user's own module may raise anything
        raise UserError(f"{where}: {name}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"{where}: {name}: is no function or class")
    return found


def found_recipe(path: Path, kind: str = "config") -> Path:
    """The recipe at `path`, or of this name among those of the package: in a wheel, or in the checkout around it."""
    if path.is_file():
        return path
    if path.parts[:1] == ("configs",):
        package = Path(__file__).parents[1]
        for folder in (package, package.parent):
            if (folder / path).is_file():
                return folder / path
    raise UserError(f"{path}: no such {kind} file{'; it is a folder, give a file in it' if path.is_dir() else ''}")


@contextlib.contextmanager
def neighbours_importable(folder: Path) -> Iterator[None]:
    """Recipes import those of their folder by name, as scripts do; those of other folders may have the same names."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).parent == folder:
                del sys.modules[name]


def _line(path: Path, error: Exception) -> int:
    """The last line of the recipe on the way to the error."""
    lines = [f.lineno or 0 for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return lines[-1] if lines else 0


def apply_overrides(config: Config, overrides: Mapping[str, str]) -> Config:
    """Sets fields from text, then validates the result.

    Args:
      config: what is changed; untouched fields are kept.
      overrides: dotted key -> text, read by the field's type: `1_000`, `1e-3` (float fields), `true`, `none`
        (optional fields), `1,2,3` and `vision/**,connector/**` (tuples), `10_000:0.2,20_000:0` (steps and weights).

    Raises:
      UserError: unknown key (with the nearest known one), text that is not of the field's type, impossible config.
    """
    for key, text in overrides.items():
        config = _set(config, Config, key.split("."), text, key, config)
    config = _at_home(config)
    _check(config)
    return config


def _at_home(config: Config) -> Config:
    """The config with the home folder in the place of a leading ~ of its paths."""

    def expanded(node: Any, *names: str) -> Any:
        return dataclasses.replace(node, **{name: os.path.expanduser(getattr(node, name)) for name in names})

    data = expanded(config.data, "tokenizer", "quarantine")
    sources = tuple(expanded(source, "path", "held_out", "root", "leave_out") for source in data.sources)
    evaluators = tuple(expanded(entry, "data") for entry in config.evaluators)
    config = dataclasses.replace(config, data=dataclasses.replace(data, sources=sources), evaluators=evaluators)
    return expanded(config, "workdir", "init_from")


def _check(config: Config) -> None:
    validate(config)
    resumed_keys(config)


def resumed_keys(config: Config) -> tuple[str, ...]:
    """The keys of `config.resume_with`: of fields, of groups of them, or of the fingerprint of a source's data.

    Raises:
      UserError: there is no such key; names the nearest one.
    """
    names = tuple(name.strip() for name in config.resume_with.split(",") if name.strip())
    known = {f"{prefix}.{field.name}" for prefix, group in _groups(Config, "") for field in dataclasses.fields(group)}
    known = {key.removeprefix(".") for key in known} | {prefix for prefix, _ in _groups(Config, "") if prefix}
    known |= {"data.sources.N.fingerprint", "data.sources.N.held_out.fingerprint"}
    for name in names:
        if re.sub(r"\.\d+(?=\.|$)", ".N", name) not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
            raise UserError(f"config.resume_with: no key {name!r}, the nearest one is {near!r}")
    return names


def _set(node: Any, hint: Any, path: list[str], text: str, key: str, root: Config) -> Any:
    """`node` with the field at `path` read from `text`."""
    if not path:
        return _read(text, hint, key)
    name, rest = path[0], path[1:]
    hints = typing.get_type_hints(type(node))
    if dataclasses.is_dataclass(node) and not isinstance(node, type) and name in hints:
        return dataclasses.replace(node, **{name: _set(getattr(node, name), hints[name], rest, text, key, root)})
    if isinstance(node, tuple) and name in map(str, range(len(node))):
        index = int(name)
        entry = _set(node[index], typing.get_args(required(hint))[0], rest, text, key, root)
        return (*node[:index], entry, *node[index + 1 :])
    near = difflib.get_close_matches(key, list(keys(root)), n=1, cutoff=0.0)
    beyond = isinstance(node, tuple) and name.isdecimal()
    more = f"; there are {len(node)} entries, numbered from 0, and recipes add others" if beyond else ""
    raise UserError(f"config.{key}: no such key, the nearest one is config.{near[0]}{more}")


def _read(text: str, hint: Any, key: str) -> Any:
    """Reads a flag's text as a value of type `hint`."""
    bare = required(hint)
    if bare is not hint and text.lower() == "none":
        return None
    entry_fields = typing.get_type_hints(entry_class(bare)) if entry_class(bare) else {}
    numbers = typing.get_origin(bare) is tuple and set(entry_fields.values()) <= {int, float}
    if entry_fields and not numbers:
        raise UserError(f"config.{key}: is a group of fields, set them one by one (see --help)")
    value: Any
    try:
        if bare is bool:
            value = {"true": True, "false": False}[text.lower()]
        elif entry_fields:
            value = [_numbers(part, entry_fields) for part in text.split(",") if part.strip()]
        elif typing.get_origin(bare) is tuple:
            entry = typing.get_args(bare)[0]
            parts = [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
            value = [_number(part, entry) if entry in (int, float) else entry(part) for part in parts]
        else:
            value = _number(text, bare) if bare in (int, float) else text
    except (ValueError, KeyError) as error:
        wanted = ":".join(entry_fields) if entry_fields else type_name(hint)
        raise UserError(f"config.{key}: {text!r} is not {wanted}{',...' if entry_fields else ''}") from error
    return typed(value, hint, key)


def _numbers(text: str, fields: Mapping[str, type]) -> dict[str, Any]:
    """Example: "10_000:0.2" for step and weight -> {"step": 10000, "weight": 0.2}. Raises ValueError."""
    return {name: _number(word, kind) for (name, kind), word in zip(fields.items(), text.split(":"), strict=True)}


def _number(text: str, kind: type) -> Any:
    """A number in the digits 0 to 9. Raises ValueError."""
    if not text.isascii():
        raise ValueError(text)
    return kind(text)


def describe(config_class: type) -> str:
    """The text of `--help`: every key with type, default and the comment that stands at its field, by group."""
    groups = ["config keys, set with --config.KEY=VALUE (N: number of an entry, from 0; 'none' for nothing):"]
    for prefix, group in _groups(config_class, ""):
        comments = _comments(group)
        hints = typing.get_type_hints(group)
        lines = [f"{prefix or 'run'}: {inspect.cleandoc(group.__doc__ or '').splitlines()[0]}"]
        for field in dataclasses.fields(group):
            if entry_class(hints[field.name]) is None:
                key = f"{prefix}.{field.name}" if prefix else field.name
                head = f"  {key} = {_shown(field.default)}"
                lines.append(f"{head}  ({'; '.join([type_name(hints[field.name]), *comments.get(field.name, [])])})")
        groups.append("\n".join(lines))
    return "\n\n".join(groups)


def _groups(config_class: type, prefix: str) -> Iterator[tuple[str, type]]:
    """(key, dataclass) of a config class and of all in it; entries of tuples have the number N."""
    yield prefix, config_class
    for name, hint in typing.get_type_hints(config_class).items():
        if entry := entry_class(hint):
            key = f"{prefix}.{name}" if prefix else name
            yield from _groups(entry, f"{key}.N" if typing.get_origin(hint) is tuple else key)


def _comments(config_class: type) -> dict[str, list[str]]:
    """Field name -> its trailing comment, where it has one."""
    found = re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(config_class), flags=re.MULTILINE)
    return {name: [comment] for name, comment in found}


def _shown(default: Any) -> str:
    """A default as a flag would write it."""
    if default is dataclasses.MISSING:
        return "(required)"
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    if default is None or isinstance(default, bool):
        return str(default).lower()
    return str(default) or "''"
