"""Rules about causes on evidence made by hand: what is said, and where nothing is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lightning_gradguard.forensics.flow.evidence import Changed, Evidence
from lightning_gradguard.forensics.flow.explosion_causes import explosion_causes
from lightning_gradguard.forensics.flow.flow import Flow, Layer
from lightning_gradguard.forensics.flow.norm_history import usual_of
from lightning_gradguard.forensics.flow.report import culprit_of
from lightning_gradguard.forensics.flow.units import Units
from lightning_gradguard.forensics.flow.vanishing_causes import vanishing_causes
from lightning_gradguard.forensics.flow.weight_history import WeightGrowth

HISTORY = usual_of([1.0] * 32)
WRITTEN = WeightGrowth("net.weight", 100.0, 1.0, 20, update=30.0, reach=2.0, start=1.0)
FAST = WeightGrowth("net.weight", 2.0, 1.0, 20, update=0.5, reach=2.0, start=1.0)


def names(causes):
    """In a word each."""
    return [cause.name for cause in causes]


def step(**changes):
    """A step a hundred times as large as usual, whose healthy batch is as large on these weights."""
    return replace(Evidence(200, Flow(()), 100.0, healthy_norm=90.0, usual=HISTORY), **changes)


def chain(*norms, op="linear", role="weights", gain=1.0):
    """Layers one behind the other, with the gradient's norm at each."""
    layers = []
    for index, norm in enumerate(norms):
        before = (layers[-1],) if layers else ()
        layers.append(Layer(f"net.{index}", op, role, f"net.{index}.weight", gain=gain, before=before, grad_norm=norm))
    return layers


def test_weights_are_written_to_only_beyond_all_updates():
    """And then the rate is not blamed for what somebody else has moved."""
    assert names(explosion_causes(step(weight_growths=(WRITTEN,)))) == ["weights"]
    assert names(explosion_causes(step(weight_growths=(replace(WRITTEN, reach=100.0),)))) == ["rate"]
    assert names(explosion_causes(step(weight_growths=(replace(WRITTEN, reach=None),)))) == ["rate"]


def test_weights_that_a_healthy_batch_does_not_mind_are_not_the_cause():
    """The batch is."""
    evidence = step(healthy_norm=1.1, weight_growths=(WRITTEN,))
    assert names(explosion_causes(evidence)) == ["batch"]


def test_last_step_that_moved_more_than_the_update_is_said_with_its_part():
    """Where the norms of many steps say nothing."""
    (cause,) = explosion_causes(step(weight_growths=(replace(FAST, update=0.1, excess=0.05),)))
    assert cause.name == "weights"
    assert "by 0.05 of its norm, of which the optimizer's update does not explain 50%" in cause.message


def test_rate_is_blamed_only_where_the_healthy_batch_has_become_worse():
    """A step of a quarter of the weights alone is none."""
    assert names(explosion_causes(step(weight_growths=(FAST,)))) == ["rate"]
    assert explosion_causes(step(healthy_norm=None, weight_growths=(FAST,))) == ()
    assert explosion_causes(step(usual=None, weight_growths=(FAST,))) == ()


@pytest.mark.parametrize(("norm", "healthy", "expected"), [(100.0, 1.0, ["batch"]), (100.0, 20.0, []), (2.5, 0.1, [])])
def test_batch_is_blamed_where_it_explains_more_than_the_weights(norm, healthy, expected):
    """And where no healthy step had a gradient as large."""
    usual = usual_of([1.0] * 29 + [2.0] * 3)
    assert names(explosion_causes(step(norm=norm, healthy_norm=healthy, usual=usual))) == expected


def test_healthy_norm_of_zero_is_no_comparison():
    """It has underflowed."""
    assert explosion_causes(step(healthy_norm=0.0)) == ()


@pytest.mark.parametrize(("rest", "certain", "said"), [
    (1.5, (3,), "with another row in its place the norm is 1.5"),
    (90.0, (3,), "it is how the step treats this place"),
    (None, None, "row 3 alone probably makes 100% of it"),
])  # fmt: skip
def test_sample_is_certain_where_a_replay_without_it_was_run(rest, certain, said):
    """Else it is probable."""
    layer = Layer("net", "linear", "weights", grad_norm=1.0, rows=(0.1, 0.1, 0.1, 100.0))
    evidence = step(flow=Flow((layer,)), healthy_norm=1.0, norm_without_row=rest, is_place=True)
    (cause,) = explosion_causes(evidence)
    assert (cause.name, cause.samples) == ("sample", certain)
    assert cause.probable_samples == (None if certain else (3,))
    assert said in cause.message


def test_row_with_the_largest_part_is_not_the_cause_where_the_rest_is_as_bad():
    """A batch of large rows."""
    layer = Layer("net", "linear", "weights", grad_norm=1.0, rows=(50.0, 40.0, 30.0, 90.0))
    (cause,) = explosion_causes(step(flow=Flow((layer,)), healthy_norm=1.0, norm_without_row=70.0))
    assert cause.name == "batch"
    assert "and still 70 without row 3" in cause.message


@pytest.mark.parametrize(("changes", "is_foreign"), [
    ({}, True),
    ({"error": 0.05}, False),
    ({"norm": 5.0}, False),
    ({"is_same_forward": False}, False),
    ({"is_same_forward": None}, True),
])  # fmt: skip
def test_foreign_gradients_are_larger_than_the_step_itself_makes_them(changes, is_foreign):
    """Not where somebody makes them smaller, nor where the replay was another forward pass."""
    changed = replace(Changed(0.9, "net.weight", 50.0, 5.0, is_same_forward=True), **changes)
    assert (names(explosion_causes(step(norm=1.0, changed=changed))) == ["foreign"]) == is_foreign


def test_ordinary_gradient_has_no_cause():
    """Whatever the weights look like."""
    assert explosion_causes(step(norm=1.2, weight_growths=(WRITTEN, FAST))) == ()


@pytest.mark.parametrize(("start", "is_from_start", "expected"), [
    (1.0, True, ["init"]), (0.1, True, []), (1.0, False, []),
])  # fmt: skip
def test_init_is_blamed_only_where_the_weights_were_large_before_the_first_step(start, is_from_start, expected):
    """Not where training made them large, nor where nobody saw the beginning."""
    layers = chain(1e4, 1e2, 1.0, gain=6.0)
    growths = tuple(WeightGrowth(f"net.{index}.weight", 1.0, None, 0, start=start) for index in range(3))
    evidence = Evidence(0, Flow(tuple(layers)), 1e4, weight_growths=growths, is_from_start=is_from_start)
    assert names(explosion_causes(evidence)) == expected


def test_small_weights_are_blamed_on_what_made_them_small():
    """Start, decay, or something unknown."""
    layers = chain(1e-8, 1e-6, 1e-4, 1e-2, 1.0, gain=0.05)

    def cause(*, is_from_start=True, **changes):
        growths = tuple(
            replace(WeightGrowth(f"net.{index}.weight", 0.1, None, 0, start=0.1), **changes) for index in range(5)
        )
        evidence = Evidence(99, Flow(tuple(layers)), 1.0, weight_growths=growths, is_from_start=is_from_start)
        (found,) = vanishing_causes(evidence)
        return found

    assert cause().name == "init"
    assert "how large they were before the first step is not known" in cause(is_from_start=False).message
    assert "has no weight decay" in cause(start=1.0).message
    assert "alone multiplies them by 0.12" in cause(start=1.0, weight_decay=0.1, decayed=0.12).message
    assert "is too weak for that" in cause(start=1.0, weight_decay=0.1, decayed=0.9).message
    assert "pulls at them 8 times as hard" in cause(start=1.0, weight_decay=0.1, pull=8.0).message
    assert cause(start=1.0, weight_decay=0.1, pull=0.01).name == "weights"


def test_place_is_that_of_the_alert():
    """Where its headline says that the gradient is lost, if the path goes through there."""
    layers = chain(1e-8, 1e-6, 1e-4, 1e-2, 1.0, gain=0.05)
    evidence = Evidence(99, Flow(tuple(layers)), 1.0, lost_at="net.3")
    assert vanishing_causes(evidence)[0].module == "net.3"
    assert vanishing_causes(replace(evidence, lost_at="elsewhere"))[0].module == "net.2"


def test_activations_of_several_kinds_are_not_called_by_one_name():
    """Sigmoid and tanh by turns."""
    layers = chain(*(10.0 ** -(8 - index) for index in range(9)))
    for index, layer in enumerate(layers[1:8]):
        layer.op, layer.role = ("sigmoid", "tanh")[index % 2], "activation"
        layer.units = Units(0.1, 0.25, 0.0, 0.0)
    (cause,) = vanishing_causes(Evidence(99, Flow(tuple(layers)), 1.0))
    assert cause.name == "activation"
    assert "each of 7 activation functions multiplies the gradient by about 0.1" in cause.message


def test_weights_set_to_zero_later_are_no_initialisation():
    """They had a size when the run began."""
    layers = chain(0.0, 0.0, 1.0, 1.0)
    layers[2].gain = 0.0
    growth = WeightGrowth("net.2.weight", 0.0, 1.0, 16, start=3.0)
    (cause,) = vanishing_causes(Evidence(99, Flow(tuple(layers)), 1.0, weight_growths=(growth,), is_from_start=True))
    assert cause.name == "weights"
    assert "they had a norm of 3" in cause.message
    assert names(vanishing_causes(Evidence(0, Flow(tuple(layers)), 1.0))) == ["init"]


def test_gradient_that_underflows_is_no_cut():
    """It fades to 1e-40, and is zero behind that."""
    layers = chain(0.0, 1e-40, 1e-30, 1e-15, 1.0, gain=0.01)
    assert "cut" not in names(vanishing_causes(Evidence(99, Flow(tuple(layers)), 1.0)))


@pytest.mark.parametrize(("input_rms", "silent", "expected"), [
    (0.0, ("net.1.weight",), ["input"]),  # and the gradient arrives at its output
    (0.5, ("net.1.weight",), []),  # why is not known; a fade is no reason
    (0.0, (), ["init"]),  # the alert is about the fade
    (0.0, ("net.0.weight", "net.1.weight"), []),  # not of all that it is about
])  # fmt: skip
def test_gradients_of_exactly_zero_are_not_laid_on_a_fade(input_rms, silent, expected):
    """Small weights make gradients smaller, and zeros make them zero."""
    layers = chain(1e-8, 1e-6, 1e-4, 1e-2, 1.0, gain=0.05)
    layers[1].input_rms = input_rms
    growths = tuple(WeightGrowth(f"net.{index}.weight", 0.1, None, 0, start=0.1) for index in range(5))
    evidence = Evidence(99, Flow(tuple(layers)), 1.0, weight_growths=growths, is_from_start=True, silent=silent)
    assert names(vanishing_causes(evidence)) == expected


@pytest.mark.parametrize(("slope", "expected"), [(0.0, "saturation"), (0.2, "cut")])
def test_gradient_that_a_flat_activation_takes_is_no_cut(slope, expected):
    """Where all outputs of a tanh are 1 to the last bit."""
    layers = chain(0.0, 1.0, 1.0, 1.0)
    layers[1].op, layers[1].role, layers[1].units = "tanh", "activation", Units(slope, 1.0, float(slope == 0.0), 0.0)
    (cause,) = vanishing_causes(Evidence(99, Flow(tuple(layers)), 1.0))
    assert cause.name == expected


def test_what_the_step_does_at_its_number_is_not_laid_on_the_batch():
    """The healthy batch gives as much under that number."""
    (cause,) = explosion_causes(step(healthy_norm=1.0, norm_under_number=90.0))
    assert cause.name == "step"
    assert "under the number of this one the healthy batch gives 90 as well" in cause.message
    (cause,) = explosion_causes(step(healthy_norm=1.0, norm_under_number=1.0))
    assert "number" not in cause.message


def test_replay_that_gives_more_than_the_step_did_does_not_make_the_batch_the_cause():
    """A step that writes to its own weights writes to them again."""
    assert explosion_causes(step(healthy_norm=90.0, norm=1e5, measured=95.0)) == ()


def test_gradient_that_arrives_has_no_cause():
    """Nor is there one where nothing has any gradient at all."""
    assert vanishing_causes(Evidence(99, Flow(tuple(chain(0.5, 0.7, 1.0))), 1.0)) == ()
    assert vanishing_causes(Evidence(99, Flow(tuple(chain(None, None))), 0.0)) == ()


def test_two_causes_are_both_said_with_what_tells_them_apart():
    """The surest first."""
    layers = chain(1e6, 1e5, 1e4, 1e3, 1e2, 10.0, 1.0)
    for layer in layers:
        layer.weight = "cell.weight"
    evidence = step(flow=Flow(tuple(layers)), weight_growths=(FAST,))
    causes = explosion_causes(evidence)
    assert names(causes) == ["recurrence", "rate"]
    culprit = culprit_of(causes, evidence.flow, rank=0, error=None, tolerance=0.0)
    assert culprit.cause == "recurrence"
    assert "It can also be rate: " in culprit.message
    assert "if it is rate, a tenth of the learning rate ends it" in culprit.message


def test_usual_norm_of_a_growing_history_is_its_lowest():
    """Of blocks of sixteen steps; of fewer the lowest of all."""
    assert usual_of([]) is None
    assert usual_of([3.0, 1.0, 2.0]).norm == 1.0
    growing = usual_of([1.1**index for index in range(64)])
    assert growing.norm < 1.1**16
    assert not growing.holds(1.1**64)
    assert not math.isnan(growing.largest)


def test_single_fault_that_nothing_saw_is_not_usual():
    """The same wrong sample was there during the warm-up."""
    assert not usual_of([1.0] * 30 + [200.0]).has_had(190.0)
    assert usual_of([1.0] * 28 + [200.0] * 3).has_had(190.0)
