"""What norms allow, and where they step. R1, R10."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from demur import DemurError
from demur.attacks import masks, quantize_towards, sizes
from demur.norms import BALLS, L0, L1, L2, Linf
from models import images_of

shapes = st.tuples(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 6), st.integers(1, 6))
eps_values = st.one_of(
    st.sampled_from([0.0, 1e-30, 1e-7, 1e-3, 0.1, 8 / 255, 1.0, 50.0]), st.floats(0, 3)
)


@st.composite
def balls(draw):
    shape, seed = draw(shapes), draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(shape, generator=generator)
    if draw(st.booleans()):
        clean = clean.round()  # binary images: all pixels at a bound
    kind = draw(st.sampled_from(list(BALLS.values())))
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(shape, generator=generator)
        mask = mask * (mask > 0.3) if kind is Linf else (mask > 0.5).float()
    eps = torch.full((shape[0],), draw(eps_values), dtype=torch.float64)
    return kind(clean, eps, mask), generator


@settings(max_examples=300)
@given(balls())
def test_projections_and_draws_are_allowed(ball_and_generator):
    """R1: within eps to 1e-6 relative, in [0, 1], and the clean image bit for bit where the mask is
    0.
    """
    ball, generator = ball_and_generator
    for spread in (0.01, 10):
        moved = ball.project(
            ball.clean + spread * torch.randn(ball.clean.shape, generator=generator)
        )
        assert bool(ball.contains(moved).all())
        if ball.mask is not None:
            assert torch.equal(moved[ball.mask == 0], ball.clean[ball.mask == 0])
        assert bool(ball.contains(ball.project(moved)).all())
        change = moved.double() - ball.clean.double()
        assert bool((ball.size(change) <= ball.eps * (1 + 1e-6)).all())
    drawn = ball.random(list(range(len(ball.clean))), 0, "test")
    assert drawn.dtype == ball.clean.dtype and bool(ball.contains(drawn).all())
    assert torch.equal(ball.project(ball.clean), ball.clean)


@settings(max_examples=100)
@given(st.integers(0, 999), st.sampled_from(["linf", "l2"]), st.floats(0, 2))
def test_rounding_towards_the_clean_image_never_leaves_the_ball(seed, norm, eps):
    """R1 on the stored array."""
    clean = images_of(3, seed=seed)
    mask = (images_of(3, seed=seed + 1) > 0.5).float()
    ball = BALLS[norm](clean, torch.full((3,), eps, dtype=torch.float64), mask)
    moved = ball.project(
        clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    )
    stored = quantize_towards(moved, clean)
    assert bool(ball.contains(stored.float() / 255).all())
    assert torch.equal(quantize_towards(clean, clean), (clean * 255).round().to(torch.uint8))


@pytest.mark.parametrize("levels", [1, 2, 8, 16])
def test_a_change_of_whole_levels_keeps_them_all_when_stored(levels):
    """R1 on stored images, and no less than eps: float32 rounding costs no level where a pixel is
    moved by exactly eps.
    """
    clean = (torch.arange(256).float() / 255).view(1, 1, 16, 16).repeat(2, 1, 1, 1)
    signs = torch.stack([torch.ones(1, 16, 16), -torch.ones(1, 16, 16)])
    ball = BALLS["linf"](clean, torch.full((2,), levels / 255, dtype=torch.float64), None)
    moved = ball.project(clean + signs * 2 * levels / 255)
    expected = (
        (torch.arange(256).view(1, 1, 16, 16) + levels * signs.long()).clamp(0, 255).to(torch.uint8)
    )
    assert torch.equal(quantize_towards(moved, clean), expected)


def test_an_eps_just_below_a_level_is_kept_when_stored_if_it_is_given():
    """R1: 8 / 255 would exceed .0313725 by 1.6e-6 of it."""
    eps = 0.0313725
    clean = torch.full((1, 1, 1, 1), 100 / 255)
    ball = BALLS["linf"](clean, torch.tensor([eps], dtype=torch.float64), None)
    moved = ball.project(clean + 1)
    for limit, level in ((None, 108), (eps, 107), (torch.tensor([[[[eps]]]]), 107)):
        stored = quantize_towards(moved, clean, limit)
        assert stored.item() == level
        assert bool(ball.contains(stored.double() / 255)) == (level == 107)


def test_contains_sees_each_kind_of_violation():
    """Negative control of the checks above."""
    clean = torch.full((1, 1, 2, 2), 0.5)
    mask = torch.tensor([[[[0.0, 1.0], [1.0, 1.0]]]])
    for kind in (Linf, L2, L1):
        ball = kind(clean, torch.tensor([0.1], dtype=torch.float64), mask)
        for moved in (
            clean + 0.2,
            clean + torch.tensor([[1e-7, 0], [0, 0]]),
            clean * torch.nan,
            clean + torch.tensor([[0, 0.6], [0, 0]]),
        ):
            assert not ball.contains(moved).any()


def test_steps_ascend_a_linear_function_as_fast_as_the_norm_allows():
    gradient = torch.tensor([[[[3.0, -4.0], [0.0, 12.0]]]])
    clean, eps = torch.full((1, 1, 2, 2), 0.5), torch.tensor([1.0], dtype=torch.float64)
    assert torch.equal(Linf(clean, eps, None).steepest_step(gradient), gradient.sign())
    assert torch.allclose(L2(clean, eps, None).steepest_step(gradient), gradient / 13)
    mask = torch.tensor([[[[1.0, 1.0], [1.0, 0.0]]]])
    assert torch.allclose(L2(clean, eps, mask).steepest_step(gradient), gradient * mask / 5)
    assert torch.equal(
        Linf(clean, eps, 0.5 * mask).steepest_step(gradient), gradient.sign() * 0.5 * mask
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-42, 1e30])
def test_tiny_and_huge_gradients_still_give_a_step_of_size_1(scale):
    gradient = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]]]]) * scale
    step = L2(torch.zeros(1, 1, 2, 2), torch.ones(1, dtype=torch.float64), None).steepest_step(
        gradient
    )
    assert torch.allclose(step, torch.full_like(step, 0.5)) or not gradient.any()


def test_a_zero_gradient_gives_no_step():
    zero = torch.zeros(2, 1, 2, 2)
    for kind in BALLS.values():
        assert not kind(zero, torch.ones(2, dtype=torch.float64), None).steepest_step(zero).any()


def test_projection_on_l2_is_the_nearest_allowed_point_when_the_box_does_not_bind():
    clean = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64)
    delta = (
        torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        * 0.2
    )
    ball = L2(clean, torch.tensor([0.1], dtype=torch.float64), None)
    assert torch.allclose(ball.project(clean + delta) - clean, delta / delta.norm() * 0.1)


@settings(max_examples=60)
@given(st.integers(0, 999), st.floats(0.01, 4))
def test_projection_on_l1_is_the_nearest_allowed_point(seed, eps):
    """Against scipy: the same problem as a quadratic programme, with the box."""
    clean = images_of(1, size=3, seed=seed).double()
    wanted = clean + torch.randn(
        clean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    ours = (
        (L1(clean, torch.tensor([eps], dtype=torch.float64), None).project(wanted) - clean)
        .flatten()
        .numpy()
    )
    delta, start = (wanted - clean).flatten().numpy(), clean.flatten().numpy()
    signs = np.sign(delta)  # the nearest point never moves a pixel the other way
    found = minimize(
        lambda size: ((signs * size - delta) ** 2).sum(),
        np.zeros(9),
        jac=lambda size: 2 * signs * (signs * size - delta),
        bounds=[(0, 1 - x if s > 0 else x) for x, s in zip(start, signs, strict=True)],
        constraints={
            "type": "ineq",
            "fun": lambda size: eps - size.sum(),
            "jac": lambda size: -np.ones(9),
        },
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert np.abs(ours).sum() <= eps * (1 + 1e-6)
    assert ((ours - delta) ** 2).sum() <= found.fun + 1e-7


def test_projection_on_l0_keeps_the_pixels_that_change_most():
    clean = torch.full((1, 3, 2, 2), 0.5)
    change = torch.tensor([[0.1, 0.3], [-0.4, 0.0]]).expand(1, 3, 2, 2)
    moved = L0(clean, torch.tensor([2.0], dtype=torch.float64), None).project(clean + change)
    assert torch.equal(moved, clean + torch.tensor([[0.0, 0.3], [-0.4, 0.0]]))


def test_an_l1_step_leaves_out_what_the_box_holds_back():
    gradient = torch.tensor([[[[3.0, 5.0], [-1.0, 2.0]]]])
    at = torch.tensor([[[[0.5, 1.0], [0.5, 0.5]]]])
    step = L1(torch.zeros(1, 1, 2, 2), torch.ones(1, dtype=torch.float64), None).steepest_step(
        gradient, at
    )
    assert torch.equal(step, torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]))


def test_sizes_count_pixels_not_channels_and_agree_with_numpy():
    clean = torch.zeros(1, 3, 2, 2)
    moved = clean.clone()
    moved[0, :, 0, 0] = torch.tensor([0.3, 0.0, 0.4])
    moved[0, 1, 1, 1] = 0.5
    found = {name: float(size) for name, size in sizes(clean, moved).items()}
    assert found == pytest.approx({"l0": 2, "l1": 1.2, "l2": (0.25 + 0.25) ** 0.5, "linf": 0.5})


def test_random_draws_of_an_image_do_not_depend_on_its_neighbours():
    """R10."""
    clean = images_of(3)
    for kind in BALLS.values():
        eps = torch.full((3,), 3 if kind is L0 else 0.3, dtype=torch.float64)
        together = kind(clean, eps, None).random([7, 8, 9], 5, 0)
        alone = kind(clean[1:2], eps[:1], None).random([8], 5, 0)
        assert torch.equal(together[1:2], alone)
        assert not torch.equal(together, kind(clean, eps, None).random([7, 8, 9], 6, 0))


def test_masks_boxes_and_complements():
    box = masks.centre_box((6, 8), 2, 4)
    assert box.shape == (1, 1, 6, 8)
    assert float(box.sum()) == 8
    assert bool((box[..., 2:4, 2:6] == 1).all())
    assert torch.equal(masks.outside(box) + box, torch.ones_like(box))
    assert not masks.inside_box((4, 4), 1, 1, 0, 2).any()
    with pytest.raises(DemurError, match="does not lie"):
        masks.inside_box((4, 4), 2, 2, 3, 1)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(3, 3), torch.full((8, 8), 1.1), torch.full((8, 8), torch.nan), -torch.ones(8, 8)],
)
def test_bad_masks_are_refused(mask):
    with pytest.raises(DemurError, match="mask"):
        masks.check_mask(mask, images_of(2))


def test_a_mask_may_be_of_integers_or_flags_and_of_every_shape_that_broadcasts():
    images = images_of(2, channels=3)
    whole = torch.ones_like(images)
    for mask in (1, torch.ones(8, 8, dtype=torch.bool), torch.ones(2, 1, 1, 1, dtype=torch.int64)):
        assert torch.equal(masks.check_mask(mask, images), whole)
    assert masks.check_mask(None, images) is None


def test_a_fractional_mask_is_for_linf_only():
    half = torch.full((1, 1, 8, 8), 0.5)
    for kind in (L2, L1, L0):
        with pytest.raises(DemurError, match="only in Linf does a mask scale eps"):
            kind.check_mask(half)
        kind.check_mask(half.round())
        kind.check_mask(None)
    Linf.check_mask(half)


def test_where_a_mask_scales_eps_the_size_is_the_eps_that_allows_the_change():
    """R1: a change by 0.1 where the mask is 0.5 needs an eps of 0.2."""
    clean = torch.full((1, 1, 1, 3), 0.5, dtype=torch.float64)
    mask = torch.tensor([[[[0.5, 1.0, 0.0]]]], dtype=torch.float64)
    change = torch.tensor([[[[0.1, -0.15, 0.0]]]], dtype=torch.float64)
    ball = Linf(clean, torch.ones(1, dtype=torch.float64), mask)
    assert ball.size(change).tolist() == pytest.approx([0.2])
    assert Linf.measure(change).tolist() == pytest.approx([0.15])
    assert ball.with_eps(torch.tensor([0.2], dtype=torch.float64)).contains(clean + change).all()
    assert not ball.with_eps(torch.tensor([0.19], dtype=torch.float64)).contains(clean + change)


def test_a_selection_and_another_eps_give_the_ball_that_would_be_made_anew():
    clean = images_of(3)
    mask = (images_of(3, seed=1) > 0.3).float()
    eps = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    wild = clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([2, 0])
    for kind in BALLS.values():
        part = kind(clean, eps, mask).select(index)
        anew = kind(clean[index], eps[index], mask[index])
        assert torch.equal(part.project(wild[index]), anew.project(wild[index]))
        wider = kind(clean, eps, mask).with_eps(10 * eps)
        assert torch.equal(wider.project(wild), kind(clean, 10 * eps, mask).project(wild))


def test_the_largest_eps_allows_every_image():
    clean = images_of(4, levels=1)
    for kind in BALLS.values():
        eps = kind.largest(clean)
        assert torch.equal(kind(clean, eps, None).project(1 - clean), 1 - clean)
        assert kind(clean, eps, None).contains(1 - clean).all()


@pytest.mark.parametrize("least", [1e-6, 0.3])
def test_the_largest_eps_allows_every_image_where_a_mask_scales_it(least):
    """R12: without a limit, a pixel reaches 0 and 1 wherever the mask is above 0."""
    clean = images_of(4, levels=1)
    mask = torch.rand(clean.shape, generator=torch.Generator().manual_seed(0)).clamp(min=least)
    mask[:, :, 0, 0] = least
    mask[:, :, 1, 1] = 0
    mask[3] = 0
    ball = BALLS["linf"](clean, BALLS["linf"].largest(clean, mask), mask)
    moved = ball.project(1 - clean)
    assert torch.equal(moved, torch.where(mask > 0, 1 - clean, clean))
    assert ball.contains(moved).all()
    assert ball.contains(ball.random(range(4), 0, "test")).all()


def test_a_draw_where_nothing_may_change_is_the_clean_image():
    """R1: a mask of zeros leaves no direction to draw (one pixel once gave 0 times infinity)."""
    for shape in ((2, 1, 1, 1), (2, 3, 4, 4)):
        clean = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        for kind in BALLS.values():
            ball = kind(clean, torch.full((2,), 3.0, dtype=torch.float64), torch.zeros(shape))
            assert torch.equal(ball.random([0, 1], 0, "test"), clean)


def test_a_box_around_tiny_float64_pixels_keeps_eps():
    """R1: the sum of a pixel and eps is rounded too; its change must not exceed eps."""
    clean = torch.full((3, 1, 2, 2), 6e-16, dtype=torch.float64)
    eps = torch.full((3,), 1e-30, dtype=torch.float64)
    ball = Linf(clean, eps, None)
    for far in (torch.zeros_like(clean), torch.ones_like(clean)):
        change = ball.project(far) - clean
        assert bool((change.abs() <= 1e-30).all())
        assert bool(ball.contains(ball.project(far)).all())
