"""The fast tower of the attacks against open_clip's own: output and pixel gradient."""

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch.nn import functional as F

from common import fast_tower

MEAN, STD = torch.tensor([0.48, 0.46, 0.41]).view(3, 1, 1), torch.tensor([0.27, 0.26, 0.28]).view(3, 1, 1)


def tower(**changes):
    size = {"width": 128, "patch_size": 8, "image_size": 32, "heads": 2, "layers": 2}
    visual = VisionTransformer(**size, mlp_ratio=4.0, output_dim=32, **changes)
    for parameter in visual.parameters():  # open_clip starts biases at 0 and norms at 1, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.05)
    return visual.eval()


@pytest.mark.parametrize("changes", [{}, {"act_layer": QuickGELU}, {"no_ln_pre": True}])
def test_output_and_gradients_equal_open_clips(changes):
    visual = tower(**changes)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    encode = fast_tower(visual, MEAN, STD, torch.float32)
    expected = visual((images - MEAN) / STD)
    unit = F.normalize(expected, dim=1)
    raw, ours = encode(images, normalize=False), encode(images)
    assert (raw - expected).norm() < 1e-5 * expected.norm()
    assert (ours - unit).norm() < 1e-5
    grad, expected_grad = (torch.autograd.grad(features[:, 0].sum(), images)[0] for features in (ours, unit))
    assert (grad - expected_grad).norm() < 1e-5 * expected_grad.norm()
    raw.sum().backward()
    assert all(parameter.grad is None for parameter in visual.parameters())  # weights are constants


def test_towers_of_another_kind_are_left_to_open_clip():
    others = {"ls_init_value": 0.1, "pool_type": "avg", "attentional_pool": True, "qk_norm": True, "patch_dropout": 0.5}
    for option, value in others.items():
        assert fast_tower(tower(**{option: value}), MEAN, STD, torch.float32) is None


def test_in_bf16_all_but_the_products_of_the_blocks_is_float32():
    visual, images = tower(), torch.rand(2, 3, 32, 32)
    for block in visual.transformer.resblocks:
        for layer in (block.attn.out_proj, block.mlp.c_proj):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    ours = fast_tower(visual, MEAN, STD, torch.bfloat16)(images)
    torch.testing.assert_close(ours, F.normalize(visual((images - MEAN) / STD), dim=1), rtol=1e-5, atol=1e-6)
