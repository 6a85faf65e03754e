"""Options that one callable hands on to others: one signature, one documentation, and errors that name the caller."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["described_options", "hand_on", "parameters_of", "split_options"]

_KINDS = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def parameters_of(source: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Named parameters of a function or class, those it hands on among them; without ``self``, ``*`` and ``**``."""
    if isinstance(source, type) and "__init__" in vars(source) and "__signature__" not in vars(source):
        source = vars(source)["__init__"]  # not the signature that a base class was given
    return {n: p for n, p in inspect.signature(source).parameters.items() if p.kind not in _KINDS and n != "self"}


def hand_on(target: Any, *sources: Callable[..., Any], leave: Iterable[str] = ()) -> Any:
    """Write out the ``**options`` of ``target``: they become keywords in its signature and arguments in its docstring.

    Arguments that the docstring of ``target`` leaves out are described as the sources do.

    Args:
        target: a class or a function that takes ``**options`` and gives them to the sources.
        *sources: who gets them; the first that has a parameter says what it is.
        leave: parameters of the last source that ``target`` decides by itself.

    Returns:
        ``target``, so that this can be a decorator's work.

    Example:
        >>> def inner(x, *, size=3):
        ...     '''Inner.
        ...
        ...     Args:
        ...         size: how large.
        ...     '''
        >>> def outer(x, **options):
        ...     '''Outer.
        ...
        ...     Args:
        ...         x: what.
        ...     '''
        >>> str(inspect.signature(hand_on(outer, inner))), "size: how large." in outer.__doc__
        ('(x, *, size=3)', True)
    """
    own = [p for p in inspect.signature(_called(target)).parameters.values() if p.name != "self"]
    names = {p.name for p in own}
    added: dict[str, inspect.Parameter] = {}
    for source in sources:
        decided = set(leave) if source is sources[-1] else set()
        for name, parameter in parameters_of(source).items():
            by_name = parameter.kind is inspect.Parameter.KEYWORD_ONLY or parameter.default is not parameter.empty
            if name not in names | decided and by_name:
                added.setdefault(name, parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    fixed = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(fixed) == len(own):  # it takes no further options
        added = {}
    target.__signature__ = inspect.Signature([*fixed, *added.values()])
    if target.__doc__:
        known = {name: text for source in reversed(sources) for name, text in described_options(source).items()}
        known |= _described(target.__doc__)
        target.__doc__ = _with_arguments(
            target.__doc__, {n: known[n] for n in target.__signature__.parameters if n in known}
        )
    return target


def split_options(
    caller: Any, options: Mapping[str, Any], *sources: Callable[..., Any], leave: Iterable[str] = ()
) -> tuple[dict[str, Any], ...]:
    """Options by who takes them: one dict per source, an option goes to the first that has it.

    Args:
        caller: whose options they are, for the error.
        options: as the user gave them.
        *sources: callables with keyword parameters.
        leave: parameters of the last source that the caller decides by itself.

    Raises:
        TypeError: if nobody takes an option; names the nearest one there is.

    Example:
        >>> def paint(**options): ...
        >>> split_options(paint, {"colour": 1}, lambda *, color: None)
        Traceback (most recent call last):
        TypeError: paint takes no option 'colour'; did you mean 'color'?
    """
    shares: tuple[dict[str, Any], ...] = tuple({} for _ in sources)
    takes = [parameters_of(source) for source in sources]
    for name in leave:
        takes[-1].pop(name, None)
    for name, value in options.items():
        share = next((s for s, known in zip(shares, takes, strict=True) if name in known), None)
        if share is None:
            known_names = {*parameters_of(caller), *(n for known in takes for n in known)} - set(leave)
            near = difflib.get_close_matches(name, sorted(known_names), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"see help({caller.__name__})"
            raise TypeError(f"{caller.__name__} takes no option {name!r}; {hint}")
        share[name] = value
    return shares


def _called(target: Any) -> Any:
    return getattr(target, "__init__") if isinstance(target, type) else target  # noqa: B009 - mypy minds the dot


def described_options(source: Callable[..., Any]) -> dict[str, str]:
    """Texts of the ``Args:`` section of a docstring by parameter, lines after the first without indentation."""
    return _described(inspect.getdoc(source) or "")


def _described(doc: str) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    name, lines = "", inspect.cleandoc(doc).splitlines()
    start, stop = _arguments(lines)
    for line in lines[start:stop]:
        entry = re.match(r"    \*{0,2}(\w+): (.*)", line)
        if entry:
            name = entry[1]
            found[name] = [entry[2]]
        elif name and line.strip():
            found[name].append(line.strip())
    return {key: "\n".join(texts) for key, texts in found.items()}


def _arguments(lines: list[str]) -> tuple[int, int]:
    """Where the section ``Args:`` is, or has to be put: before the first other section."""
    start = lines.index("Args:") if "Args:" in lines else None
    later = [
        i for i, line in enumerate(lines) if re.fullmatch(r"[A-Z]\w+:", line) and i > (-1 if start is None else start)
    ]
    stop = later[0] if later else len(lines)
    return (stop, stop) if start is None else (start, stop)


def _with_arguments(doc: str, texts: Mapping[str, str]) -> str:
    """The docstring with another section ``Args:``."""
    lines = inspect.cleandoc(doc).splitlines()
    start, stop = _arguments(lines)
    before, after = lines[:start], lines[stop:]
    section = ["Args:", *(f"    {name}: " + text.replace("\n", "\n        ") for name, text in texts.items())]
    parts = ["\n".join(before).rstrip(), "\n".join(section), "\n".join(after)]
    return "\n\n".join(part for part in parts if part)
