"""The attack: known optima, the ball, the numbers that must never pass for robustness, and a peer library."""

import io

import numpy as np
import pytest
import torch
import torchattacks
from PIL import Image

from common import apgd_checkpoints, attack_health, jpeg, pgd, start_noise, to_pixels

EPS, ALPHA = 8 / 255, 2 / 255


def test_pgd_finds_the_known_worst_point_of_a_linear_loss():
    weights, images = torch.randn(3, 8, 8), torch.rand(2, 3, 8, 8)
    attacked = pgd(lambda x: (x * weights).sum((1, 2, 3)), images, eps=EPS, alpha=EPS, steps=3)
    torch.testing.assert_close(attacked.images, (images + EPS * weights.sign()).clamp(0, 1))


def test_pgd_stays_in_the_ball_and_in_range_at_pixels_0_and_1():
    images = torch.cat([torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8), torch.rand(1, 3, 8, 8).round()])
    noise = start_noise(0, range(3), images.shape[1:])
    weights = torch.randn(3, 8, 8)
    adv = pgd(lambda x: (x * weights).sin().sum((1, 2, 3)), images, eps=EPS, alpha=ALPHA, steps=5, noise=noise).images
    assert adv.min() >= 0 and adv.max() <= 1
    assert (adv - images).abs().max() <= EPS + 1e-7
    assert (adv != images).any()


def test_pgd_keeps_the_best_iterate_so_that_more_steps_are_never_weaker(encoder):
    images, target = torch.rand(4, 3, 16, 16), torch.randn(4, 8)

    def loss_fn(x):
        return (encoder(x) * target).sum(1)

    losses = [pgd(loss_fn, images, eps=EPS, alpha=EPS, steps=steps).loss for steps in (1, 3, 9)]
    assert (losses[1] >= losses[0]).all() and (losses[2] >= losses[1]).all()
    attacked = pgd(loss_fn, images, eps=EPS, alpha=EPS, steps=9)
    torch.testing.assert_close(loss_fn(attacked.images).detach(), attacked.loss)


def test_pgd_leaves_the_gradients_of_parameters_alone(encoder):
    before = [torch.full_like(p, 7) for p in encoder.parameters()]
    for parameter, grad in zip(encoder.parameters(), before):
        parameter.grad = grad.clone()
    pgd(lambda x: encoder(x).sum(1), torch.rand(2, 3, 16, 16), eps=EPS, alpha=ALPHA, steps=2)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(encoder.parameters(), before))


def test_pgd_refuses_normalised_pixels():
    with pytest.raises(ValueError, match="normalised"):
        pgd(lambda x: x.sum((1, 2, 3)), torch.randn(1, 3, 4, 4), eps=EPS, alpha=ALPHA, steps=1)


def test_pgd_counts_zero_gradients_and_nonfinite_values_per_image():
    images = torch.full((3, 3, 4, 4), 0.5)

    def loss_fn(x):
        quantised = (x * 4).round() / 4  # no gradient
        honest, masked, broken = x[0].sum(), (quantised + 0 * x)[1].sum(), x[2].sum() * torch.nan
        return torch.stack([honest, masked, broken])

    attacked = pgd(loss_fn, images, eps=EPS, alpha=ALPHA, steps=4)
    assert attacked.zero_grads.tolist() == [0, 4, 0]
    assert attacked.nonfinite.tolist() == [0, 0, 5]
    pixels = (images * 255).round().byte()
    health = attack_health(pixels.numpy(), to_pixels(attacked.images, pixels, EPS), attacked)
    assert health["images_with_zero_gradients"] == 1
    assert health["images_with_nonfinite_values"] == 1
    assert health["images_unmoved"] == 2


def test_pgd_equals_torchattacks_from_the_same_start(encoder):
    """torchattacks keeps the last iterate, so one step at a time is compared, and the end within its own gap."""
    images = torch.rand(3, 3, 16, 16)
    target = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)

    def cosine(x):
        return (torch.nn.functional.normalize(encoder(x), dim=1) * target).sum(1)

    class TwoClasses(torch.nn.Module):  # cross-entropy of (cosine, -cosine) has the sign of the cosine's gradient
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, x):
            return torch.stack([cosine(x), -cosine(x)], 1)

    theirs = torchattacks.PGD(TwoClasses().eval(), eps=EPS, alpha=ALPHA, steps=20, random_start=False)
    adv_theirs = theirs(images, torch.zeros(3, dtype=torch.long))
    ours = pgd(lambda x: -cosine(x), images, eps=EPS, alpha=ALPHA, steps=20)
    assert (cosine(ours.images) <= cosine(adv_theirs) + 1e-4).all()
    last = pgd(lambda x: -cosine(x), images, eps=EPS, alpha=ALPHA, steps=3).images
    theirs.steps = 3
    adv_theirs = theirs(images, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(cosine(last), cosine(adv_theirs), atol=1e-4, rtol=0)
    assert (cosine(images) - cosine(ours.images)).min() > 0.05  # not a trivial case


def test_apgd_is_as_strong_as_torchattacks_on_a_shared_case(encoder):
    images, target = torch.rand(16, 3, 16, 16), torch.nn.functional.normalize(torch.randn(16, 8), dim=1)

    def cosine(x):
        return (torch.nn.functional.normalize(encoder(x), dim=1) * target).sum(1)

    class TwoClasses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, x):
            return torch.stack([cosine(x), -cosine(x)], 1)

    theirs = torchattacks.APGD(TwoClasses().eval(), eps=EPS, steps=20, n_restarts=1, eot_iter=1)
    best_theirs = theirs.attack_single_run(images, torch.zeros(16, dtype=torch.long))[0]
    noise = start_noise(0, range(16), images.shape[1:])
    ours = pgd(lambda x: -cosine(x), images, eps=EPS, alpha=9, steps=20, auto=True, noise=noise)
    fixed = pgd(lambda x: -cosine(x), images, eps=EPS, alpha=ALPHA, steps=20)
    assert (ours.images - images).abs().max() <= EPS + 1e-7
    mean, mean_theirs, mean_fixed = (cosine(x).mean().item() for x in (ours.images, best_theirs, fixed.images))
    assert mean == pytest.approx(mean_theirs, abs=0.01) and mean == pytest.approx(mean_fixed, abs=0.02)


def test_apgd_looks_at_the_published_checkpoints():
    assert sorted(apgd_checkpoints(100))[:6] == [22, 41, 57, 70, 80, 87]


def test_start_noise_does_not_depend_on_the_batch():
    whole = start_noise(3, range(6), (3, 4, 4))
    assert torch.equal(whole[4:], start_noise(3, range(4, 6), (3, 4, 4)))
    assert not torch.equal(whole[0], whole[1]) and whole.abs().max() <= 1
    assert not torch.equal(whole, start_noise(4, range(6), (3, 4, 4)))


@pytest.mark.parametrize(("eps", "levels"), [(8 / 255, 8), (0.0314, 8), (0.03, 7), (1 / 255, 1)])
def test_rounding_to_uint8_never_leaves_the_ball(eps, levels):
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    images = pixels.float() / 255
    adv = (images + eps * torch.randn_like(images).sign()).clamp(0, 1)
    rounded = to_pixels(adv, pixels, eps)
    assert (rounded.int() - pixels.int()).abs().max() == levels
    inside = (pixels > levels) & (pixels < 255 - levels)
    assert ((rounded.int() - pixels.int()).abs()[inside] == levels).all()  # rounded, not truncated


def test_jpeg_is_the_real_codec_forward_and_the_identity_backward():
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    out = jpeg(images, 50)
    buffer = io.BytesIO()
    pixels = (images[0].detach() * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=50)
    expected = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(out[0].detach(), expected)
    (grad,) = torch.autograd.grad((out * 3).sum(), images)
    assert torch.equal(grad, torch.full_like(grad, 3))
