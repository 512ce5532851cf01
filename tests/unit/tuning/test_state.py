"""What a tuning run carries beside weights and moments."""

import copy

import pytest
import torch
from torch import nn

from moce_ds.common.errors import ArtefactError
from moce_ds.tuning.state import TuneState
from tests.examples.alone import ALONE

DECAY = 0.75


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def step(model: nn.Module) -> None:
    """A forward pass, which moves the statistics, and an update."""
    model(torch.randn(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_the_average_follows_the_weights(model: nn.Module) -> None:
    state = TuneState(model, DECAY, ALONE)
    expected = model[0].weight.detach().clone()
    for updates in range(1, 30):
        step(model)
        state.update(updates, applied=True)
        decay = min(DECAY, 1 - updates ** (-2 / 3)) if updates > 1 else 0.0  # timm's warm-up
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
        torch.testing.assert_close(state.model[0].weight, expected)
    assert decay == DECAY and not torch.allclose(expected, model[0].weight)


def test_a_skipped_step_leaves_average_and_statistics(model: nn.Module) -> None:
    state = TuneState(model, DECAY, ALONE)
    step(model)
    state.update(1, applied=True)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    model(torch.full((8, 3), float("nan")))
    assert model[1].running_mean.isnan().all()
    state.update(1, applied=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())
    assert model[1].running_mean.isfinite().all()


def test_the_best_weights_are_kept(model: nn.Module) -> None:
    state = TuneState(model, 0.0, ALONE)
    kept = None
    for number, top1 in enumerate((0.2, 0.6, 0.6, 0.5)):
        step(model)
        state.keep_best(number, {"top1": top1, "loss": 1.0}, "top1")
        kept = copy.deepcopy(model.state_dict()) if number == 1 else kept
    assert state.best == {"step": 1, "measures": {"top1": 0.6, "loss": 1.0}} and kept is not None
    state.use_best()
    for name, tensor in model.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(tensor, kept[name])


def test_all_of_it_comes_back_from_a_checkpoint(model: nn.Module) -> None:
    state = TuneState(model, DECAY, ALONE)
    for updates in range(1, 4):
        step(model)
        state.update(updates, applied=True)
    state.keep_best(2, {"top1": 0.5}, "top1")
    step(model)
    state.update(4, applied=True)
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    fresh = TuneState(other, DECAY, ALONE)
    fresh.load(saved, state.best, "step-4")
    found = fresh.tensors()
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
    assert fresh.best == state.best and torch.equal(other[1].running_var, model[1].running_var)
    del saved["0.weight.ema"]
    with pytest.raises(ArtefactError, match=r"step-4 does not fit the model:\n  missing 0.weight.ema"):
        fresh.load(saved, state.best, "step-4")
