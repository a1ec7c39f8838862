"""What `demur harden` is asked for: names of defences, in order, and settings of them."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Final, get_type_hints

from demur.commands.harden_steps import Confidence, Consistency, Deep, Single, Step
from demur.commands.harden_tuning import Adversarial, Background, Gaussian, Localized, Median
from demur.errors import DemurError, unknown

STEPS: Final[Mapping[str, type[Step]]] = {
    kind.name: kind
    for kind in (
        *(Confidence, Consistency, Single, Deep),
        *(Background, Adversarial, Localized, Gaussian, Median),
    )
}
TRUE_FALSE: Final = {"true": True, "false": False}


def chosen_steps(names: Sequence[str], settings: Mapping[str, Any]) -> tuple[Step, ...]:
    """Make the steps, the innermost first.

    Parameters
    ----------
    names : sequence of str
        Names of `STEPS`.
    settings : mapping
        By ``KEY``, or ``NAME.KEY`` where several of the defences have the setting. Values are those
        of the setting's type, or texts.

    Raises
    ------
    DemurError
        For an unknown name or setting, a value of another type, or an order that cannot work.

    Examples
    --------
    >>> chosen_steps(["gaussian-blur"], {"sigma": "1.5"})[0].sigma
    1.5
    """
    if isinstance(names, str):
        names = [names]
    if not names:
        raise DemurError(f"name at least one defence, --with NAME: {', '.join(STEPS)}.")
    for name in names:
        if name not in STEPS:
            raise unknown("defence", name, STEPS)
    repeated = next((one for one in names if list(names).count(one) > 1), None)
    if repeated:
        raise DemurError(f"{repeated} is named twice.")
    _check_order(names)
    steps = [STEPS[name]() for name in names]
    for key, value in settings.items():
        place, name = _place(key, steps)
        steps[place] = replace(steps[place], **{name: _typed(steps[place], name, value)})
    return tuple(steps)


def _check_order(names: Sequence[str]) -> None:
    """What trains the network comes before what rejects by a fixed network."""
    fixed = ""
    rejecting = ""
    for name in names:
        if rejecting and name in (Confidence.name, Consistency.name, Background.name):
            raise DemurError(
                f"{name} is for a model without a reject column, and {rejecting} adds one: choose "
                "one of them, or combine neural rejections."
            )
        rejecting = name if STEPS[name].rejects else rejecting
        if not STEPS[name].trains:
            fixed = name
        elif fixed:
            raise DemurError(
                f"{name} trains the network, and {fixed} is fitted to a trained one: "
                f"write --with {name} before --with {fixed}."
            )


def _place(key: str, steps: Sequence[Step]) -> tuple[int, str]:
    """Find the step that a setting belongs to."""
    owner, dot, name = key.rpartition(".")
    if dot and owner not in {step.name for step in steps}:
        raise unknown("defence of a setting", owner, [step.name for step in steps])
    places = [
        place
        for place, step in enumerate(steps)
        if (not dot or step.name == owner) and name in {one.name for one in fields(step)}
    ]
    if len(places) > 1:
        ways = " or ".join(f"{steps[place].name}.{name}" for place in places)
        raise DemurError(f"{name} is a setting of several defences: write {ways}.")
    if not places:
        known = [f"{step.name}.{one.name}" for step in steps for one in fields(step)]
        raise unknown("setting", key, known)
    return places[0], name


def _typed(step: Step, name: str, value: Any) -> Any:
    """Give a value in the type of the setting."""
    wanted = get_type_hints(type(step))[name]
    kinds = (str, float) if wanted == str | float else (wanted,)
    if bool in kinds:
        value = TRUE_FALSE.get(str(value).lower(), value)
        if isinstance(value, bool):
            return value
    if float in kinds or int in kinds:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = None
        if number is not None and not isinstance(value, bool):
            if float in kinds:
                return number
            if number.is_integer():
                return int(number)
    if str in kinds and isinstance(value, str):
        return value
    kind = " or ".join(one.__name__ for one in kinds)
    raise DemurError(f"{step.name}.{name} must be {kind}, not {value!r}.")
