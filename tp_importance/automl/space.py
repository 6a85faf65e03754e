"""Search spaces in neutral form, and as NNI, Optuna and Ray Tune want them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..core.optional import optional_import
from ..errors import SearchSpaceError
from ..pruning.domains import Choice, Domain, Float, Int

__all__ = ["Parameter", "SearchSpace", "flatten", "parameters_noted"]


KINDS: dict[str, type[Float] | type[Int] | type[Choice]] = {"float": Float, "int": Int, "choice": Choice}


@dataclass(frozen=True)
class Parameter:
    """One dimension of a search.

    Attributes:
        name: key in the parameters of a trial.
        domain: its values.
        method: the method it belongs to; it counts only in trials of that method.
    """

    name: str
    domain: Domain
    method: str | None = None


@dataclass(frozen=True)
class SearchSpace:
    """Parameters of a search; see :func:`~tp_importance.automl.search_space` for how they come about.

    Attributes:
        parameters: in the order in which they are drawn; ``method`` before what belongs to a method.

    Raises:
        SearchSpaceError: if a name is there twice, or a parameter belongs to a method that cannot be chosen.

    Example:
        >>> space = SearchSpace((
        ...     Parameter("method", Choice(("catro", "magnitude"))),
        ...     Parameter("catro.class_weight", Float(0, 1), method="catro"),
        ...     Parameter("ratio:conv1", Float(0, 0.9)),
        ... ))
        >>> space.to_nni()["ratio:conv1"]
        {'_type': 'uniform', '_value': [0, 0.9]}
        >>> space.check({"method": "magnitude", "ratio:conv1": 0.5})
        {'method': 'magnitude', 'ratio:conv1': 0.5}
        >>> SearchSpace.from_dict(space.to_dict()) == space
        True
    """

    parameters: tuple[Parameter, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters))
        names = [p.name for p in self.parameters]
        for name in names:
            if names.count(name) > 1:
                raise SearchSpaceError(f"parameter {name!r} is in the search space twice")
        seen = False
        for p in self.parameters:
            seen = seen or p.name == "method"
            if p.method is None:
                continue
            domain = self["method"].domain if seen else None
            if not isinstance(domain, Choice) or p.method not in domain:
                raise SearchSpaceError(
                    f"{p.name} belongs to method {p.method!r}, which no parameter 'method' before it offers"
                )

    def __getitem__(self, name: str) -> Parameter:
        for p in self.parameters:
            if p.name == name:
                return p
        raise SearchSpaceError(
            f"the search space has no parameter {name!r}; it has {[p.name for p in self.parameters]}"
        )

    def active(self, method: str | None) -> list[Parameter]:
        """Parameters that count in a trial of ``method``."""
        return [p for p in self.parameters if p.method is None or p.method == method]

    def check(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of one trial, flat, without those of other methods.

        Args:
            params: as any host gives them, see :func:`flatten`.

        Raises:
            SearchSpaceError: if one is missing, unknown or outside its domain; names it and its domain.
        """
        given = flatten(params)
        unknown = [key for key in given if key not in {p.name for p in self.parameters}]
        if unknown:
            raise SearchSpaceError(f"parameters {unknown} are not in the search space")
        result = {}
        for p in self.active(given.get("method")):
            if p.name not in given:
                raise SearchSpaceError(f"parameter {p.name!r} is missing; it must be in {p.domain}")
            if given[p.name] not in p.domain:
                raise SearchSpaceError(f"parameter {p.name}={given[p.name]!r} is not in {p.domain}")
            result[p.name] = given[p.name]
        return result

    def to_nni(self) -> dict[str, Any]:
        """NNI's search space; methods with parameters of their own become a nested choice."""
        plain = {p.name: _nni(p.domain) for p in self.parameters if p.method is None}
        owners = {p.method for p in self.parameters if p.method is not None}
        if owners:
            domain = self["method"].domain
            assert isinstance(domain, Choice)
            nested = [{"_name": m, **{p.name: _nni(p.domain) for p in self._own(m)}} for m in domain.values]
            plain["method"] = {"_type": "choice", "_value": nested}
        return plain

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Draw the parameters of one Optuna trial; those of methods not drawn are not asked for."""
        found: dict[str, Any] = {}
        for p in self.parameters:
            if p.method is None or p.method == found.get("method"):
                found[p.name] = _suggested(trial, p.name, p.domain)
        return found

    def to_ray(self) -> dict[str, Any]:
        """Ray Tune's ``param_space``. It is flat: :func:`.ray_trainable` drops what belongs to other methods.

        Raises:
            MissingPackageError: without Ray Tune; names the extra.
        """
        tune = optional_import("ray.tune")
        return {p.name: _ray(tune, p.domain) for p in self.parameters}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        kinds = {cls: kind for kind, cls in KINDS.items()}
        return {
            p.name: {"kind": kinds[type(p.domain)], **asdict(p.domain), **({"method": p.method} if p.method else {})}
            for p in self.parameters
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, Any]]) -> SearchSpace:
        """Rebuild a space from :meth:`to_dict`.

        Raises:
            SearchSpaceError: for an entry of another form.
        """
        parameters = []
        for name, entry in data.items():
            rest = dict(entry)
            kind, method = rest.pop("kind", None), rest.pop("method", None)
            if kind not in KINDS:
                raise SearchSpaceError(f"parameter {name!r} has kind {kind!r}; known: {sorted(KINDS)}")
            try:
                parameters.append(Parameter(name, KINDS[kind](**rest), method))
            except TypeError as error:
                raise SearchSpaceError(f"parameter {name!r} of kind {kind} cannot be {rest}: {error}") from error
        return cls(tuple(parameters))

    def _own(self, method: str) -> list[Parameter]:
        return [p for p in self.parameters if p.method == method]


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a trial as one flat dictionary: NNI's nested choices ``{"_name": …, …}`` are resolved.

    Args:
        params: parameters as a host gives them.

    Raises:
        SearchSpaceError: if they are no mapping, or nested otherwise.

    Example:
        >>> flatten({"method": {"_name": "catro", "catro.class_weight": 0.5}, "ratio:0": 0.1})
        {'method': 'catro', 'catro.class_weight': 0.5, 'ratio:0': 0.1}
    """
    if not isinstance(params, Mapping):
        raise SearchSpaceError(f"parameters of a trial are a dict, not {params!r}; the tuner must give one")
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if not isinstance(value, Mapping):
            flat[key] = value
        elif isinstance(value.get("_name"), str):
            flat |= {key: value["_name"], **{k: v for k, v in value.items() if k != "_name"}}
        else:
            raise SearchSpaceError(f"parameter {key!r} is nested: {value!r}; only NNI's {{'_name': …}} is understood")
    return flat


@contextmanager
def parameters_noted(params: Any) -> Iterator[None]:
    """Exceptions that pass get a note with the parameters of the trial, once.

    Args:
        params: the parameters, whatever they are.

    Yields:
        Nothing.

    Example:
        >>> try:
        ...     with parameters_noted({"ratio:0": 0.5}), parameters_noted({"ratio:0": 0.5}):
        ...         raise ValueError("no luck")
        ... except ValueError as error:
        ...     error.__notes__
        ["parameters of the trial: {'ratio:0': 0.5}"]
    """
    try:
        yield
    except Exception as error:
        note = f"parameters of the trial: {dict(params) if isinstance(params, Mapping) else params!r}"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def _nni(domain: Domain) -> dict[str, Any]:
    if isinstance(domain, Choice):
        return {"_type": "choice", "_value": list(domain.values)}
    if isinstance(domain, Float):
        return {"_type": "loguniform" if domain.log else "uniform", "_value": [domain.low, domain.high]}
    if domain.log:
        return {"_type": "qloguniform", "_value": [domain.low, domain.high, 1]}
    return {"_type": "randint", "_value": [domain.low, domain.high + 1]}


def _suggested(trial: Any, name: str, domain: Domain) -> Any:
    if isinstance(domain, Choice):
        return trial.suggest_categorical(name, list(domain.values))
    kind: Literal["suggest_float", "suggest_int"] = "suggest_float" if isinstance(domain, Float) else "suggest_int"
    return getattr(trial, kind)(name, domain.low, domain.high, log=domain.log)


def _ray(tune: Any, domain: Domain) -> Any:
    if isinstance(domain, Choice):
        return tune.choice(list(domain.values))
    if isinstance(domain, Float):
        return (tune.loguniform if domain.log else tune.uniform)(domain.low, domain.high)
    return (tune.lograndint if domain.log else tune.randint)(domain.low, domain.high + 1)
