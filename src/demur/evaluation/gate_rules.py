"""The rules of a gate: limits for the figures of an audit, in a TOML file."""

from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from demur.data.messages import printable
from demur.errors import DemurError, unknown
from demur.evaluation.profiles import _faults
from demur.evaluation.records import OUTCOMES
from demur.threat import ThreatModel
from demur.untrusted import parse_toml

CLEAN: Final = "clean"
SEEKS_ERRORS: Final = ("none", "evade")
"""Goals of an audit for which a wrong answer is the worst outcome."""
PROVEN: Final = "proven"
"""The share of images that is proven at a threat."""
OTHER: Final = ("accepted_ood", "aurc")
"""Metrics without an attack, which need no threat."""
METRICS: Final = (*OUTCOMES, PROVEN, *OTHER)
Side = Literal["max", "min"]


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        said = f": write {value / 100:g} for {value:g} %" if 1 < value <= 100 else ""
        raise ValueError(f"{value:g} is no share in [0, 1]{said}")
    return value


def _metric(name: str) -> str:
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return name


def _threat(text: str) -> str:
    return str(threat_of(text) or CLEAN)


Share = Annotated[float, AfterValidator(_share)]
_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class Rule(BaseModel):
    """Limits of one share at one threat, or of a figure without an attack."""

    model_config = _STRICT
    metric: Annotated[str, AfterValidator(_metric)]
    threat: Annotated[str, AfterValidator(_threat)]
    goal: Literal["evade", "force-reject"] = "evade"
    max: Share | None = None
    min: Share | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_attack(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("metric") not in OTHER:
            return given
        if "threat" in given and given["threat"] != CLEAN:
            raise ValueError(f"{given['metric']} has no threat: leave the line out")
        return {**given, "threat": CLEAN}

    @model_validator(mode="after")
    def _limited(self) -> "Rule":
        if self.metric == PROVEN and (self.threat == CLEAN or self.goal != "evade"):
            raise ValueError("proven needs a threat with the goal evade, for example linf:8/255")
        if self.max is None and self.min is None:
            raise ValueError("it has no limit: add max or min, for example max = 0.35")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}: exchange them")
        return self

    @property
    def limits(self) -> list[tuple[Side, float]]:
        """The limits that the rule has."""
        both: list[tuple[Side, float | None]] = [("max", self.max), ("min", self.min)]
        return [(side, limit) for side, limit in both if limit is not None]


class BaselineRule(BaseModel):
    """The limit of the increase of wrong answers since an earlier audit."""

    model_config = _STRICT
    file: str = Field(min_length=1)
    max_increase: Annotated[Share, Field(lt=1)]
    if_not_found: Literal["error", "skip"] = "error"


class Rules(BaseModel):
    """The table `[gate]` of a rules file."""

    model_config = _STRICT
    confidence: float = Field(0.95, ge=0.5, lt=1)
    min_images: int = Field(0, ge=0)
    require_selftests: bool = True
    allow_doubtful: bool = True
    rule: list[Rule] = []
    baseline: BaselineRule | None = None

    @model_validator(mode="after")
    def _meaningful(self) -> "Rules":
        if not self.rule and self.baseline is None:
            raise ValueError("it has no rule: add [[gate.rule]] with metric, threat and max or min")
        seen = [(one.metric, key_of(one.threat, one.goal)) for one in self.rule]
        if twice := next((one for one in seen if seen.count(one) > 1), None):
            raise ValueError(f"two rules limit {twice[0]} at {twice[1]}: merge them into one")
        return self


class _File(BaseModel):
    model_config = _STRICT
    gate: Rules


def parse_rules(text: str) -> Rules:
    """Read the rules of a gate.

    Parameters
    ----------
    text : str
        TOML with the table `[gate]`.

    Returns
    -------
    Rules

    Raises
    ------
    DemurError
        If the text is no TOML, or a rule does not fit: all faults are named.

    Examples
    --------
    >>> from demur.evaluation.gate_rules import parse_rules
    >>> text = '[[gate.rule]]' + chr(10) + 'metric="wrong"' + chr(10) + 'threat="clean"'
    >>> parse_rules(text)
    Traceback (most recent call last):
    demur.errors.DemurError: gate.rule.0: it has no limit: add max or min, for example max = 0.35.
    """
    try:
        return _File.model_validate(parse_toml(text, "it")).gate
    except ValidationError as error:
        raise DemurError(f"{printable(_faults(error, _File), 1000)}.") from error


def threat_of(text: str) -> ThreatModel | None:
    """Read the threat of a rule or of an audit; None stands for the clean images."""
    try:
        return None if text.strip().lower() == CLEAN else ThreatModel.parse(text)
    except DemurError as error:
        raise DemurError(printable(error)) from error


def key_of(threat: str, goal: str) -> str:
    """Name a threat and a goal so that equal ones have equal names."""
    parsed = threat_of(threat)
    if parsed is None:
        return CLEAN
    return str(parsed) if goal in SEEKS_ERRORS else f"{parsed} ({printable(goal, 80)})"
