"""Operations without useful gradients that a classifier applies to what it computes of images."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from demur.classifier import Classifier

STEPS: Final = ("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside")
CHOICES: Final = ("argmax", "argmin", "topk", "kthvalue", "bucketize", "searchsorted")
COMPARISONS: Final = ("gt", "ge", "lt", "le", "eq", "ne")
OTHERS: Final = ("threshold", "floor_divide", "one_hot")

SUSPICIOUS: Final = frozenset((*STEPS, *CHOICES, *COMPARISONS, *OTHERS))
"""Names of torch's operations. Rectifiers, clamps, pooling and sorting have useful gradients. What
is computed of the images inside `torch.no_grad()` counts as the operation "no_grad".
"""

CALLERS: Final = frozenset(
    f"torch.{name}"
    for name in (
        *("_compile", "_dynamo.eval_frame", "_ops", "_tensor", "functional", "nn.functional"),
        *("overrides", "utils._python_dispatch"),
    )
)
"""Modules between an operation and the code that calls it."""

SHAPE_ALONE: Final = re.compile(r"new_\w+|\w+_like")
"""Operations whose result does not depend on the numbers in the tensor that they are given."""


def suspicious_operations(classifier: Classifier, images: Tensor) -> tuple[str, ...]:
    """Look for operations whose gradient is zero, missing or a stand-in.

    One forward pass is recorded, and the graph of its gradients is walked. An operation counts only
    if its input depends on the images: a mask of positions that is compared does not. Operations
    that demur's own defences call are left out: their gradients are tested.

    Parameters
    ----------
    classifier : Classifier
    images : Tensor of shape (N, C, H, W)
        One image is enough.

    Returns
    -------
    tuple of str
        Sorted names, such as "round", "topk", "to uint8", or "custom gradient NAME" for a
        `torch.autograd.Function` that demur did not write.

    Examples
    --------
    >>> import torch
    >>> class Rounded(torch.nn.Module):
    ...     def forward(self, images):
    ...         return torch.relu((10 * images).round().flatten(1))
    >>> suspicious_operations(Classifier(Rounded(), 2), torch.rand(1, 1, 1, 2))
    ('round',)
    """
    given = images.detach().clone().requires_grad_()
    recorder = _Recorder(given)
    with torch.enable_grad(), recorder, _Detachments(recorder):
        scores = classifier(given)
    found = recorder.found | set(_custom_gradients(scores))
    return tuple(sorted(found))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records suspicious operations on tensors that depend on some images.

    Whether a tensor depends on them is known by its memory: views share it. All these tensors are
    kept until the end, so that their memory is not used again.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()
        self.kept: list[Tensor] = []
        self.places: set[int] = set()
        self._keep(images)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        given = [one for one in tree_leaves((args, options)) if isinstance(one, Tensor)]
        depends = any(map(self.depends, given))
        result = func(*args, **options)
        name = str(func.name()).partition("::")[2].partition(".")[0]
        if depends and not SHAPE_ALONE.fullmatch(name):
            said = [_said(func, name, given, options, result)]
            said.append(None if torch.is_grad_enabled() else "no_grad")
            if any(said) and not _called_by_demur():
                self.found.update(filter(None, said))
            for one in tree_leaves(result):
                if isinstance(one, Tensor):
                    self._keep(one)
        return result

    def _keep(self, tensor: Tensor) -> None:
        place = _place(tensor)
        if place:
            self.kept.append(tensor)
            self.places.add(place)

    def depends(self, tensor: Tensor) -> bool:
        """Say whether a tensor was computed from the images."""
        return _place(tensor) in self.places


class _Detachments(TorchFunctionMode):
    """Records where code in Python detaches what depends on the images. Torch detaches tensors for
    its own purposes, too, so that the operation itself says nothing.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        detaches = getattr(func, "__name__", "") in ("detach", "detach_")
        if (
            detaches
            and args
            and self.recorder.depends(args[0])
            and args[0].requires_grad
            and not _called_by_demur()
        ):
            self.recorder.found.add("detach")
        return func(*args, **(kwargs or {}))


def _called_by_demur() -> bool:
    """Say whether code of demur itself, and no layer of torch, called the recorded operation."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name != __name__ and name not in CALLERS:
            return name.startswith("demur.")
        frame = frame.f_back
    return False


def _place(tensor: Tensor) -> int:
    """Give the address of a tensor's memory, or 0 if it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def _said(
    func: Any, name: str, given: Sequence[Tensor], options: Mapping[str, Any], result: Any
) -> str | None:
    """Name an operation if it is suspicious."""
    plain = name.strip("_")
    if func.namespace == "quantized":
        return f"quantized {plain}"
    if "quantize" in name:
        return plain.removesuffix("_cachemask")
    if plain == "div" and options.get("rounding_mode"):
        return "floor_divide"
    if name == "_to_copy" and given and given[0].is_floating_point():
        kind = result.dtype
        whole = not kind.is_floating_point and not kind.is_complex
        return f"to {str(kind).removeprefix('torch.')}" if whole else None
    return plain if plain in SUSPICIOUS else None


def _custom_gradients(scores: Tensor) -> Iterator[str]:
    """Name the gradients in the graph of the scores that a user wrote."""
    waiting: list[Any] = [scores.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [one for one, _ in node.next_functions]
        kind: Callable[..., Any] | None = getattr(node, "_forward_cls", None)
        if kind is not None and not kind.__module__.startswith(("demur.", "torch.")):
            yield f"custom gradient {kind.__name__[:60]}"
