"""The averaged model is an average.

Alone: python -m pytest -n 0 tests/common/test_average.py
"""

import torch
from torch import nn

from common.run import make_average, update_average


def test_the_average_has_its_closed_form_and_copies_buffers():
    """After k updates: decay^k w_0 + sum_i (1 - decay) decay^(k - i) w_i.

    Buffers are equal, in storage of their own.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = make_average(model)
    decay = 0.9
    history = [model[0].weight.detach().clone()]
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(8, 3))  # moves the running statistics
        history.append(model[0].weight.detach().clone())
        update_average(average, model, decay)
    expected = decay**5 * history[0]
    for i in range(1, 6):
        expected = expected + (1 - decay) * decay ** (5 - i) * history[i]
    assert torch.allclose(average[0].weight, expected, atol=1e-6)
    for buffer, model_buffer in zip(average.buffers(), model.buffers()):
        assert torch.equal(buffer, model_buffer)
        assert buffer.data_ptr() != model_buffer.data_ptr()
    assert not average.training
    assert not any(parameter.requires_grad for parameter in average.parameters())


def test_decay_0_is_a_copy():
    torch.manual_seed(0)
    average = make_average(nn.Linear(3, 3))
    model = nn.Linear(3, 3)
    update_average(average, model, 0.0)
    assert torch.equal(average.weight, model.weight)
    assert torch.equal(average.bias, model.bias)
