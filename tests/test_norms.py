import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from demur import DemurError
from demur.attacks import regions, round_towards, sizes
from demur.attacks.norms import BALLS, L0, L1, L2, Linf
from models import images_of

shapes = st.tuples(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 6), st.integers(1, 6))
eps_values = st.one_of(st.sampled_from([0.0, 1e-30, 1e-7, 1e-3, 0.1, 8 / 255, 1.0, 50.0]), st.floats(0, 3))


@st.composite
def balls(draw):
    shape, seed = draw(shapes), draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(shape, generator=generator)
    if draw(st.booleans()):
        clean = clean.round()  # binary images: all pixels at a bound
    kind = draw(st.sampled_from(list(BALLS.values())))
    region = None
    if draw(st.booleans()):
        region = torch.rand(shape, generator=generator)
        region = region * (region > 0.3) if kind is Linf else (region > 0.5).float()
    eps = torch.full((shape[0],), draw(eps_values), dtype=torch.float64)
    return kind(clean, eps, region), generator


@settings(max_examples=300)
@given(balls())
def test_what_is_confined_is_allowed_and_stays_allowed_in_8_bits(ball_and_generator):
    """R1: within eps to 1e-6 relative, in [0, 1], and the clean image bit for bit where the region is 0."""
    ball, generator = ball_and_generator
    for spread in (0.01, 10):
        moved = ball.confine(ball.clean + spread * torch.randn(ball.clean.shape, generator=generator))
        assert bool(ball.inside(moved).all())
        if ball.region is not None:
            assert torch.equal(moved[ball.region == 0], ball.clean[ball.region == 0])
        assert bool(ball.inside(ball.confine(moved)).all())
    drawn = ball.random(list(range(len(ball.clean))), 0, "test")
    assert drawn.dtype == ball.clean.dtype and bool(ball.inside(drawn).all())
    assert torch.equal(ball.confine(ball.clean), ball.clean)


@settings(max_examples=100)
@given(st.integers(0, 999), st.sampled_from(["linf", "l2"]), st.floats(0, 2))
def test_rounding_towards_the_clean_image_never_leaves_the_ball(seed, norm, eps):
    """R1 on the stored array."""
    clean = images_of(3, seed=seed)
    region = (images_of(3, seed=seed + 1) > 0.5).float()
    ball = BALLS[norm](clean, torch.full((3,), eps, dtype=torch.float64), region)
    moved = ball.confine(clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)))
    stored = round_towards(moved, clean)
    assert bool(ball.inside(stored.float() / 255).all())
    assert torch.equal(round_towards(clean, clean), (clean * 255).round().to(torch.uint8))


@pytest.mark.parametrize("levels", [1, 2, 8, 16])
def test_what_was_moved_by_whole_levels_keeps_them_all_when_stored(levels):
    """R1 on stored images, and no less than eps: what is moved as far as it may loses no level to float32's rounding."""
    clean = (torch.arange(256).float() / 255).view(1, 1, 16, 16).repeat(2, 1, 1, 1)
    signs = torch.stack([torch.ones(1, 16, 16), -torch.ones(1, 16, 16)])
    ball = BALLS["linf"](clean, torch.full((2,), levels / 255, dtype=torch.float64), None)
    moved = ball.confine(clean + signs * 2 * levels / 255)
    expected = (torch.arange(256).view(1, 1, 16, 16) + levels * signs.long()).clamp(0, 255).to(torch.uint8)
    assert torch.equal(round_towards(moved, clean), expected)


def test_a_ball_that_allows_what_it_should_not_is_seen():
    """Negative control: `inside` must catch each kind of violation."""
    clean = torch.full((1, 1, 2, 2), 0.5)
    region = torch.tensor([[[[0.0, 1.0], [1.0, 1.0]]]])
    for kind in (Linf, L2, L1):
        ball = kind(clean, torch.tensor([0.1], dtype=torch.float64), region)
        for moved in (clean + 0.2, clean + torch.tensor([[1e-7, 0], [0, 0]]), clean * torch.nan, clean + torch.tensor([[0, 0.6], [0, 0]])):
            assert not ball.inside(moved).any()


def test_steps_ascend_a_linear_function_as_fast_as_the_norm_allows():
    gradient = torch.tensor([[[[3.0, -4.0], [0.0, 12.0]]]])
    clean, eps = torch.full((1, 1, 2, 2), 0.5), torch.tensor([1.0], dtype=torch.float64)
    assert torch.equal(Linf(clean, eps, None).ascent(gradient), gradient.sign())
    assert torch.allclose(L2(clean, eps, None).ascent(gradient), gradient / 13)
    region = torch.tensor([[[[1.0, 1.0], [1.0, 0.0]]]])
    assert torch.allclose(L2(clean, eps, region).ascent(gradient), gradient * region / 5)
    assert torch.equal(Linf(clean, eps, 0.5 * region).ascent(gradient), gradient.sign() * 0.5 * region)


@pytest.mark.parametrize("scale", [1e-30, 1e-42, 1e30])
def test_tiny_and_huge_gradients_still_give_a_step_of_size_1(scale):
    gradient = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]]]]) * scale
    step = L2(torch.zeros(1, 1, 2, 2), torch.ones(1, dtype=torch.float64), None).ascent(gradient)
    assert torch.allclose(step, torch.full_like(step, 0.5)) or not gradient.any()


def test_a_zero_gradient_gives_no_step():
    zero = torch.zeros(2, 1, 2, 2)
    for kind in BALLS.values():
        assert not kind(zero, torch.ones(2, dtype=torch.float64), None).ascent(zero).any()


def test_projection_on_l2_is_the_nearest_allowed_point_when_the_box_does_not_bind():
    clean = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64)
    delta = torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.2
    ball = L2(clean, torch.tensor([0.1], dtype=torch.float64), None)
    assert torch.allclose(ball.confine(clean + delta) - clean, delta / delta.norm() * 0.1)


@settings(max_examples=60)
@given(st.integers(0, 999), st.floats(0.01, 4))
def test_projection_on_l1_is_the_nearest_allowed_point(seed, eps):
    """Against scipy: the same problem as a quadratic programme, box and all."""
    clean = images_of(1, size=3, seed=seed).double()
    wanted = clean + torch.randn(clean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ours = (L1(clean, torch.tensor([eps], dtype=torch.float64), None).confine(wanted) - clean).flatten().numpy()
    delta, start = (wanted - clean).flatten().numpy(), clean.flatten().numpy()
    signs = np.sign(delta)  # the nearest point never moves a pixel the other way
    found = minimize(
        lambda size: ((signs * size - delta) ** 2).sum(),
        np.zeros(9),
        jac=lambda size: 2 * signs * (signs * size - delta),
        bounds=[(0, 1 - x if s > 0 else x) for x, s in zip(start, signs, strict=True)],
        constraints={"type": "ineq", "fun": lambda size: eps - size.sum(), "jac": lambda size: -np.ones(9)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert np.abs(ours).sum() <= eps * (1 + 1e-6)
    assert ((ours - delta) ** 2).sum() <= found.fun + 1e-7


def test_projection_on_l0_keeps_the_pixels_that_change_most():
    clean = torch.full((1, 3, 2, 2), 0.5)
    change = torch.tensor([[0.1, 0.3], [-0.4, 0.0]]).expand(1, 3, 2, 2)
    moved = L0(clean, torch.tensor([2.0], dtype=torch.float64), None).confine(clean + change)
    assert torch.equal(moved, clean + torch.tensor([[0.0, 0.3], [-0.4, 0.0]]))


def test_an_l1_step_leaves_out_what_the_box_holds_back():
    gradient = torch.tensor([[[[3.0, 5.0], [-1.0, 2.0]]]])
    at = torch.tensor([[[[0.5, 1.0], [0.5, 0.5]]]])
    step = L1(torch.zeros(1, 1, 2, 2), torch.ones(1, dtype=torch.float64), None).ascent(gradient, at)
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


def test_regions_boxes_and_complements():
    box = regions.centre_box((6, 8), 2, 4)
    assert box.shape == (1, 1, 6, 8) and float(box.sum()) == 8 and bool((box[..., 2:4, 2:6] == 1).all())
    assert torch.equal(regions.outside(box) + box, torch.ones_like(box))
    assert not regions.inside_box((4, 4), 1, 1, 0, 2).any()
    with pytest.raises(DemurError, match="does not lie"):
        regions.inside_box((4, 4), 2, 2, 3, 1)


@pytest.mark.parametrize("region", [torch.ones(3, 3), torch.full((8, 8), 1.1), torch.full((8, 8), torch.nan), -torch.ones(8, 8)])
def test_bad_regions_are_refused(region):
    with pytest.raises(DemurError, match="region"):
        regions.check_region(region, images_of(2))


def test_a_fractional_region_is_for_linf_only():
    with pytest.raises(DemurError, match="mask"):
        L2(images_of(1), torch.ones(1, dtype=torch.float64), torch.full((1, 1, 8, 8), 0.5))


def test_a_draw_where_nothing_may_change_is_the_clean_image():
    """R1: a region of zeros leaves no direction to draw (one pixel once gave 0 times infinity)."""
    for shape in ((2, 1, 1, 1), (2, 3, 4, 4)):
        clean = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        for kind in BALLS.values():
            ball = kind(clean, torch.full((2,), 3.0, dtype=torch.float64), torch.zeros(shape))
            assert torch.equal(ball.random([0, 1], 0, "test"), clean)
