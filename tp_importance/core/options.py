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
    return {n: p for n, p in inspect.signature(source).parameters.items() if p.kind not in _KINDS and n != "self"}


def hand_on(target: Any, *sources: Callable[..., Any], leave: Iterable[str] = ()) -> Any:
    """Write out the ``**options`` of ``target``: they become keywords in its signature and arguments in its docstring.

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
            if name not in names | decided and parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                added.setdefault(name, parameter)
    open_ended = [p for p in own if p.kind is inspect.Parameter.VAR_KEYWORD]
    fixed = [p for p in own if p not in open_ended]
    target.__signature__ = inspect.Signature([*fixed, *added.values()])
    if target.__doc__:
        known = {name: text for source in reversed(sources) for name, text in described_options(source).items()}
        target.__doc__ = _with_options(target.__doc__, {n: known[n] for n in added if n in known})
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
        >>> split_options(int, {"colour": 1}, lambda *, color: None)
        Traceback (most recent call last):
        TypeError: int takes no option 'colour'; did you mean 'color'?
    """
    shares: tuple[dict[str, Any], ...] = tuple({} for _ in sources)
    takes = [parameters_of(source) for source in sources]
    for name in leave:
        takes[-1].pop(name, None)
    for name, value in options.items():
        share = next((s for s, known in zip(shares, takes, strict=True) if name in known), None)
        if share is None:
            near = difflib.get_close_matches(name, [n for known in takes for n in known], 1)
            hint = f"did you mean {near[0]!r}?" if near else f"see help({caller.__name__})"
            raise TypeError(f"{caller.__name__} takes no option {name!r}; {hint}")
        share[name] = value
    return shares


def _called(target: Any) -> Any:
    return getattr(target, "__init__") if isinstance(target, type) else target  # noqa: B009 - mypy minds the dot


def described_options(source: Callable[..., Any]) -> dict[str, str]:
    """Texts of the ``Args:`` section of a docstring by parameter, lines after the first without indentation."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in _section(inspect.getdoc(source) or ""):
        start = re.match(r"    \*{0,2}(\w+): (.*)", line)
        if start:
            name = start[1]
            found[name] = [start[2]]
        elif name and line.strip():
            found[name].append(line.strip())
    return {key: "\n".join(lines) for key, lines in found.items()}


def _section(doc: str) -> list[str]:
    """Lines of ``Args:``."""
    lines = doc.splitlines()
    if "Args:" not in lines:
        return []
    start = lines.index("Args:") + 1
    stop = next((i for i in range(start, len(lines)) if lines[i] and not lines[i].startswith(" ")), len(lines))
    return lines[start:stop]


def _with_options(doc: str, texts: Mapping[str, str]) -> str:
    """The docstring with more arguments, in place of what it says of ``**options``."""
    lines = inspect.cleandoc(doc).splitlines()
    new = [f"    {name}: " + text.replace("\n", "\n        ") for name, text in texts.items()]
    if "Args:" not in lines:
        return "\n".join([*lines, "", "Args:", *new])
    section, start = _section("\n".join(lines)), lines.index("Args:") + 1
    kept, skipping = [], False
    for line in section:
        if re.match(r"    \S", line):
            skipping = line.startswith("    **")
        if line.strip() and not skipping:
            kept.append(line)
    rest = lines[start + len(section) :]
    return "\n".join([*lines[:start], *kept, *new, *([""] if rest else []), *rest])
