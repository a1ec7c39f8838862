"""The guard around a user's module: what it is given, what it answers, and what it raises."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from demur.errors import DemurError, ModuleError
from demur.hardware import changes_of

Probes = dict[tuple[int, bool, bool], bool]
"""Whether a module changes its input in place, by its id, its mode and whether gradients are on."""

_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
_LONGEST = 300


def answer_of(module: nn.Module, images: Tensor, probes: Probes) -> object:
    """Ask a module about images, which stay as they are.

    The first call of each kind gives the module a copy, and looks whether the copy was changed.
    Later calls copy only where it was. They look at the counter of changes that torch keeps.

    Parameters
    ----------
    module : nn.Module
    images : Tensor of shape (N, ...), floating point
        The module gets them in the precision of its first parameter.
    probes : Probes
        What is known of the module. The function adds to it.

    Returns
    -------
    object
        What the module returned.

    Raises
    ------
    ModuleError
        If the module raises an error, or changes images that it did not change before.
    """
    given = _in_precision(module, images)
    if torch.compiler.is_exporting():
        return module(given)
    if given is not images:
        return _asked(module, given)
    if torch.compiler.is_compiling():
        return module(images.clone())
    # A frozen TorchScript module has no mode.
    kind = (id(module), getattr(module, "training", False), torch.is_grad_enabled())
    before = changes_of(images)
    if before is None or probes.get(kind):
        return _asked(module, images.clone())
    if kind not in probes:
        copy = images.clone()
        untouched = changes_of(copy)
        answer = _asked(module, copy)
        # A change may leave these pixels the same, as clamp_ does, and the counter does not see
        # what numpy changes.
        equal = torch.equal(copy.detach(), images.detach())
        probes[kind] = not equal or changes_of(copy) != untouched
        return answer
    answer = _asked(module, images)
    if changes_of(images) != before:
        probes[kind] = True
        raise ModuleError(
            "the module changed its images in place, which it did not do before. From now on it "
            "gets copies: call it again, with the original images."
        )
    return answer


def table_of(answer: object, count: int, num_classes: int, rejects: bool | None) -> Tensor:
    """Check what a module returned.

    Parameters
    ----------
    answer : object
    count : int
        The number of images.
    num_classes : int
    rejects : bool or None
        Whether there is a reject column. None: with and without are right.

    Returns
    -------
    Tensor of shape (count, num_classes [+ 1])
        The scores, floating point.

    Raises
    ------
    ModuleError
        If the answer is no table of scores, of one row for each image.
    """
    if not isinstance(answer, Tensor):
        raise ModuleError(
            f"the module returned {type(answer).__name__} instead of a tensor of scores: wrap "
            "it in a module that returns the scores alone."
        )
    right = answer.ndim == 2 and len(answer) == count
    extra = answer.shape[1] - num_classes if right else -1
    if extra not in (0, 1) or (rejects is not None and extra != rejects):
        numbers = [num_classes, num_classes + 1] if rejects is None else [num_classes + rejects]
        allowed = " or ".join(f"({count}, {number})" for number in numbers)
        raise ModuleError(
            f"the module gave scores of shape {tuple(answer.shape)} for {count} images; a "
            f"classifier of {num_classes} classes with rejects={rejects} needs {allowed}."
        )
    if answer.is_floating_point() and answer.layout == torch.strided:
        return answer
    if answer.layout != torch.strided or answer.is_quantized or answer.is_complex():
        kind = f"{answer.dtype}, {answer.layout}"
        raise ModuleError(f"scores must be a dense tensor of real numbers, not {kind}.")
    return answer.float()


@contextmanager
def raising_module_errors(images: Tensor | None = None) -> Iterator[None]:
    """Inside, an error of a user's module becomes a ModuleError of one line.

    Parameters
    ----------
    images : Tensor, optional
        What the module is given, for the message.
    """
    try:
        yield
    except DemurError:
        raise
    except Exception as error:  # a module may fail with any error
        raise _explained(error, images) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is one of memory, on a GPU or on the CPU.

    Examples
    --------
    >>> is_out_of_memory(RuntimeError("CUDA out of memory.")), is_out_of_memory(ValueError())
    (True, False)
    """
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_MEMORY.search(str(error)))


def _in_precision(module: nn.Module, images: Tensor) -> Tensor:
    parameter = next(module.parameters(), None)
    if parameter is None or not parameter.is_floating_point() or not images.is_floating_point():
        return images
    return images.to(parameter.dtype)


def _asked(module: Callable[[Tensor], object], images: Tensor) -> object:
    # Not a context manager: this runs in every step of an attack.
    try:
        return module(images)
    except DemurError:
        raise
    except Exception as error:  # a module may fail with any error
        raise _explained(error, images) from error


def _explained(error: Exception, images: Tensor | None) -> ModuleError:
    if is_out_of_memory(error) and images is not None:
        return ModuleError(
            f"the memory does not suffice for {len(images)} images at once: use a smaller "
            "batch_size."
        )
    said = "".join(
        letter if letter.isprintable() else "?" for letter in " ".join(str(error).split())
    )
    where = ""
    if images is not None:
        kind = str(images.dtype).removeprefix("torch.")
        where = f" on {kind} images of shape {tuple(images.shape)}"
    reason = f"{type(error).__name__}: {said[:_LONGEST]}".rstrip(".: ")
    return ModuleError(f"the module failed{where}: {reason}.")
