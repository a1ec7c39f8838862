"""How much the self-tests of a profile spend."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """The images and draws of the self-tests.

    Parameters
    ----------
    binarization : (int, int)
        Images, and inner points of each.
    noise : (int, int)
        Draws, and images.
    stability : (int, int)
        Draws, and images.
    doubling : int
        Images of the doubled attack, of the attack on the twin, and of the path of one attack.
    """

    binarization: tuple[int, int]
    noise: tuple[int, int]
    stability: tuple[int, int]
    doubling: int
