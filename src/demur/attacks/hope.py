"""When an attack gives up an image: the margin still lacks too much of what was gained so far.

Attacks gain most at the beginning. On three networks for MNIST (plain, adversarially trained,
certified-trained) at eleven sizes, runs of APGD that lacked more than half of their gain after 22 %
of their steps reached no image that another target did not reach, and of the searches of Square
that lacked so much after 20 % of their queries none succeeded. A linear extrapolation of the last
steps is no such rule: the margin stands still before a step size is halved, and rises afterwards.
"""

from torch import Tensor

from demur.errors import DemurError

MARGINS = ("margin", "scaled_margin")
HOPE = 0.5
"""The largest part of what was gained so far that may still be lacking."""


def hopeless(best: Tensor, clean: Tensor) -> Tensor:
    """Flag the images (n,) whose best margin lacks more than `HOPE` times what it gained.

    The gain is counted from the margin of the clean image; -inf stands for an endless gain.
    """
    return -best > HOPE * (best - clean).clamp(min=0)


def check_give_up(give_up: bool, loss: str, keep_maximizing: bool = False) -> None:
    """Raise DemurError if an attack cannot give up images: success must be at 0 of its loss."""
    if give_up and (loss not in MARGINS or keep_maximizing):
        raise DemurError(
            "give_up needs a margin as the loss, and does not go together with keep_maximizing."
        )
