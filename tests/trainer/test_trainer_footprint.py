"""What a guard leaves behind on the user's objects: nothing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from toys import Net, fit, make_batches, make_trainer, same, seeded, weights_of

from lightning_gradguard import ClipNorm, Explosion, GradGuard, GradientWarning, NonFinite


def _names(module):
    """Attributes of a module and all its children, with the number of entries of those that can hold hooks."""
    return {
        path: {name: len(value) if isinstance(value, (dict, list, set)) else None for name, value in vars(part).items()}
        for path, part in module.named_modules()
    }


def _hooks_of_parameters(module):
    return [(parameter._backward_hooks, parameter._post_accumulate_grad_hooks) for parameter in module.parameters()]


@pytest.mark.smoke
def test_module_after_fit_has_the_attributes_and_hooks_of_one_without_a_guard(tmp_path):
    """Also after incidents, with every part of the guard at work."""
    guarded, plain = Net({5: "nan", 7: "huge"}), Net()
    before = list(vars(guarded))
    with pytest.warns(GradientWarning, match="at step"):
        fit(tmp_path, guarded, GradGuard(clip=0.5, explosion=Explosion("skip", max_norm=1e3), histogram_every_n_steps=2))
    fit(tmp_path, plain)
    plain.faults = guarded.faults
    assert _names(guarded) == _names(plain)
    assert _hooks_of_parameters(guarded) == _hooks_of_parameters(plain)
    assert set(before) <= set(vars(guarded))


def test_module_during_a_healthy_fit_carries_no_hook(tmp_path):
    """Looked at from a sink, between backward and step."""
    module, found = Net(), []
    guard = GradGuard(sinks=[lambda record: found.append((_names(module), _hooks_of_parameters(module)))])
    expected = _names(module)
    fit(tmp_path, module, guard)
    for names, hooks in found:
        for path, attributes in names.items():
            for name, size in attributes.items():
                if "hooks" in name:
                    assert size == expected[path][name], (path, name)
        assert hooks == [(None, None)] * 4


def test_optimizer_after_fit_has_the_attributes_of_one_without_a_guard(tmp_path):
    """No `grad_scale`, no `found_inf`, no wrapped step."""
    guarded, plain = make_trainer(tmp_path, GradGuard(clip=0.5)), make_trainer(tmp_path)
    for trainer in (guarded, plain):
        trainer.fit(Net(), make_batches(4))
    assert set(vars(guarded.optimizers[0])) == set(vars(plain.optimizers[0]))


def test_random_state_after_fit_is_that_of_a_run_without_a_guard(tmp_path):
    """Sampling for histograms uses a generator of its own."""
    states = []
    for callbacks in ([GradGuard(histogram_every_n_steps=1)], []):
        fit(tmp_path, seeded(Net), *callbacks)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.smoke
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda guard: pickle.loads(pickle.dumps(guard))], ids=["copy", "pickle"])
def test_guard_before_fit_can_be_copied_and_pickled(copied, tmp_path):
    """As strategies that spawn processes do; the copy works as the original."""
    guard = GradGuard(clip=ClipNorm(0.5), nonfinite=NonFinite("skip", patience=1), explosion=Explosion("stop"))
    weights = []
    for each in (guard, copied(guard)):
        module = seeded(Net)
        fit(tmp_path, module, each)
        assert (each.num_steps, each.num_clipped > 0) == (12, True)
        weights.append(weights_of(module))
    assert same(*weights)
