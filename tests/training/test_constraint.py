"""Multiplier, Lagrangian and Constraint: by hand, and against cooper-optim as an oracle."""

import json
import math

import cooper
import pytest
import torch
from cooper.optim import AlternatingDualPrimalOptimizer, SimultaneousOptimizer, nuPI
from cooper.optim.torch_optimizers.nupi_optimizer import nuPIInitType
from hypothesis import given, settings
from hypothesis import strategies as st

from attnprune.training.constraint import Constraint, Multiplier, lagrangian_weights

VIOLATIONS = [0.8, -0.3, 0.45, 0.45, -1.7, 2.5, 0.0, -0.2, 0.11, -4.0, -4.0, 3.0, 0.01, 0.6, -0.05]


def geco(**options):
    return Multiplier(update="geco", **options)


def pi(**options):
    return Multiplier(update="pi", **options)


# The update rules by hand


def test_geco_multiplies_by_the_exponential_of_the_smoothed_violation():
    multiplier = geco(value=2.0, rate=0.1, smoothing=0.75)
    assert multiplier.step(0.4) == pytest.approx(2 * math.exp(0.1 * 0.4))
    second = 0.75 * 0.4 + 0.25 * -0.8
    assert multiplier.step(-0.8) == pytest.approx(2 * math.exp(0.1 * 0.4) * math.exp(0.1 * second))
    assert multiplier.average == pytest.approx(second)


def test_pi_adds_the_violation_and_the_change_of_the_average():
    multiplier = pi(value=1.0, rate=0.1, gain=2.0, smoothing=0.5)
    assert multiplier.step(0.4) == pytest.approx(1.0 + 0.1 * 0.4)  # no change yet: the average starts at 0.4
    average = 0.5 * 0.4 + 0.5 * 0.8
    assert multiplier.step(0.8) == pytest.approx(1.04 + 0.1 * 0.8 + 2.0 * (average - 0.4))


def test_the_average_is_an_exponential_moving_average_that_starts_at_the_first_violation():
    multiplier = pi(smoothing=0.9, rate=0.01)
    expected = 0.5
    for violation in (0.5, -0.25, 0.125):
        expected = 0.9 * expected + 0.1 * violation if multiplier.average is not None else violation
        multiplier.step(violation)
        assert multiplier.average == pytest.approx(expected, abs=1e-15)


def test_no_smoothing_keeps_the_last_violation():
    multiplier = geco(smoothing=0.0)
    for violation in (0.5, -0.25):
        multiplier.step(violation)
        assert multiplier.average == violation


@pytest.mark.parametrize("make", [geco, pi])
def test_a_violation_raises_the_multiplier_and_slack_lowers_it(make):
    assert make(value=1.0).step(0.5) > 1.0
    assert make(value=1.0).step(-0.5) < 1.0
    assert make(value=1.0).step(0.0) == 1.0


@pytest.mark.parametrize("make", [geco, pi])
def test_the_multiplier_stays_within_its_limits_and_leaves_them_again(make):
    multiplier = make(value=1.0, rate=0.5, minimum=0.25, maximum=3.0, smoothing=0.0)
    for _ in range(20):
        multiplier.step(1.0)
    assert multiplier.value == 3.0
    assert multiplier.step(-1.0) < 3.0  # no wind-up beyond the limit
    for _ in range(20):
        multiplier.step(-1.0)
    assert multiplier.value == 0.25
    assert multiplier.step(1.0) > 0.25


@pytest.mark.parametrize("make", [geco, pi])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_observation_counts_at_most_clip(make, sign):
    clipped, exact = make(clip=0.25, smoothing=0.5, gain=1.0), make(clip=0.25, smoothing=0.5, gain=1.0)
    for violation in (0.1, 1e30):
        clipped.step(sign * violation)
    for violation in (0.1, 0.25):
        exact.step(sign * violation)
    assert clipped == exact
    assert make(clip=0.25).step(sign * 0.2) != make(clip=0.25).step(sign * 0.25)


@pytest.mark.parametrize("make", [geco, pi])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_violation_raises_and_changes_nothing(make, bad):
    multiplier = make(value=1.5, gain=0.5)
    for history in ((), (0.3, -0.2)):
        for violation in history:
            multiplier.step(violation)
        before = multiplier.state()
        with pytest.raises(FloatingPointError):
            multiplier.step(bad)
        assert multiplier.state() == before


@pytest.mark.parametrize("make", [geco, pi])
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_the_state_survives_json_and_continues_exactly(make, stop):
    multiplier = make(value=0.7, rate=0.037, gain=0.3, smoothing=0.83, minimum=1e-5, maximum=77.0, clip=2.0)
    for violation in VIOLATIONS[:stop]:
        multiplier.step(violation)
    restored = Multiplier(**json.loads(json.dumps(multiplier.state())))
    assert restored == multiplier
    for violation in VIOLATIONS[stop:]:
        assert restored.step(violation) == multiplier.step(violation)


@settings(deadline=None, database=None, derandomize=True)
@given(
    update=st.sampled_from(["geco", "pi"]),
    violations=st.lists(st.floats(-1e300, 1e300), max_size=30),
    rate=st.floats(1e-6, 10),
    gain=st.floats(0, 10),
    smoothing=st.floats(0, 1, exclude_max=True),
)
def test_any_finite_sequence_keeps_the_state_finite_and_within_its_limits(update, violations, rate, gain, smoothing):
    multiplier = Multiplier(update=update, rate=rate, gain=gain, smoothing=smoothing)
    for violation in violations:
        assert multiplier.step(violation) == multiplier.value
        assert multiplier.minimum <= multiplier.value <= multiplier.maximum
        assert -multiplier.clip * (1 + 1e-12) <= multiplier.average <= multiplier.clip * (1 + 1e-12)


# The PI update is cooper's nuPI optimizer: Ki = rate, Kp = gain, nu = smoothing, lr = 1, maximize, projected at zero.


def nupi_steps(value, rate, gain, smoothing, violations, init, first_average=None):
    parameter = torch.nn.Parameter(torch.tensor([value], dtype=torch.float64))
    gains = [torch.tensor(g, dtype=torch.float64) for g in (gain, rate)]
    optimizer = nuPI([parameter], lr=1.0, Kp=gains[0], Ki=gains[1], ema_nu=smoothing, init_type=init, maximize=True)
    if first_average is not None:
        optimizer.state[parameter]["xi"] = torch.full_like(parameter, first_average)
    values = []
    for violation in violations:
        parameter.grad = torch.tensor([violation], dtype=torch.float64)
        optimizer.step()
        with torch.no_grad():
            parameter.clamp_(min=0.0)  # what cooper's Multiplier.post_step_ does for an inequality
        values.append(parameter.item())
    return values


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("rate", "gain"), [(0.3, 0.0), (0.05, 1.5), (1.0, 1.0)])
def test_pi_equals_nupi_started_from_a_zero_average(rate, gain, smoothing):
    multiplier = pi(value=1.0, rate=rate, gain=gain, smoothing=smoothing, minimum=0.0, clip=math.inf, average=0.0)
    expected = nupi_steps(1.0, rate, gain, smoothing, VIOLATIONS, nuPIInitType.ZEROS)
    assert [multiplier.step(violation) for violation in VIOLATIONS] == pytest.approx(expected, abs=1e-12)
    assert 0.0 in expected  # the projection took part


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("rate", "gain"), [(0.3, 0.0), (0.05, 1.5), (1.0, 1.0)])
def test_pi_equals_nupi_with_its_documented_sgd_start(rate, gain, smoothing):
    # The paper and cooper's docstring start the average at e_0; cooper 1.0.1's code starts it at zero after a plain
    # first step. With its state set to the documented e_0 the two agree from the first step on.
    multiplier = pi(value=1.0, rate=rate, gain=gain, smoothing=smoothing, minimum=0.0, clip=math.inf)
    expected = nupi_steps(1.0, rate, gain, smoothing, VIOLATIONS, nuPIInitType.SGD, first_average=VIOLATIONS[0])
    assert [multiplier.step(violation) for violation in VIOLATIONS] == pytest.approx(expected, abs=1e-12)


def test_without_gain_pi_is_projected_gradient_ascent():
    multiplier = pi(value=1.0, rate=0.3, smoothing=0.9, minimum=0.0, clip=math.inf)
    expected = nupi_steps(1.0, 0.3, 0.0, 0.0, VIOLATIONS, nuPIInitType.SGD)
    assert [multiplier.step(violation) for violation in VIOLATIONS] == pytest.approx(expected, abs=1e-12)


# Convex problems: the same KKT points as cooper. Each problem maps x to (objective, violation <= 0).


def half_plane(x):
    """Minimise |x|^2 subject to x_0 + x_1 >= 1: x = (1/2, 1/2), multiplier 1."""
    return x.square().sum(), 1 - x.sum()


def slack_half_plane(x):
    """Minimise |x - 2|^2 subject to x_0 + x_1 >= 1: x = (2, 2), multiplier 0."""
    return (x - 2).square().sum(), 1 - x.sum()


def logistic(limit, relative):
    """Logistic regression on 60 overlapping points subject to |w|^2 <= limit, as in cooper's documentation."""
    generator = torch.Generator().manual_seed(3)
    labels = (torch.arange(60) % 2).double()
    inputs = torch.randn(60, 2, generator=generator, dtype=torch.float64) + (2 * labels[:, None] - 1)

    def problem(weights):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ weights, labels)
        norm = weights.square().sum()
        return loss, Constraint("loss", limit).violation(norm) if relative else norm - limit

    return problem


def lagrangian(*terms):
    return sum(weight * term for weight, term in zip(lagrangian_weights(terms[2]), terms[:2], strict=True))


def solve(problem, multiplier, steps, lr=0.1):
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=lr)
    for _ in range(steps):
        objective, violation = problem(x)
        optimizer.zero_grad()
        lagrangian(objective, violation, multiplier.value).backward()
        optimizer.step()
        multiplier.step(violation.item())
    return x.detach(), multiplier.value


def solve_with_cooper(problem, optimizer_class, dual_optimizer, steps):
    class Problem(cooper.ConstrainedMinimizationProblem):
        def __init__(self):
            super().__init__()
            self.only = cooper.Constraint(
                constraint_type=cooper.ConstraintType.INEQUALITY,
                formulation_type=cooper.formulations.Lagrangian,
                multiplier=cooper.multipliers.DenseMultiplier(num_constraints=1, dtype=torch.float64),
            )

        def compute_cmp_state(self):
            objective, violation = problem(x)
            state = cooper.ConstraintState(violation=violation.reshape(1))
            return cooper.CMPState(loss=objective, observed_constraints={self.only: state})

    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    cmp = Problem()
    optimizer = optimizer_class(cmp, torch.optim.SGD([x], lr=0.1), dual_optimizer(list(cmp.dual_parameters())))
    for _ in range(steps):
        optimizer.roll()
    return x.detach(), cmp.only.multiplier.weight.item()


def ascent(parameters):
    return torch.optim.SGD(parameters, lr=0.1, maximize=True)


def nupi(parameters):
    return nuPI(parameters, lr=0.1, Kp=2.0, Ki=1.0, ema_nu=0.5, maximize=True)


OURS = {
    "geco": lambda: geco(rate=0.1, smoothing=0.5),
    "pi": lambda: pi(rate=0.1, gain=0.2, smoothing=0.5, minimum=0.0),
}
THEIRS = {
    "simultaneous": (SimultaneousOptimizer, ascent),
    "alternating": (AlternatingDualPrimalOptimizer, ascent),
    "nupi": (SimultaneousOptimizer, nupi),
}


@pytest.fixture(scope="module", params=THEIRS)
def oracle(request):
    optimizer_class, dual_optimizer = THEIRS[request.param]
    return {
        "half-plane": solve_with_cooper(half_plane, optimizer_class, dual_optimizer, 600),
        "logistic": solve_with_cooper(logistic(0.5, relative=False), optimizer_class, dual_optimizer, 1000),
    }


@pytest.mark.parametrize("update", OURS)
def test_half_plane_reaches_the_kkt_point_of_cooper(update, oracle):
    x, value = solve(half_plane, OURS[update](), 1500)
    assert x.tolist() == pytest.approx([0.5, 0.5], abs=1e-2)
    assert value == pytest.approx(1.0, abs=1e-2)
    expected, expected_value = oracle["half-plane"]
    assert x.tolist() == pytest.approx(expected.tolist(), abs=1e-2)
    assert value == pytest.approx(expected_value, abs=1e-2)


@pytest.mark.parametrize("update", OURS)
def test_logistic_regression_reaches_the_kkt_point_of_cooper(update, oracle):
    x, value = solve(logistic(0.5, relative=False), OURS[update](), 2000)
    expected, expected_value = oracle["logistic"]
    assert expected_value > 0.05  # the constraint binds
    assert x.tolist() == pytest.approx(expected.tolist(), abs=1e-2)
    assert value == pytest.approx(expected_value, abs=1e-2)


@pytest.mark.parametrize("update", OURS)
def test_the_relative_violation_scales_the_multiplier_by_the_limit(update, oracle):
    x, value = solve(logistic(0.5, relative=True), OURS[update](), 2000)
    expected, expected_value = oracle["logistic"]
    assert x.tolist() == pytest.approx(expected.tolist(), abs=1e-2)
    assert value == pytest.approx(0.5 * expected_value, abs=1e-2)


@pytest.mark.parametrize("update", OURS)
def test_an_inactive_constraint_lets_the_multiplier_fall_to_its_minimum(update):
    multiplier = OURS[update]()
    x, value = solve(slack_half_plane, multiplier, 400)
    assert value == multiplier.minimum
    assert x.tolist() == pytest.approx([2.0, 2.0], abs=1e-2)


# Lagrangian and Constraint


@pytest.mark.parametrize("multiplier", [0.0, 1e-4, 0.5, 1.0, 30.0, 1e4])
def test_the_lagrangian_is_a_weighted_mean_of_its_gradients(multiplier):
    x = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    objective, violation = 3 * x[0], 5 * x[1] - 1
    lagrangian(objective, violation, multiplier).backward()
    share = multiplier / (1 + multiplier)
    assert x.grad.tolist() == pytest.approx([3 * (1 - share), 5 * share])


@pytest.mark.parametrize("multiplier", [0.0, 1.0, 1e4])
def test_the_gradient_keeps_its_scale_for_any_multiplier(multiplier):
    x = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    lagrangian(x.sum(), x.sum() - 5, multiplier).backward()
    assert x.grad.tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("kind", "expected"), [("loss", 0.25), ("kl", 0.5), ("density", 0.75)])
def test_each_kind_picks_its_quantity(kind, expected):
    assert Constraint(kind, 1.0).value(loss_gap=0.25, kl=0.5, density=0.75) == expected


@pytest.mark.parametrize("kind", ["loss", "kl", "density"])
@pytest.mark.parametrize("limit", [0.01, 0.05, 1.0])
def test_the_violation_is_relative_and_agrees_with_feasibility(kind, limit):
    constraint = Constraint(kind, limit)
    assert constraint.violation(limit) == 0
    assert constraint.violation(3 * limit) == pytest.approx(math.log(3) if kind == "density" else 2.0)
    assert constraint.violation(0.0) <= -1
    for value, feasible in ((0.0, True), (limit, True), (0.99 * limit, True), (1.01 * limit, False), (-limit, True)):
        assert constraint.feasible(value) is feasible
        assert (constraint.violation(value) <= 0) is feasible


def test_the_violation_of_a_tensor_keeps_its_gradient():
    value = torch.tensor(0.1, requires_grad=True)
    Constraint("kl", 0.05).violation(value).backward()
    assert value.grad.item() == pytest.approx(20.0)


def test_nan_is_never_feasible():
    assert not Constraint("kl", 0.05).feasible(math.nan)
