"""The attack: known optima, the ball, the numbers that must never pass for robustness, peers; and the JPEG codecs."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchattacks
from PIL import Image
from torch.nn import functional as F

from common import Attack, generators_for, pgd, to_pixels, uniform, white_box
from eval_jpeg import differentiable_jpeg, jpeg

EPS = 8 / 255
PGD = Attack(EPS, 2 / 255, 20)
BOTH = [replace(PGD, steps=8), white_box(EPS, 8)]


class TwoClasses(torch.nn.Module):
    """A small smooth encoder of (B, 3, 16, 16); cross-entropy of (cosine, -cosine) has the cosine's gradient's sign."""

    def __init__(self, count):
        super().__init__()
        layers = [torch.nn.Conv2d(3, 8, 4, 4), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(128, 8)]
        self.encoder, self.target = torch.nn.Sequential(*layers), F.normalize(torch.randn(count, 8), dim=1)

    def cosine(self, images):
        return (F.normalize(self.encoder(images), dim=1) * self.target).sum(1)

    def forward(self, images):
        cosine = self.cosine(images)
        return torch.stack([cosine, -cosine], 1)


@pytest.mark.parametrize("attack", BOTH)
def test_pgd_finds_the_known_worst_point_of_a_linear_loss_and_leaves_neither_ball_nor_range(attack):
    weights = torch.randn(3, 8, 8)
    images = torch.cat([torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8), torch.rand(2, 3, 8, 8)])
    start = images + 9 * EPS * uniform(images, generators_for(0, range(4)))
    for begin in (None, start):
        images_adv, _ = pgd(lambda x: (x * weights).sum((1, 2, 3)), images, attack, begin)
        torch.testing.assert_close(images_adv, (images + EPS * weights.sign()).clamp(0, 1))
    adv, _ = pgd(lambda x: (x - images).abs().sum((1, 2, 3)), images, attack, start)
    assert adv.min() >= 0 and adv.max() <= 1 and (adv - images).abs().max() <= EPS + 1e-7


def test_pgd_returns_the_best_iterate_of_each_image():
    images, losses = torch.full((2, 3, 4, 4), 0.5), iter(torch.tensor([[3.0, 1], [1, 2], [2, 3]]))
    images_adv, _ = pgd(lambda x: next(losses) + (x - x.detach()).sum((1, 2, 3)), images, Attack(EPS, EPS / 4, 2))
    torch.testing.assert_close(images_adv, torch.stack([images[0], images[1] + EPS / 2]))


def test_pgd_refuses_normalised_pixels():
    with pytest.raises(ValueError, match="normalised"):
        pgd(lambda x: x.sum((1, 2, 3)), torch.randn(1, 3, 4, 4), PGD)


@pytest.mark.parametrize("attack", BOTH)
def test_pgd_counts_zero_gradients_and_nonfinite_values_per_image(attack):
    images = torch.full((3, 3, 4, 4), 0.5)

    def loss_fn(x):
        quantised = (x * 4).round() / 4  # no gradient
        return torch.stack([x[0].sum(), (quantised + 0 * x)[1].sum(), x[2].sum() * torch.nan])

    images_adv, wrong = pgd(loss_fn, images, attack)
    wrong = {key: which.tolist() for key, which in wrong.items()}
    zero, nonfinite = [False, True, False], [False, False, True]
    assert wrong == {"zero_gradient": zero, "nonfinite": nonfinite}
    assert (images_adv != images).flatten(1).any(1).tolist() == [True, False, False]


def test_pgd_equals_torchattacks_step_by_step():
    model, images, iterates = TwoClasses(3).eval(), torch.rand(3, 3, 16, 16), []
    ours, _ = pgd(lambda x: iterates.append(x.detach()) or -model.cosine(x), images, PGD)
    assert all(parameter.grad is None for parameter in model.parameters())
    theirs = torchattacks.PGD(model, eps=EPS, alpha=PGD.alpha, steps=1, random_start=False)
    labels = torch.zeros(3, dtype=torch.long)
    for theirs.steps in (1, 2, 3, 10, 20):
        adv = theirs(images, labels)
        assert ((iterates[theirs.steps] - adv).abs() < 1e-6).float().mean() > 0.999  # but for a gradient of about zero
        torch.testing.assert_close(model.cosine(iterates[theirs.steps]), model.cosine(adv), atol=1e-4, rtol=0)
    assert (model.cosine(ours) <= model.cosine(adv) + 1e-4).all()  # the best one, not the last
    assert (model.cosine(images) - model.cosine(ours)).min() > 0.05  # not a trivial case


def test_momentum_and_decay_are_dongs_update_on_a_hand_made_case():
    """Velocity is in units of the gradients' mean size, 2 and 20. Without momentum red would turn back at step 2."""
    gradients, iterates = iter([[4.0, -1, 1], [-10, -10, 40], [-1, 4, 1], [0, 0, 0]]), []

    def loss_fn(x):
        iterates.append(x.detach().flatten())
        return (x * torch.tensor(next(gradients)).view(3, 1, 1)).sum((1, 2, 3))

    signs = [[1, -1, 1], [1, -1, 1], [-1, 1, 1]]  # of [2, -.5, .5], [.5, -.75, 2.25], [-.25, 1.625, 1.625]
    steps = torch.tensor([1, 0.75, 0.25])[:, None] * EPS / 4 * torch.tensor(signs)  # a half cosine of three steps
    pgd(loss_fn, torch.full((1, 3, 1, 1), 0.5), Attack(EPS, EPS / 4, 3, momentum=0.5))
    torch.testing.assert_close(torch.stack(iterates[1:]), 0.5 + steps.cumsum(0))


def test_momentum_is_as_strong_as_torchattacks_apgd_on_a_shared_case():
    model, images = TwoClasses(16).eval(), torch.rand(16, 3, 16, 16)
    theirs = torchattacks.APGD(model, eps=EPS, steps=20, n_restarts=1, eot_iter=1)
    theirs = theirs.attack_single_run(images, torch.zeros(16, dtype=torch.long))[0]
    start = images + EPS * uniform(images, generators_for(0, range(16)))
    ours, _ = pgd(lambda x: -model.cosine(x), images, white_box(EPS, 20), start)
    assert model.cosine(ours).mean() <= model.cosine(theirs).mean() + 1e-3


def test_noise_does_not_depend_on_the_batch():
    images = torch.full((6, 3, 4, 4), 0.5)
    whole = uniform(images, generators_for(3, range(6)))
    assert torch.equal(whole[4:], uniform(images[4:], generators_for(3, range(4, 6))))
    assert not torch.equal(whole[0], whole[1]) and 0.9 < whole.abs().max() <= 1 and whole.min() < -0.9
    assert not torch.equal(whole, uniform(images, generators_for(4, range(6))))


@pytest.mark.parametrize(("eps", "levels"), [(8 / 255, 8), (0.0314, 8), (0.03, 7), (1 / 255, 1)])
def test_pixels_are_rounded_to_the_nearest_grey_level_inside_the_ball(eps, levels):
    pixels = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    for change in (0.6, 0.4, -0.4, -0.6, 99, -99):
        change = max(-255 * eps, min(255 * eps, change))
        images_adv = (pixels.float() + change) / 255
        expected = max(-levels, min(levels, round(change)))
        assert (to_pixels(images_adv, pixels, eps).int() - 100 == expected).all()


def smooth(count=4, size=40):
    """Images of soft edges, of a size that is no multiple of a JPEG block."""
    return F.interpolate(0.2 + 0.6 * torch.rand(count, 3, 6, 6), size, mode="bicubic").clamp(0, 1)


def test_jpeg_is_the_bytes_of_pillow():
    images = smooth(2)
    pixels = (images * 255).round().byte()
    for image, grey, quality in zip(jpeg(images, [50, 90]), pixels, (50, 90)):
        Image.fromarray(grey.permute(1, 2, 0).numpy()).save(file := io.BytesIO(), "JPEG", quality=quality)
        expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        assert torch.equal((image * 255).round().byte(), expected)


@pytest.mark.parametrize("quality", [30, [30, 50, 75, 95]])
def test_differentiable_jpeg_is_near_pillow_and_its_gradient_knows_of_the_quantisation(quality):
    images = smooth().requires_grad_()
    ours = differentiable_jpeg(images, quality)
    assert 255 * (ours - jpeg(images, quality)).abs().mean() < 1.5  # grey levels
    direction = torch.randn_like(ours)
    (grad,) = torch.autograd.grad((ours * direction).sum(), images)
    assert grad.isfinite().all() and (grad != 0).float().mean() > 0.9
    assert F.cosine_similarity(grad.flatten(1), direction.flatten(1)).max() < 0.8  # that of the identity


def test_the_gradient_of_a_jpeg_coefficient_is_the_cubics():
    """A grey image has one coefficient, (grey - 128) / 2 at quality 50; the identity's gradient would be 1."""
    for grey, off in ((130.2, 0.1), (130.6, 0.3), (131.0, 0.5)):
        images = torch.full((1, 3, 16, 16), grey / 255, requires_grad=True)
        (grad,) = torch.autograd.grad(differentiable_jpeg(images, 50).mean(), images)
        assert grad.sum().item() == pytest.approx(3 * off**2, rel=1e-2)
