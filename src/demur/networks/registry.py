"""Registry of architectures: a network is rebuilt from a JSON description, without code from it."""

import json
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any, Final, ParamSpec, TypeVar, get_type_hints

from torch import nn

from demur.errors import DemurError, unknown
from demur.networks.heads import replace_head

LARGEST: Final = 1 << 16
"""No width, depth or size in a description is larger. Seeds are."""

P = ParamSpec("P")
N = TypeVar("N", bound=nn.Module)

BUILDERS: dict[str, Callable[..., nn.Module]] = {}
"""The registered builders, by function name."""


def register(builder: Callable[P, N]) -> Callable[P, N]:
    """Register a function that builds a network, and let its networks say how they were built.

    Parameters
    ----------
    builder : callable
        A function that returns a new network. Its arguments must be of JSON's types.

    Returns
    -------
    callable
        The same function. Each network that it returns has an attribute ``architecture``: a dict
        with the function's ``name`` and all of its ``arguments``. `build` takes it.

    Examples
    --------
    >>> from demur import networks
    >>> networks.localized_network(3, size=8).architecture["arguments"]
    {'num_outputs': 3, 'channels': 1, 'size': 8, 'seed': 0}
    """
    parameters = signature(builder)

    @wraps(builder)
    def build_and_describe(*args: P.args, **kwargs: P.kwargs) -> N:
        network = builder(*args, **kwargs)
        given = parameters.bind(*args, **kwargs)
        given.apply_defaults()
        arguments = json.loads(json.dumps(given.arguments, default=_python_number))
        architecture: Any = {"name": builder.__name__, "arguments": arguments}
        network.architecture = architecture
        return network

    BUILDERS[builder.__name__] = build_and_describe
    return build_and_describe


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """Rebuild a network from its description, with its initial weights.

    Parameters
    ----------
    architecture : mapping
        The attribute ``architecture`` of a network from one of `BUILDERS`, possibly read from JSON:
        ``{"name": str, "arguments": {...}}``, and perhaps ``"head"``, see `heads.replace_head`.
        Nothing in it is executed.

    Returns
    -------
    nn.Module
        A new network. Load trained weights with its ``load_state_dict``.

    Raises
    ------
    DemurError
        For a description of another form, an unknown name (the message offers the nearest), or
        arguments that the builder does not accept.

    Examples
    --------
    >>> from demur import networks
    >>> network = networks.dnr_cnn(10)
    >>> again = networks.build(network.architecture)
    >>> again.load_state_dict(network.state_dict())
    <All keys matched successfully>
    """
    keys = set(architecture) if isinstance(architecture, Mapping) else set()
    if keys - {"head"} != {"name", "arguments"}:
        raise DemurError("an architecture must be a mapping with the keys name and arguments.")
    name = architecture["name"]
    arguments = architecture["arguments"]
    if not isinstance(name, str) or name not in BUILDERS:
        raise unknown("architecture", str(name), BUILDERS)
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise DemurError(f"the arguments of the architecture {name} must be a mapping of names.")
    builder = BUILDERS[name]
    _check_types(name, builder, arguments)
    try:
        network = builder(**arguments)
        if "head" in architecture:
            replace_head(network, architecture["head"])
            described: Any = dict(architecture)
            network.architecture = described
        return network
    except DemurError:
        raise
    except Exception as error:  # a library's builder can fail with any error
        # The arguments may come from a stranger, and ask for more memory than there is.
        reason = " ".join(str(error).split())[:160]
        raise DemurError(f"the architecture {name} cannot be built: {reason}.") from error


def _check_types(
    name: str, builder: Callable[..., nn.Module], arguments: Mapping[str, Any]
) -> None:
    """Refuse what is no integer where one is wanted, no text where one is wanted, and numbers that
    are larger than those of any network.
    """
    hints = get_type_hints(builder)
    for key, value in arguments.items():
        wanted = hints.get(key)
        if wanted in (int, str) and type(value) is not wanted:
            kind = type(value).__name__
            raise DemurError(
                f"the architecture {name} needs {wanted.__name__} for {key}, not {kind}."
            )
        if key != "seed" and _largest(value) > LARGEST:
            raise DemurError(f"the architecture {name} has {key} above the limit of {LARGEST:,}.")


def _largest(value: Any) -> float:
    """Give the largest size of a number in a value."""
    if isinstance(value, Mapping):
        return max(map(_largest, value.values()), default=0)
    if isinstance(value, list | tuple):
        return max(map(_largest, value), default=0)
    return abs(value) if isinstance(value, int | float) else 0


def _python_number(value: Any) -> int | float:
    """A number of numpy or torch as one of Python, for JSON."""
    number: int | float = value.item()
    return number
