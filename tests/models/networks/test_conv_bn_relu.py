"""Fused convolution, batch norm, shortcut and ReLU: bit-identical to the four operations, or equal when frozen."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.networks.resnet_cifar import CifarResNet, conv_bn_relu


@pytest.fixture
def layer():
    """A convolution and a batch norm with non-default scale, shift and statistics."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(5, 7, 3, 2, 1, bias=False), nn.BatchNorm2d(7)
    nn.init.uniform_(norm.weight, -1, 2)  # includes channels of negative scale
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 3)
    return conv, norm


def four_operations(x, conv, norm, shortcut):
    out = norm(conv(x))
    return F.relu(out if shortcut is None else out + shortcut)


def shortcuts():
    return [None, torch.randn(4, 7, 5, 4)]


def test_training_is_bit_identical_to_the_four_operations(layer):
    conv, norm = layer
    x, direction = torch.randn(4, 5, 9, 8), torch.randn(4, 7, 5, 4)
    for shortcut in shortcuts():
        results = []
        for form in (conv_bn_relu, four_operations):
            before = {name: value.clone() for name, value in norm.state_dict().items()}
            leaves = [x.clone().requires_grad_()]
            leaves += [] if shortcut is None else [shortcut.clone().requires_grad_()]
            out = form(leaves[0], conv, norm, leaves[1] * 1 if shortcut is not None else None)
            inputs = [*leaves, conv.weight, norm.weight, norm.bias]
            results.append(
                [out.detach(), *torch.autograd.grad((out * direction).sum(), inputs), *norm.state_dict().values()]
            )
            results[-1] = [value.clone() for value in results[-1]]
            norm.load_state_dict(before)
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_frozen_on_the_cpu_it_gives_the_values_of_the_four_operations(layer, layout):
    conv, norm = (module.eval() for module in layer)
    x = torch.randn(4, 5, 9, 8).to(memory_format=layout)
    for shortcut in shortcuts():
        kept = None if shortcut is None else shortcut.clone()
        with torch.no_grad():
            actual = conv_bn_relu(x, conv, norm, shortcut)
            expected = four_operations(x, conv, norm, shortcut)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert shortcut is None or torch.equal(shortcut, kept)


def test_a_frozen_network_in_double_precision_equals_the_one_with_its_norms_to_the_last_digits():
    torch.manual_seed(0)
    network = CifarResNet(3).double()
    with torch.no_grad():
        network(torch.randn(16, 3, 8, 8, dtype=torch.float64))  # updates the running statistics
    network.eval()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    with_norms = network(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(network(x), with_norms, rtol=1e-12, atol=1e-12)


def test_folded_weights_follow_changes_of_the_norm(layer):
    conv, norm = (module.eval() for module in layer)
    x = torch.randn(2, 5, 6, 6)
    with torch.no_grad():
        before = conv_bn_relu(x, conv, norm)
        norm.running_mean += 1
        norm.weight *= 2
        torch.testing.assert_close(conv_bn_relu(x, conv, norm), F.relu(norm(conv(x))), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(conv_bn_relu(x, conv, norm), before)


def test_an_exported_network_keeps_its_norms():
    network = CifarResNet(3).eval()
    with torch.no_grad():
        program = torch.export.export(network, (torch.randn(2, 3, 8, 8),))
    assert any("batch_norm" in str(node.target) for node in program.graph.nodes)


def test_in_bfloat16_the_folded_norm_is_as_near_to_float32_as_the_norm_apart():
    torch.manual_seed(0)
    network = CifarResNet(9)
    with torch.no_grad():
        network(torch.randn(16, 3, 16, 16))
        network.eval()
        x = torch.randn(16, 3, 16, 16)
        exact = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            folded = (network(x) - exact).abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        apart = (network(x) - exact).abs().max()
    assert folded < 1.5 * apart and folded < 0.03 * exact.abs().max()
