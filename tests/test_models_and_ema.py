"""The classifier is RobustBench's; the average is an average. Alone: python -m pytest tests/test_models_and_ema.py"""

import copy
import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import DIGITS
from torch import nn

from common import cli, models
from common.ema import EMA

RGB = dataclasses.replace(DIGITS, name="rgb", image_size=32, channels=3, mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616))


def robustbench_class():
    """DMWideResNet from RobustBench's own file; importing the whole package would need its data-set stack."""
    root = Path(importlib.util.find_spec("robustbench").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("dm_wide_resnet", root / "model_zoo" / "architectures" / "dm_wide_resnet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DMWideResNet


@pytest.mark.parametrize("depth,width", [(16, 1), (10, 2)])
def test_weights_load_strictly_in_robustbench_with_equal_logits(depth, width):
    torch.manual_seed(0)
    ours = models.build(f"wrn-{depth}-{width}", RGB)
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    theirs = robustbench_class()(depth=depth, width=width, activation_fn=nn.SiLU, mean=RGB.mean, std=RGB.std)
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5)


@pytest.mark.parametrize("name,keys", [("wrn-28-10", 155), ("wrn-70-16", 407), ("wrn-94-16", 551)])
def test_key_counts_of_the_published_networks(name, keys):
    depth, width = models.parse_model(name)
    with torch.device("meta"):
        assert len(models.WideResNet(depth, width, 10, RGB.mean, RGB.std).state_dict()) == keys


@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_any_image_size_and_features(size):
    model = models.build("wrn-10-1", dataclasses.replace(RGB, image_size=size, num_classes=7)).eval()
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        logits, features = model(x, with_features=True)
        assert logits.shape == (2, 7) and features.shape == (2, 64) == (2, model.num_features)
        assert torch.equal(logits, model(x)) and torch.equal(model.logits(features), logits)
        model.mean.zero_()
        assert not torch.allclose(model(x), logits)  # normalisation is inside


def test_initialisation_is_he_by_fan_out():
    torch.manual_seed(0)
    weight = models.build("wrn-16-4", RGB).layer[1].block[1].conv_0.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("name", ["wrn-27-10", "wrn-28", "resnet18", "wrn-4-1", "wrn-28-0", ""])
def test_unknown_models_are_named(name):
    with pytest.raises(cli.UserError, match="--model"):
        models.parse_model(name)


def test_ema_has_its_closed_form_and_copies_buffers():
    """After k updates: decay^k w_0 + sum_i (1 - decay) decay^(k-i) w_i; buffers equal, in storage of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema, decay, history = EMA(model), 0.9, [copy.deepcopy(model[0].weight.detach())]
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(8, 3))  # moves the running statistics
        history.append(copy.deepcopy(model[0].weight.detach()))
        ema.update(model, decay)
    expected = decay**5 * history[0] + sum((1 - decay) * decay ** (5 - i) * history[i] for i in range(1, 6))
    assert torch.allclose(ema.model[0].weight, expected, atol=1e-6)
    for mine, theirs in zip(ema.model.buffers(), model.buffers()):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
    ema.update(model, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(ema.model.parameters(), model.parameters()))
    assert not any(p.requires_grad for p in ema.model.parameters()) and not ema.model.training
