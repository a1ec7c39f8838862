"""Ways to wrap a classifier so that attacks meet what it really does: randomness averaged, and gradients where there are none."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from demur.classifier import Classifier, check_classifier
from demur.errors import DemurError


class _Expectation(nn.Module):
    def __init__(self, classifier: Classifier, draws: int) -> None:
        super().__init__()
        self.classifier, self.draws = classifier, draws

    def forward(self, images: Tensor) -> Tensor:
        total: Tensor = self.classifier(images)
        for _ in range(self.draws - 1):
            total = total + self.classifier(images)
        return total / self.draws


def expectation(classifier: Classifier, draws: int = 10) -> Classifier:
    """Wrap a randomised classifier: its scores become their mean over `draws` passes, each of which draws anew.

    Expectation over transformation (Athalye et al. 2018, sec. 4.3): attack the wrapped classifier, so that a gradient is one of
    the mean, and then score the original on the attacked images, several times. An attack counts one pass where `draws` were made.
    """
    if draws < 1:
        raise DemurError(f"expectation needs at least one draw, not {draws}.")
    check_classifier(classifier)
    return Classifier(_Expectation(classifier, draws), classifier.num_classes)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, exact: Callable[[Tensor], Tensor], stand_in: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(images)
        ctx.stand_in, kind = stand_in, images.device.type
        # Backwards no autocast is on: without it, half precision images would meet the stand-in's float32 weights.
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return exact(images)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (images,) = ctx.saved_tensors
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            images = images.detach().requires_grad_()
            result = ctx.stand_in(images)
            (gradient,) = torch.autograd.grad(result, images, outputs[0].to(result.dtype))
        return gradient, None, None


class StraightThrough(nn.Module):
    """Compute `module` forwards, and differentiate `stand_in` (the identity if None) in its place backwards.

    Backward pass differentiable approximation (Athalye et al. 2018, sec. 4.1), for a part of a network that has no useful
    gradient: rounding, a JPEG codec, a median. Build the attacked classifier with it where the defended one has the module itself.
    """

    def __init__(self, module: Callable[[Tensor], Tensor], stand_in: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.exact, self.stand_in = module, stand_in

    def forward(self, images: Tensor) -> Tensor:
        """What the module gives, exactly."""
        given: Tensor = _Through.apply(images, self._exactly, self.stand_in or nn.Identity())
        return given

    def _exactly(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.exact(images)
