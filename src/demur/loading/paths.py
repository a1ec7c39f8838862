"""Paths that a user gives."""

from pathlib import Path

from demur.data.messages import printable
from demur.errors import DemurError


def user_path(text: str | Path) -> Path:
    """Expand ``~``, and make sure that the system can look for the file.

    Parameters
    ----------
    text : str or path

    Returns
    -------
    Path
        It need not exist.

    Raises
    ------
    DemurError
        If the path is too long, or a folder in it may not be read.

    Examples
    --------
    >>> user_path("no/such/file").name
    'file'
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DemurError(
            f"{printable(text)} is no usable path: {printable(reason).rstrip('.')}."
        ) from error
    return path
