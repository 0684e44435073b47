"""The fast tower against open_clip's own: output, pixel gradient, weight gradients."""

import open_clip
import pytest
import torch
from torch.nn import functional as F

from common import fast_tower

MEAN, STD = torch.tensor([0.48, 0.46, 0.41]).view(3, 1, 1), torch.tensor([0.27, 0.26, 0.28]).view(3, 1, 1)
SIZES = {"B/32": (768, 32, 12), "B/16": (768, 16, 12), "L/14": (1024, 14, 16)}


def tower(width=64, patch=8, heads=4, size=32, **changes):
    visual = open_clip.transformer.VisionTransformer(
        image_size=size, patch_size=patch, width=width, layers=2, heads=heads, mlp_ratio=4.0, output_dim=32, **changes
    )
    for parameter in visual.parameters():  # open_clip starts biases at 0 and norms at 1, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.05)
    return visual.eval()


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("kind", SIZES)
def test_output_and_gradient_equal_open_clips(kind, quick):
    width, patch, heads = SIZES[kind]
    activation = open_clip.transformer.QuickGELU if quick else torch.nn.GELU
    visual = tower(width, patch, heads, size=4 * patch, act_layer=activation)
    images = torch.rand(2, 3, 4 * patch, 4 * patch, requires_grad=True)
    expected = visual((images - MEAN) / STD)
    (expected_grad,) = torch.autograd.grad(F.normalize(expected, dim=1)[:, 0].sum(), images)
    ours = fast_tower(visual, MEAN, STD, torch.float32, held=True)(images)
    (grad,) = torch.autograd.grad(F.normalize(ours, dim=1)[:, 0].sum(), images)
    assert (ours - expected).norm() < 1e-5 * expected.norm()
    assert (grad - expected_grad).norm() < 1e-5 * expected_grad.norm()


def test_weight_gradients_equal_open_clips_and_reach_every_weight():
    visual, images = tower(act_layer=open_clip.transformer.QuickGELU), torch.rand(3, 3, 32, 32)
    weights = dict(visual.named_parameters())
    expected = torch.autograd.grad(visual((images - MEAN) / STD).square().sum(), weights.values())
    ours = fast_tower(visual, MEAN, STD, torch.float32, held=False)(images)
    grads = torch.autograd.grad(ours.square().sum(), weights.values())
    for name, grad, other in zip(weights, grads, expected):
        assert (grad - other).norm() < 1e-4 * other.norm(), name


@pytest.mark.parametrize(
    "changes",
    [
        {"ls_init_value": 0.1},
        {"pool_type": "avg"},
        {"attentional_pool": True},
        {"qk_norm": True},
        {"patch_dropout": 0.5},
    ],
)
def test_towers_of_another_kind_are_left_to_open_clip(changes):
    assert fast_tower(tower(**changes), MEAN, STD, torch.float32, held=True) is None


def test_a_tower_without_its_first_norm_is_still_exact():
    visual = tower(no_ln_pre=True)
    images = torch.rand(2, 3, 32, 32)
    ours = fast_tower(visual, MEAN, STD, torch.float32, held=True)(images)
    torch.testing.assert_close(ours, visual((images - MEAN) / STD), rtol=1e-4, atol=1e-5)


def test_in_bf16_all_but_the_products_of_the_blocks_is_float32():
    visual, images = tower(), torch.rand(2, 3, 32, 32)
    for block in visual.transformer.resblocks:
        for layer in (block.attn.out_proj, block.mlp.c_proj):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    ours = fast_tower(visual, MEAN, STD, torch.bfloat16, held=True)(images)
    torch.testing.assert_close(ours, visual((images - MEAN) / STD), rtol=1e-5, atol=1e-6)
