"""Several tests at once."""

from collections.abc import Sequence

from demur.errors import DemurError


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests, so that all their errors together stay rare.

    Holm 1979, "A simple sequentially rejective multiple test procedure". Take the tests with an
    adjusted p-value of at most alpha as positive. Then the probability of any false positive is at
    most alpha, whatever the dependence of the tests.

    Parameters
    ----------
    p_values : sequence of float in [0, 1]
        One for each test.

    Returns
    -------
    list of float
        The adjusted p-values, in the same order.

    Raises
    ------
    DemurError
        If a value is out of range.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    if not all(0 <= one <= 1 for one in p_values):
        raise DemurError(f"p-values must be in [0, 1], got {list(p_values)}.")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda one: p_values[one])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
