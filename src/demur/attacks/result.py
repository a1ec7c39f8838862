"""What an attack gives back."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from demur.norms import Ball, per_image


@dataclass(frozen=True, eq=False, repr=False)
class AttackResult:
    """The result of an attack, in the order of the images, on their device.

    Attributes
    ----------
    images : Tensor of shape (N, C, H, W)
        The attacked image where `success`, else the clean image, bit for bit.
    success : Tensor of shape (N,), bool
        The goal is reached. This is checked again by a fresh float32 forward pass in other batches,
        of at most half the size; an image that was attacked alone is checked beside a copy of
        itself. An image that reaches the goal without a change counts as success (R9). With
        `keep_maximizing`, it says only whether the image with the largest loss reaches the goal: it
        may be False although another image in the ball, or the clean image, reaches it. Such a
        result is no measure of robustness.
    candidates : Tensor of shape (N, C, H, W)
        The best image that the attack tried, by success first and then by loss; with
        `keep_maximizing` by loss alone. It equals `images` where `success`. An attacker that cannot
        check its success would send it.
    distance : Tensor of shape (N,), float64
        Size of the change in the norm of the threat; infinite where the attack failed. Where a mask
        scales eps, it is the smallest eps that allows the change.
    forwards, backwards : Tensor of shape (N,), int64
        Passes that the attack spent on each image. The final check is not counted.
    zero_gradients : Tensor of shape (N,), int64
        Number of gradients that were zero or not finite. If they are many, the attack was blind
        (R14).
    """

    images: Tensor
    success: Tensor
    candidates: Tensor
    distance: Tensor
    forwards: Tensor
    backwards: Tensor
    zero_gradients: Tensor

    def __repr__(self) -> str:
        """Give one line, without the tensors."""
        succeeded = int(self.success.sum())
        middle = ""
        if succeeded:
            middle = f", median distance {float(self.distance[self.success].median()):.4g}"
        forwards = float(self.forwards.double().mean())
        backwards = float(self.backwards.double().mean())
        zero = int(self.zero_gradients.sum()) / max(1, int(self.backwards.sum()))
        blind = f", {zero:.0%} of them without a gradient" if zero >= 0.005 else ""
        return (
            f"{type(self).__name__}({succeeded} of {len(self.success)} succeeded{middle}; "
            f"{forwards:.0f} forwards and {backwards:.0f} backwards an image{blind})"
        )


def limited_to(result: AttackResult, ball: Ball, clean: Tensor) -> AttackResult:
    """Take back the successes and the candidates that are outside the ball: the clean image takes
    their place.
    """
    inside = result.success & ball.contains(result.images)
    allowed = ball.contains(result.candidates)
    return replace(
        result,
        images=torch.where(per_image(inside, clean), result.images, clean),
        candidates=torch.where(per_image(allowed, clean), result.candidates, clean),
        success=inside,
        distance=torch.where(inside, result.distance, torch.inf),
    )
