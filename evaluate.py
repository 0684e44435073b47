#!/usr/bin/env python3
"""Attack every model and defence and print the result table; draw its figures; check the attacks.

    python evaluate.py --reproduce --preset tiny    # the whole report on the bundled tiny CLIP, minutes on a laptop
    python evaluate.py --reproduce                  # the whole report on CLIP ViT-L/14, on a GPU
    python evaluate.py --checkpoint fare4=hf-hub:chs20/fare4-clip --output_dir runs/report/with_fare
    python evaluate.py --preset tiny --qualities 75 50 30 random --sanity --output_dir runs/tiny/truth
    python evaluate.py --reproduce --preset tiny --seeds 3 --trainings mat pgd pgd_features online_contrastive online
    python evaluate.py --preset tiny --trainings --qualities --defence original+ttc --output_dir runs/tiny/ttc
    python evaluate.py --preset tiny --radii 1/255 2/255 4/255 8/255
    python evaluate.py --eval_data my_pictures --model ViT-B-16-quickgelu --output_dir runs/mine/evaluation

transfer    images attacked once on the original model, then shown to the defended one: the report's protocol
white-box   for each image the worst of the transferred image and of momentum PGD on the whole defence: under the
            cosine loss, then, if the own caption is still first, under the margin loss. JPEG is attacked through a
            differentiable codec and scored on the real JPEG bytes

Files written to --output_dir (default runs/<preset>/evaluation); the folders of the other scripts stand beside it:
    table.md            the table with intervals, and notes
    metrics.json        all figures, those of each image included
    white_box/<row>/    the attacked images behind a row's white-box figures, as PNGs
    examples.png, cosines.png, with --sanity eps_curves.png, with --radii radii.png
"""

import argparse
import itertools
import json
import math
import os
import re
import textwrap
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint as compute_again

import common
import defend_clip_mat_v2 as mat
import defend_clip_pgd_v2 as pgd
import generate_pgd_adversarial as generate
from common import as_images, attack_all, fail, load_clip, number
from eval_jpeg import differentiable_jpeg, jpeg

BACKEND = os.environ.pop("MPLBACKEND", None)  # a notebook's backend would fail outside of it, and files need none
import matplotlib.figure  # noqa: E402
import matplotlib.font_manager  # noqa: E402
import matplotlib.style  # noqa: E402

if BACKEND:
    os.environ["MPLBACKEND"] = BACKEND

REPORT = {  # Adversarial Robustness Evaluation for CLIP Models, ViT-L/14, MMEB COCO: clean, transfer, improvement
    "original": (0.2513, -0.1783, None),
    "MAT": (0.2417, 0.1067, 0.686),
    "contrastive, offline": (0.2507, 0.2349, 0.963),
    "JPEG 75": (0.2513, 0.1504, 0.765),
    "JPEG 50": (0.2513, 0.2147, 0.915),
    "JPEG 30": (0.2513, 0.2329, 0.957),
}
REPORT_NAMES = {"contrastive, offline": "caption-aware"}  # where the report has another name for a row
TRAININGS = {  # folder: the row, the script that trains it, and its flags
    "mat": ("MAT", mat, ""),
    "pgd": ("contrastive, offline", pgd, "--loss_threshold 0.1"),
    "pgd_features": ("features, offline", pgd, "--loss features"),
    "online_contrastive": ("contrastive, online", pgd, "--loss contrastive --online_steps 2 --loss_threshold 0.1"),
    "online": ("features, online", pgd, "--online_steps 2"),
}
# flags of a training: with other values of these it is not the row's; with other values of others the row is marked
SAME_TRAINING = ["script", "model", "eps", "seed", "loss", "online_steps"]
TOLERANCE = 0.005  # two attacks are equally strong if their mean cosines on the same images differ by at most this
RANKED_AT_ONCE = 256  # images whose cosines with all captions are in memory at a time
SANITY_IMAGES = 24
CONVERGENCE_IMAGES = 16
EPS_CURVE = [0, 1, 2, 4, 8, 16, 32, 64]  # grey levels


def checkpoint(text):
    """argparse type for NAME=PATH_OR_MODEL: return both."""
    name, _, source = text.partition("=")
    source = common.expand_home(source)
    if "+" in name:
        raise argparse.ArgumentTypeError(f"{name!r} has a +, which joins the steps of --defence: choose another name")
    file, _ = common.split_place(source)
    readable = os.path.isfile(file) and os.access(file, os.R_OK)
    if not name or not (source.startswith(common.SCHEMAS) or readable):
        forms = "NAME=a file that can be read, NAME=local-dir:DIR, NAME=hf-hub:ORG/NAME or NAME=hf-hub:ORG/NAME/FILE"
        raise argparse.ArgumentTypeError(f"{text!r} is not {forms}")
    return name, source


def parse_args(argv=None, given=None):
    parser = common.make_parser(__doc__)
    flag = parser.add_argument_group("rows of the table").add_argument
    trained = "a row for each of these trained models, by the names of their folders"
    flag("--trainings", choices=TRAININGS, nargs="*", default=["mat", "pgd", "online"], help=trained)
    flag("--seeds", type=number(1, 100), default=1, help="average this many trainings of each, from --seed on")
    qualities = "a row for each JPEG quality; random: drawn from 30 to 75"
    flag("--qualities", type=jpeg_quality, nargs="*", default=[75, 50, 30], help=qualities)
    front = f"a row: jpegQ, {', '.join(FRONTS)} in front of the model of another row, or several; repeatable"
    flag("--defence", action="append", default=[], metavar="MODEL+FRONT", help=front)
    model = "a row: local-dir:DIR, hf-hub:ORG/NAME, or weights for --model, FILE or hf-hub:ORG/NAME/FILE, of several"
    model += " in it FILE::PLACE; repeatable"
    flag("--checkpoint", action="append", default=[], type=checkpoint, metavar="NAME=PATH_OR_MODEL", help=model)
    flag("--adversarial_dir", help="transferred images, of generate_pgd_adversarial.py --split eval")
    flag = parser.add_argument_group("measuring").add_argument
    steps = "steps of the white-box attack; --steps are those of the transferred images"
    flag("--attack_steps", type=number(1, 10**6), help=steps)
    flag("--restarts", type=number(1, 1000), default=1, help="white-box starts: the transferred images, then noise")
    candidates = "retrieve from the captions of the evaluation images, or from MMEB's own candidates"
    flag("--candidates", choices=["evaluation", "mmeb"], default="evaluation", help=candidates)
    radii = "also attack every row at these radii, and draw R@1 and cosine against them"
    flag("--radii", type=common.radius, nargs="+", default=[], metavar="EPS", help=radii)
    flag("--sanity", action="store_true", help="check the attack on every row, and mark rows that fail")
    flag("--reproduce", action="store_true", help="first make the adversarial images and trainings that are missing")
    return common.fill(parser.parse_args(argv, given), "evaluation", "eval")


# ---------------------------------------------------------------------------------------------------------------------
# Fronts: what images go through before a model sees them

# encode, here and below: (B, 3, H, W) float32 in [0, 1], normalize=True -> (B, D), by default of unit norm


@dataclass(frozen=True)
class Front:
    """A defence at test time.

    wrap      (encode, original, generators) -> encode of the defended model; original is encode of the original CLIP,
              generators holds a torch.Generator for each image of a call
    attacks   {name: such a wrap, with a gradient}; the white-box attack is the worst of these
    terms     {name of an attack: (original, generators) -> function of images, (B,), which is added to its loss}
    acts      (original, generators) -> function of images: on which the defence acts, (B,) bool; None: on all
    draws     of a random defence: averaged in a score; in a step of an attack. (0, 0) of one that is not random
    """

    wrap: object
    attacks: dict
    terms: dict = field(default_factory=dict)
    acts: object = None
    draws: tuple = (0, 0)


def make_front(name):
    """Return the Front of a name as --defence takes it: jpegQ, jpegrandom, ttc, dbd or tte."""
    if match := re.fullmatch("jpeg(.+)", name):
        return jpeg_front(jpeg_quality(match[1]))
    if name not in FRONTS:
        raise ValueError(f"{name!r} is no defence: there are jpegQ, {', '.join(FRONTS)}")
    return FRONTS[name]


def draws_of(fronts):
    """Return Front.draws of several fronts, of which at most one is random."""
    return max((front.draws for front in fronts), default=(0, 0))


def jpeg_quality(text):
    """argparse type: a JPEG quality from 1 to 95, or 'random'."""
    return text if text == "random" else number(1, 95)(text)


def jpeg_front(quality):
    """Return the Front of JPEG; 'random' is a quality from 30 to 75 for each image, drawn in each call."""

    def through(codec):
        def wrap(encode, original, generators):
            def defended(images, normalize=True):
                drawn = quality
                if quality == "random":
                    drawn = [int(torch.randint(30, 76, (1,), generator=each)) for each in generators]
                return encode(codec(images, drawn), normalize)

            return defended

        return wrap

    draws = (16, 4) if quality == "random" else (0, 0)
    return Front(through(jpeg), {"differentiable": through(differentiable_jpeg)}, draws=draws)


TTC = {"eps": 4 / 255, "alpha": 1 / 255, "steps": 2, "threshold": 0.2, "beta": 2.0}  # the authors' defaults


def ttc_noise(images, generators):
    """Return uniform noise in the counterattack's ball, cut so that images + noise stay in [0, 1]."""
    return (images + TTC["eps"] * common.uniform(images, generators)).clamp(0, 1) - images


def ttc_tau(original, images, noise):
    """Return by how much noise changes the original's features, relative to their norm: (B,)."""
    features = original(images, normalize=False)
    return (original(images + noise, normalize=False) - features).norm(dim=-1) / features.norm(dim=-1)


def ttc(encode, original, generators, attack=None):
    """Test-time counterattack (Xing et al. 2025, arXiv:2503.03613): push an image away from its own features.

    If noise hardly changes the features, tau < 0.2, the image counts as attacked: two steps of PGD raise the distance
    to its features, and the mean of all iterates, with weights exp(2 k), is added to it; else the noise is.

    attack   detached: what is added is a constant of the gradient (BPDA, Athalye et al. 2018, arXiv:1802.00420);
             through: the gradient goes through the steps, tanh in place of the sign and a sigmoid of tau;
             gate: the noise alone is added, with ttc_gate() as a further term of the loss
    """
    through = attack == "through"

    @torch.enable_grad()
    def added(images):
        noise = ttc_noise(images, generators)
        with torch.set_grad_enabled(through):
            tau, features = ttc_tau(original, images, noise), encode(images, normalize=False)
        iterates = [noise]
        for _ in range(TTC["steps"]):
            delta = iterates[-1] if through else iterates[-1].detach().requires_grad_()
            distance = (encode(images + delta, normalize=False) - features).square().sum()
            (grad,) = torch.autograd.grad(distance, delta, create_graph=through)
            size = grad.detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=torch.finfo(grad.dtype).tiny)
            delta = delta + TTC["alpha"] * (torch.tanh(grad / size) if through else grad.sign())
            iterates.append((images + delta.clamp(-TTC["eps"], TTC["eps"])).clamp(0, 1) - images)
        weights = torch.softmax(TTC["beta"] * torch.arange(len(iterates), device=images.device), 0)
        counterattack = sum(weight * delta for weight, delta in zip(weights, iterates))
        share = torch.sigmoid(50 * (TTC["threshold"] - tau)) if through else (tau < TTC["threshold"]).float()
        return noise + share[:, None, None, None] * (counterattack - noise)

    def defended(images, normalize=True):
        if attack == "gate":
            return encode(images + ttc_noise(images, generators), normalize)
        with sdpa_kernel(SDPBackend.MATH) if through else nullcontext():  # the others have no second derivatives
            delta = added(images if through else images.detach())
            return encode(images + (delta if through else delta.detach()), normalize)

    return defended


def ttc_gate(original, generators):
    """Return how far tau of images is below where no counterattack is made, and a little more, for an attack: (B,)."""

    def term(images):
        tau = ttc_tau(original, images, ttc_noise(images, generators))
        return 10 * (tau - 1.25 * TTC["threshold"]).clamp(max=0)

    return term


def ttc_acts(original, generators):
    """Return the function that says of which images TTC takes an image for attacked."""
    return lambda images: ttc_tau(original, images, ttc_noise(images, generators)) < TTC["threshold"]


def random_views(images, generators, count):
    """Yield views of images, (B, 3, H, W) each, with a gradient: of each image a random crop and flip of its own.

    As torchvision's RandomResizedCrop: from 8 to 100 % of the area, sides 3:4 to 4:3, resampled bilinearly.
    """
    for _ in range(count):
        draws = torch.stack([torch.rand(5, generator=generator) for generator in generators]).to(images.device)
        area, ratio, across, down, flip = draws.T
        area, ratio = 0.08 + 0.92 * area, (4 / 3) ** (2 * ratio - 1)
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        zero, flip = torch.zeros_like(area), torch.where(flip < 0.5, -1.0, 1.0)
        x, y = (2 * across - 1) * (1 - width), (2 * down - 1) * (1 - height)
        boxes = torch.stack([width * flip, zero, x, zero, height, y], 1).view(-1, 2, 3)
        grid = F.affine_grid(boxes, images.shape, align_corners=False)
        yield F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def dbd(encode, original, generators, count=31, factor=None):
    """Move features by the mean difference of those of random views: DBD (ICLR 2026), or TTE, the mean of the views.

    count    of views; 31 in a score, 8 in each step of an attack, which are new ones (EOT, Athalye et al. 2018)
    factor   of the mean difference: 1 is TTE (Perez et al. 2021, arXiv:2107.14110); None is DBD's: 2.5 where the
             differences agree, their mean cosine with their mean being over 0.8, else 1
    """

    def defended(images, normalize=True):
        features = encode(images, normalize=False)
        # one view at a time is in memory: backward computes each anew
        found = [
            compute_again(encode, view, False, use_reentrant=False) for view in random_views(images, generators, count)
        ]
        differences = torch.stack(found) - features  # (views, B, D)
        mean, moved = differences.mean(0), factor
        if factor is None:
            agreement = F.cosine_similarity(differences, mean[None], dim=-1).mean(0)
            moved = torch.where(agreement > 0.8, 2.5, 1.0)[:, None]
        features = features + moved * mean
        return F.normalize(features, dim=-1) if normalize else features

    return defended


FRONTS = {
    "ttc": Front(
        wrap=ttc,
        attacks={name: partial(ttc, attack=name) for name in ("detached", "through", "gate")},
        terms={"gate": ttc_gate},
        acts=ttc_acts,
        draws=(16, 4),
    ),
    "dbd": Front(dbd, {f"factor {x}": partial(dbd, count=8, factor=x) for x in (2.5, 1.0)}, draws=(4, 1)),
    "tte": Front(partial(dbd, factor=1.0), {"views": partial(dbd, count=8, factor=1.0)}, draws=(4, 1)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Rows: a model, what its images go through first, the images themselves, and the captions to retrieve from


@dataclass
class Spec:
    """A model and what is in front of it, before anything is loaded."""

    row: str  # of the table; the seeds of a training share one
    source: str | None = None  # of load_clip(); None is the original model
    fronts: tuple = ()  # names of what is in front of it; images meet the first one first
    training: object = None  # (script, its flags) of the model, if it is one of TRAININGS
    seconds: float | None = None  # training time
    notes: tuple = ()  # what a reader of its figures must know
    twin: str | None = None  # of Clip
    key: str = ""  # digest of all that its figures depend on, from identify()


def list_rows(args):
    """Return {name: Spec} in the table's order, each seed of a training under a name of its own; load nothing.

    Exit if a name is taken or unknown, or if a training's folder holds another run. With --reproduce trainings are
    listed that are not made yet.
    """
    specs = {"original": Spec("original")}
    for folder in args.trainings:
        row, script, _ = TRAININGS[folder]
        for seed in range(args.seed, args.seed + args.seeds):
            flags = training_flags(args, folder, seed)
            if args.reproduce:
                script.open_run(flags)  # exits if its folder holds another run
            elif not (Path(flags.output_dir) / "metrics.json").exists():
                print(f"{flags.output_dir} has no finished run: it is left out of the row {row}")
                continue
            specs[seed_name(row, seed, args)] = Spec(row, f"local-dir:{flags.output_dir}", training=(script, flags))

    taken = {*specs, *TRAININGS, *(row for row, *_ in TRAININGS.values()), *REPORT_NAMES.values()}
    taken |= {f"JPEG {quality}" for quality in args.qualities}
    for name, source in args.checkpoint:
        if name in taken:
            fail(f"--checkpoint {name}=...: there is a row of that name already; choose another")
        taken.add(name)
        specs[name] = Spec(name, source)
    defences = {f"JPEG {quality}": f"original+jpeg{quality}" for quality in args.qualities}
    for text in args.defence:
        if text in taken:
            fail(f"--defence {text}: there is a row of that name already; choose another")
        defences[text] = text
    for name, text in defences.items():
        specs |= defended_specs(name, text, specs)
    return specs


def defended_specs(name, text, specs):
    """Return {name: Spec} of MODEL+FRONT+...: of each seed of the model."""
    # --defence takes the name of a training's folder, and the report's, too
    rows = {folder: row for folder, (row, *_) in TRAININGS.items()} | {name: row for row, name in REPORT_NAMES.items()}
    model, *steps = text.split("+")
    known = "; ".join(dict.fromkeys(spec.row for spec in specs.values()))
    with common.exit_on_error(f"--defence {text}: write MODEL+jpegQ or MODEL+ttc, MODEL one of {known}"):
        if sum(any(make_front(step).draws) for step in steps) > 1:
            raise ValueError("at most one of its steps may be random")
        model = rows.get(model, model)
        found = {label: spec for label, spec in specs.items() if spec.row == model}
        if not found:
            raise ValueError(f"there is no {model!r}")
    return {
        name + label.removeprefix(model): replace(spec, row=name, fronts=(*spec.fronts, *steps))
        for label, spec in found.items()
    }


def training_flags(args, folder, seed):
    """Return the flags of a training; its output folder is named for the seed."""
    _, script, words = TRAININGS[folder]
    words = [*words.split(), "--seed", seed]
    if seed != args.seed and folder.startswith("pgd"):  # trains on the adversarial images of the first seed
        words += ["--adversarial_dir", common.stage_folder(args, "adversarial_train")]
    return common.stage_args(script.parse_args, args, folder if seed == args.seed else f"{folder}_seed{seed}", *words)


def seed_name(row, seed, args):
    """Return the name of a training's figures: its row, and the seed where it is not the first."""
    return row if seed == args.seed else f"{row}, seed {seed}"


@dataclass
class Evaluation:
    """What all rows have in common: the evaluation images as the original model and its attack leave them."""

    images: common.Images
    transfer: np.ndarray  # uint8 (N, 3, H, W): attacked on the original model
    note: str | None  # on how they were made
    geometry: dict  # of the original model
    model: str  # its digest
    weights: str  # digest of its weights alone


@dataclass
class Row:
    name: str
    clip: common.Clip
    pixels: np.ndarray  # uint8 (N, 3, H, W)
    transfer: np.ndarray  # likewise, attacked on the original model: where an attack without a seed starts
    captions: list[str]  # to retrieve from, M distinct ones; the next two hold indices into them
    right: torch.Tensor  # (N, R) of each image's own captions: the attacked one is the first, and fills up the row
    candidates: torch.Tensor | None  # (N, K) of the captions that each image is ranked among, filled up; None: of all
    equal: torch.Tensor  # (M,) a number below M, the same for captions with equal tokens
    fronts: tuple[Front, ...] = ()
    original: common.Clip | None = None  # the undefended model, for a front that asks it
    keys: tuple = ()  # what parts of its attacks are stored under: Spec.key, and a digest of the code

    def __post_init__(self):
        self.original = self.original or self.clip

    @property
    def draws(self):
        """Draws of a random defence in a score, and in a step of an attack; 0 of one that is not random."""
        return draws_of(self.fronts)

    def attacks(self):
        """Return the white-box attacks on the defence: of each the names of the fronts' attacks."""
        return [*itertools.product(*(front.attacks for front in self.fronts))]

    def defended(self, encode, original, generators, attack=None):
        """Return encode of the whole defence, or as an attack of attacks() sees it."""
        for i, front in reversed([*enumerate(self.fronts)]):
            encode = (front.attacks[attack[i]] if attack else front.wrap)(encode, original, generators)
        return encode

    @property
    def own(self):
        """Index of the caption that is attacked, of each image: (N,)."""
        return self.right[:, 0]

    def wrong_captions(self, index):
        """Return which captions are wrong answers for some of the images: (B, M) bool."""
        none = torch.zeros(len(self.right[index]), len(self.captions), dtype=torch.bool)
        wrong = ~none.scatter(1, self.equal[self.right[index]], True)[:, self.equal]
        return wrong if self.candidates is None else wrong & none.scatter(1, self.candidates[index], True)

    def wrong_images(self, captions):
        """Return which images are wrong answers for captions, given by their indices (B,): (B, N) bool."""
        wrong = torch.ones(len(captions), len(self.right), dtype=torch.bool)
        for own in self.equal[self.right].T:
            wrong &= self.equal[captions][:, None] != own
        return wrong

    def part(self, index):
        """The row with some of its images alone."""
        candidates = None if self.candidates is None else self.candidates[index]
        pixels, transfer = self.pixels[index], self.transfer[index]
        return replace(self, pixels=pixels, transfer=transfer, right=self.right[index], candidates=candidates)


def row_attack(args, spec):
    """Return the white-box attack of a row."""
    attack = common.white_box(args.eps, args.attack_steps, any(name.startswith("jpeg") for name in spec.fronts))
    return replace(attack, draws=draws_of(map(make_front, spec.fronts))[1])


def identify(args, name, spec, data):
    """Load the model of a row, check it, and let it go; return the Spec with its key, training time and notes.

    The key is that of the row but for the transferred images.
    """
    row = load_row(args, name, spec, data)
    notes, seconds = [*row.clip.notes], None
    if spec.source and row.clip.weights_digest == data.weights:
        notes.append("its weights are the original model's")
    if spec.training:
        script, flags = spec.training
        seconds, training_notes = check_training(Path(flags.output_dir), script, flags, data.model)
        notes += training_notes
    inputs = [row.clip.digest, spec.fronts, data.images.checksums, args.candidates]
    inputs += [data.images.candidates] if args.candidates == "mmeb" else []
    inputs += [asdict(row_attack(args, spec)), args.restarts, args.seed, row.clip.precision, row.original.digest]
    return replace(spec, key=common.digest(inputs), seconds=seconds, notes=tuple(notes), twin=row.clip.twin)


def check_training(folder, script, flags, model):
    """Return the training time of a finished training, and notes on it: other flags, other code.

    Exit if it is another script's, of another original model, or of another loss, eps or seed.
    """
    with common.exit_on_error(f"{folder} is no training of this row"):
        record = common.read_record(folder / "metrics.json")
        was, now = record["args"] | record["identity"], {"script": Path(script.__file__).name, "model": model}
        now |= {flag: getattr(flags, flag) for flag in [*script.IDENTITY.split(), "num_images", "train_data"]}
        for values in (was, now):
            values["train_data"] = Path(values["train_data"]).name  # which may lie elsewhere by now
        changes = {key: common.difference(key, was.get(key), now[key]) for key in now if was.get(key) != now[key]}
        wrong = [changes.pop(key) for key in SAME_TRAINING if key in changes]
        if wrong:
            raise ValueError(f"{'; '.join(wrong)}: remove that folder, or choose another --output_dir")
    notes = [f"trained with {'; '.join(changes.values())}"] if changes else []
    if maker := common.other_maker(record, script.__file__):
        notes.append(f"{folder} was made by {maker}")
    return record["training_seconds"], notes


def load_row(args, name, spec, data):
    """Load the model of a row, and the evaluation images in its geometry; exit if it was trained on one of them."""
    clip, images, transfer = load_clip(args, spec.source), data.images, data.transfer
    if clip.geometry != data.geometry:  # transferred images reach it as files, which it resizes
        images, transform = common.load_images(args, "eval", clip.geometry), common.to_geometry(clip.geometry)
        transfer = np.stack([transform(Image.fromarray(pixels.transpose(1, 2, 0))) for pixels in transfer])
    fingerprints = images.fingerprints()
    if leaked := {fingerprints[each] for each in clip.trained_on & fingerprints.keys()}:
        fail(f"leakage: {name} was trained on {len(leaked)} of the evaluation images, such as {min(leaked)}")
    fronts, original = tuple(map(make_front, spec.fronts)), clip
    if spec.source and clip.geometry == data.geometry and any(front.acts for front in fronts):
        original = load_clip(args)
    row = Row(name, clip, images.pixels, transfer, *load_candidates(args.candidates, images), fronts, original)
    return forgive_equal_captions(row, images.paths)


def compare_activations(row, seed):
    """Score a row's clean images with its activation and with the other one, GELU or QuickGELU, without a defence."""
    row, margins = replace(row, fronts=()), []
    for _ in range(2):
        margins.append(common.gather(score(row, row.pixels, seed)["margin"])[0])
        row.clip.flip_activation()
    own, other = margins
    found = {"margin": float(own.mean()), "margin_of_the_other": float(other.mean())}
    return found | {"gain_interval": interval(other - own, seed)}


def doubt_activation(spec, entry):
    """Return a note on a row whose clean images are told apart better with the other activation, else None."""
    found = entry.get("activation")
    if not (spec.twin and found and found["gain_interval"][0] > 0):
        return None
    margins = f"{found['margin']:.4f}, with the other activation {found['margin_of_the_other']:.4f}"
    return f"clean margin {margins}: its weights may want {spec.twin}"


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def load_candidates(kind, images):
    """Return the captions to retrieve from, as in Row: captions, right, candidates, equal."""
    numbers = {}  # of the captions

    def indices_of(lists):
        """Number lists of captions, the shorter ones filled up with their first: (N, the longest)."""
        found = [[numbers.setdefault(caption, len(numbers)) for caption in captions] for captions in lists]
        longest = max(map(len, found))
        return torch.tensor([indices + indices[:1] * (longest - len(indices)) for indices in found])

    candidates = indices_of(images.candidates) if kind == "mmeb" else None
    right = indices_of(images.captions)
    return list(numbers), right, candidates, torch.arange(len(numbers))


def forgive_equal_captions(row, paths):
    """Return a row in which captions with equal tokens are not wrong answers for each other's images.

    Exit if an image then has no wrong answer; the paths name the images.
    """
    row = replace(row, equal=row.clip.tokenizer(row.captions).unique(dim=0, return_inverse=True)[1])
    alone = (count_candidates(row) == 1).nonzero()
    if len(alone):
        length = row.clip.tokenizer(row.captions[:1]).shape[1]
        remedy = "raise --num_images, or add images" if row.candidates is None else "leave out --candidates mmeb"
        message = f"{row.name}: {paths[alone[0].item()]} has no other caption to lose to"
        fail(f"{message} (captions with the same first {length} tokens are equal). R@1 needs different ones: {remedy}")
    return row


def count_candidates(row):
    """Return how many captions each image is ranked among, its own and the wrong ones: (N,)."""
    starts = range(0, len(row.right), RANKED_AT_ONCE)
    return torch.cat([1 + row.wrong_captions(slice(at, at + RANKED_AT_ONCE)).sum(1) for at in starts])


# added to a seed: sets of draws with none in common. score() adds REPORTED to any seed, to CHOSEN + seed, too
REPORTED, CHOSEN, ATTACKED = 10**10, 10**11, 3 * 10**10


def encode_row(row, pixels, seed):
    """Encode a row's images by the whole defence, once for each draw: (draws, N, D); no batch size changes a draw."""
    features, size = [], row.clip.batch_size
    for start in range(0, len(pixels), size):
        here = np.arange(start, min(start + size, len(pixels)))
        generators = common.generators_for(seed, here)
        encode = row.defended(row.clip.encode_image, row.original.encode_image, generators)
        features.append([row.clip.encode_pixels(pixels[here], encode) for _ in range(row.draws[0] or 1)])
    return torch.stack([torch.cat(batches) for batches in zip(*features)])


def score(row, pixels, seed, gallery=None):
    """Score every image against every caption, each as the worst case of its row's convention, (N,) unless said:

    similarity   cosine with the attacked caption, the first of the image's own
    margin       the lead of the best own caption over the hardest other one
    rank_i2t     of the best own caption, from 0; equal cosines count against the model
    rank_t2i     of the image for each of its own captions (N, R); -1 where it has fewer than R

    gallery   features of other images (draws, N, D), among which each of these is looked for, text to image; by
              default they are looked for among each other

    Of a random defence similarity and margin are means over the draws; ranks have a further, last dimension of draws.
    """
    features = encode_row(row, pixels, REPORTED + seed)
    gallery = features if gallery is None else gallery
    drawn = [score_features(row, *pair) for pair in zip(features, gallery)]
    scored = {key: np.stack([values[key] for values in drawn], -1) for key in drawn[0]}
    random = any(row.draws)
    return {k: v.mean(-1) if k in ("similarity", "margin") else v if random else v[..., 0] for k, v in scored.items()}


def score_features(row, features, gallery):
    """Score one draw of features (N, D) as score() does."""
    text_features, parts = row.clip.encode_text(row.captions), []
    for start in range(0, len(features), RANKED_AT_ONCE):
        here = slice(start, start + RANKED_AT_ONCE)
        right = row.right[here].to(features.device)
        cosines = features[here] @ text_features.T  # (B, M)
        own = cosines.gather(1, right)  # (B, R)
        best = own.amax(1, keepdim=True)
        others = cosines.masked_fill(~row.wrong_captions(here).to(own.device), -torch.inf)
        part = {
            "similarity": own[:, 0],
            "margin": best[:, 0] - others.amax(1),
            "rank_i2t": (others >= best).sum(1),
            "rank_t2i": torch.stack([rank_images(row, *column, gallery) for column in zip(right.T, own.T)], 1),
        }
        repeated = (right == right[:, :1]) & (torch.arange(right.shape[1], device=right.device) > 0)
        part["rank_t2i"] = part["rank_t2i"].masked_fill(repeated, -1)
        parts.append({key: values.cpu().numpy() for key, values in part.items()})
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def first_share(scored):
    """Return in how many draws an own caption of each image is first, 0 or 1 without draws: (N,)."""
    first = np.asarray(scored["rank_i2t"]) == 0
    return first.reshape(len(first), -1).mean(1)


def rank_images(row, captions, cosines, gallery):
    """Return for each caption how many images of a gallery beat its own one, whose cosine is given: (B,)."""
    images = row.clip.encode_text(row.captions)[captions] @ gallery.T  # (B, N)
    wrong = row.wrong_images(captions.cpu()).to(images.device)
    return (images.masked_fill(~wrong, -torch.inf) >= cosines[:, None]).sum(1)


def row_loss(attack, row, names=None):
    """Return the loss of an attack on a whole defence, as attack_all() takes it.

    names   one of row.attacks(), by default the first
    """
    names = names or row.attacks()[0]
    text_features = row.clip.encode_text(row.captions)
    own = row.own.to(row.clip.device)

    def loss(encode, here):
        generators = common.generators_for(ATTACKED + (attack.seed or 0), here)  # their draws are new in each step
        original = row.original.attack_encoder() if row.fronts else None
        defended = row.defended(encode, original, generators, names)
        terms = [front.terms.get(name) for front, name in zip(row.fronts, names)]
        terms = [term(original, generators) for term in terms if term]
        aim = common.own_caption(text_features[own], defended, here)
        if attack.loss == "margin":
            wrong, right = row.wrong_captions(here).to(row.clip.device), row.right[here].to(row.clip.device)

            def aim(images):  # the lead of the hardest other caption over the best own one
                cosines = defended(images) @ text_features.T  # (B, M)
                return cosines.masked_fill(~wrong, -torch.inf).amax(1) - cosines.gather(1, right).amax(1)

        return lambda images: aim(images) + sum(term(images) for term in terms)

    return loss


def attack_row(attack, row, run=None, names=None):
    """Attack a row once, from noise if the attack has a seed, else from the transferred images; as attack_all().

    names   of row_loss()
    """
    start, what = row.transfer if attack.seed is None else None, f"{row.name}, {attack.loss}"
    keys = *row.keys, names or row.attacks()[0]
    return attack_all(attack, row_loss(attack, row, names), row.pixels, row.clip, start, run, what, keys)


def attack_both(attack, row, seed, run=None, names=None):
    """Attack a row's cosine, then the margin of images whose own caption is still first.

    returns   [pixels_adv of each attack], [what went wrong in each, as pgd() says]
    """
    lowest, wrong = attack_row(attack, row, run, names)
    found, wrong_margin = attack_margin(attack, row, lowest, seed, run, names)
    return [lowest, *found], [wrong, *wrong_margin]


def attack_margin(attack, row, lowest, seed, run=None, names=None):
    """Attack the margin of images whose own caption is first in lowest: from there, then from the transferred images.

    returns   as attack_both(); none where no own caption is first any more
    """
    found, wrong, pixels = [], [], lowest
    for start in (lowest.numpy(), row.transfer):
        shares = common.gather(first_share(score(row, pixels, seed)))[0]  # rank 0's floats decide for all
        first = np.flatnonzero(shares)
        if not len(first):
            break
        part = replace(row.part(first), transfer=start[first])
        margin, problems = attack_row(replace(attack, loss="margin", seed=None), part, run, names)
        pixels = pixels.clone()
        pixels[first] = margin
        found.append(pixels)
        wrong.append(problems)
    return found, wrong


def under_attack(row, attack, seed, run=None):
    """Score a row's images under all its attacks, each image at its worst, as score() does.

    These are the raw figures of a radius or a number of steps; what larger attacks find is not in them.
    """
    found = [pixels for names in row.attacks() for pixels in attack_both(attack, row, seed, run, names)[0]]
    return worst_of(*score_sets(row, found, seed))


def score_sets(row, sets, seed, gallery=None):
    """Score sets of images twice, to choose each image's worst by and to report: a random defence on other draws."""
    reported = [score(row, pixels, seed, gallery) for pixels in sets]
    return [score(row, pixels, CHOSEN + seed, gallery) for pixels in sets] if any(row.draws) else reported, reported


def worst_of(chosen, reported=None):
    """Return of several score() results the worst of each image: chosen by the first ones, as the others report it."""
    reported, worst = reported or chosen, {}
    for key in chosen[0]:
        which = np.stack([standing(scored, key) for scored in chosen]).argmin(0)
        figures = np.stack([scored[key] for scored in reported])
        which = which.reshape(which.shape + (1,) * (figures.ndim - 1 - which.ndim))  # for all draws the same
        worst[key] = np.take_along_axis(figures, which[None], 0)[0]
    return worst


def standing(scored, key):
    """Return how good a score() result is for each image; of ranks how often it is first, then how far behind."""
    values = np.asarray(scored[key])
    if not key.startswith("rank"):
        return values
    values = (values == 0) - values / 1e9
    return values.mean(-1) if np.ndim(scored["rank_i2t"]) == 2 else values  # over the draws


def scaled(attack, eps):
    """Return an attack of another radius: as many steps, each as large a part of it."""
    return replace(attack, eps=eps, alpha=attack.alpha * eps / attack.eps)


@dataclass
class Measured:
    """The figures of one row, and the attacked images behind them."""

    conditions: dict  # {clean, transfer, white_box: {measure: (N,)}}
    fall: float  # of the mean cosine of some images with twice the steps
    recall_fall: list  # [how many of some images that kept their caption lose it with twice the steps, of how many]
    health: dict  # {what went wrong in the attacks: how often}
    lowest: torch.Tensor  # uint8 (N, 3, H, W), of each image the attacked one of the lowest cosine
    ranks: list  # of the own caption, for lowest
    outranked: dict  # {index: (pixels, cosine, rank)} where another attacked image loses its own caption more often
    chance: float  # R@1 of a random ranking
    alone: dict  # {attack of a front with several: (cosine, R@1) by it alone}
    acts: dict  # {condition: share of images on which the fronts act}, if they choose


def measure(row, attack, starts, seed, run=None):
    """Measure one row under every condition."""
    gallery = encode_row(row, row.pixels, REPORTED + seed)  # one attacked image stands among clean ones
    clean, transfer = (score(row, pixels, seed, gallery) for pixels in (row.pixels, row.transfer))
    print(f"{row.name}: clean R@1 {first_share(clean).mean():.2f}", flush=True)
    # the transferred images count as white-box, too; resized ones may have left the ball
    levels = common.grey_levels(attack.eps)
    low, high = np.maximum(row.pixels, levels) - levels, np.minimum(row.pixels, 255 - levels) + levels
    sets, wrong, members = [torch.from_numpy(row.transfer.clip(low, high))], [], {}
    for names in row.attacks():
        for start in range(starts):  # the transferred images, then noise
            begin = replace(attack, seed=seed + 7919 * start if start else None)
            found, problems = attack_both(begin, row, seed, run, names)
            members.setdefault(names, []).extend(range(len(sets), len(sets) + len(found)))
            sets, wrong = sets + found, wrong + problems
    chosen, reported = score_sets(row, sets, seed, gallery)
    cosine = np.stack([scored["similarity"] for scored in chosen])  # (sets, N)
    share = np.stack([standing(scored, "rank_i2t") for scored in chosen])

    # convergence is checked by the attack of the lowest cosine
    names = min(members, key=lambda names: cosine[members[names][0]].mean())
    first, few = sets[members[names][0]], row.part(slice(CONVERGENCE_IMAGES))
    longer, _ = attack_row(replace(attack, steps=2 * attack.steps), few, run, names)
    cosines = [score(few, pixels, seed)["similarity"].mean() for pixels in (first[:CONVERGENCE_IMAGES], longer)]
    white_box = worst_of(chosen, reported)
    recall_fall = check_survivors(row, attack, white_box, first, seed, run, names)

    by_cosine, by_rank, images, outranked = cosine.argmin(0), share.argmin(0), torch.stack(sets), {}
    for i, (low, last) in enumerate(zip(by_cosine, by_rank)):  # indices of the sets: lowest cosine, worst rank
        if np.ceil(share[low, i]) > np.ceil(share[last, i]):
            scored = reported[last]
            outranked[i] = images[last, i], float(scored["similarity"][i]), scored["rank_i2t"][i].tolist()
    every_image = np.arange(len(row.pixels))
    lowest = images[by_cosine, every_image]
    health = {key: sum(int(problems[key].sum()) for problems in wrong) for key in wrong[0]}
    health["max_abs_delta_grey_levels"] = int(common.linf_grey_levels(row.pixels, lowest).max())
    health["vanishing_gradient"] = count_vanishing(few.part(slice(row.clip.batch_size)), attack)
    conditions = {"clean": clean, "transfer": transfer, "white_box": white_box}
    ranks = [reported[which]["rank_i2t"][i].tolist() for i, which in enumerate(by_cosine)]
    chance = (1 / count_candidates(row)).mean().item()
    alone = {}
    for names, indices in members.items() if len(members) > 1 else ():
        worst = worst_of([chosen[i] for i in indices], [reported[i] for i in indices])
        alone["+".join(names)] = float(worst["similarity"].mean()), float(first_share(worst).mean())
    shown = zip(conditions, (row.pixels, row.transfer, lowest.numpy()))
    acts = {name: share_of_acts(row, pixels, seed) for name, pixels in shown}
    return Measured(
        conditions=conditions,
        fall=float(cosines[0] - cosines[1]),
        recall_fall=recall_fall,
        health=health,
        lowest=lowest,
        ranks=ranks,
        outranked=outranked,
        chance=chance,
        alone=alone,
        acts={} if None in acts.values() else acts,
    )


def check_survivors(row, attack, scored, lowest, seed, run=None, names=None):
    """Attack some images that kept their own caption with twice the steps: how many lose it, of how many."""
    survivors = np.flatnonzero(common.gather(first_share(scored))[0] >= 0.5)[:CONVERGENCE_IMAGES]
    if not len(survivors):
        return [0, 0]
    part = row.part(survivors)
    found, _ = attack_margin(replace(attack, steps=2 * attack.steps), part, lowest[survivors], seed, run, names)
    kept = first_share(worst_of(*score_sets(part, found, seed))) >= 0.5
    return [int((~kept).sum()), len(survivors)]


def count_vanishing(row, attack):
    """Count images at which the gradient of each attack is over 1e6 times smaller than without the fronts."""

    def size(row, names):
        images = as_images(row.transfer, row.clip.device).requires_grad_()
        with common.tf32(row.clip.precision != "fp32"):
            loss = row_loss(attack, row, names)(row.clip.attack_encoder(), np.arange(len(images)))(images)
            return torch.autograd.grad(loss.sum(), images)[0].abs().double().mean((1, 2, 3))

    if not row.fronts:
        return 0
    bare, defended = size(replace(row, fronts=()), ()), [size(row, names) for names in row.attacks()]
    return int((torch.stack(defended).amax(0) < 1e-6 * bare).sum())


@torch.no_grad()
def share_of_acts(row, pixels, seed):
    """Return the share of images on which the row's fronts act, over the draws; None where they do not choose."""
    found, size = [], row.clip.batch_size
    for front in row.fronts:
        for start in range(0, len(pixels), size) if front.acts else ():
            images = as_images(pixels[start : start + size], row.clip.device)
            generators = common.generators_for(REPORTED + seed, range(start, start + len(images)))
            acts = front.acts(row.original.encode_image, generators)
            found += [acts(images).float() for _ in range(front.draws[0])]
    return torch.cat(found).mean().item() if found else None


def save_white_box(folder, measured, images):
    """Save the images behind a row's white-box figures as PNGs, in the ImageFolder form.

    lowest/      of each image the one of the lowest cosine
    outranked/   of images that keep their own caption there the one that loses it
    """
    similarities = measured.conditions["white_box"]["similarity"].tolist()
    lowest = zip(measured.lowest, similarities, measured.ranks)
    saved = [("lowest", i, *found) for i, found in enumerate(lowest)]
    saved += [("outranked", i, *found) for i, found in measured.outranked.items()]
    for kind in ("lowest", "outranked"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    lines = []
    for kind, i, pixels, similarity, rank in saved:
        file = f"{kind}/{images.names[i]}.png"
        common.save(folder / file, Image.fromarray(pixels.numpy().transpose(1, 2, 0)))
        about = {"caption": images.captions[i][0], "coco_id": images.coco_ids[i]}
        about |= {"similarity": similarity, "rank_i2t": rank}
        lines.append(json.dumps({"file_name": file} | about) + "\n")
    common.save(folder / "metadata.jsonl", "".join(lines))


def improvement(clean, adversarial, clean_0, adversarial_0):
    """Return the share of the original's drop that a defence takes away: 1 - (clean - adv) / (clean_0 - adv_0).

    None where the original does not drop.
    """
    return None if clean_0 == adversarial_0 else 1 - (clean - adversarial) / (clean_0 - adversarial_0)


def interval(values, seed):
    """Return the 95 % percentile bootstrap interval of the mean over images (Efron & Tibshirani 1993)."""
    values, rng = np.asarray(values, float), np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=(100, len(values)))].mean(1) for _ in range(100)]  # 10,000 draws
    return np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()


def wilson(count, n):
    """Return the 95 % interval of a share, count of n (Wilson 1927); at 0 it is not [0, 0] like a bootstrap's."""
    z = 1.959964
    middle, half = count + z**2 / 2, z * math.sqrt(count * (n - count) / n + z**2 / 4)
    return [max(0.0, (middle - half) / (n + z**2)), min(1.0, (middle + half) / (n + z**2))]


def improvement_interval(lost, lost_0, seed):
    """Return the 95 % bootstrap interval of 1 - mean(lost) / mean(lost_0), both over the same draws of images.

    None where the original loses nothing in one of the draws.
    """
    lost, lost_0, rng = np.asarray(lost, float), np.asarray(lost_0, float), np.random.default_rng(seed)
    draws = [rng.integers(len(lost), size=(100, len(lost))) for _ in range(100)]
    if any((lost_0[d].mean(1) == 0).any() for d in draws):
        return None
    return np.quantile([1 - lost[d].mean(1) / lost_0[d].mean(1) for d in draws], [0.025, 0.975]).tolist()


def summarise(per_seed, seed, original=None):
    """Summarise a row: means, intervals over the images, recalls, success rates, drops, improvement over the original.

    per_seed   the conditions of measure() for each seed of the training: every figure is a mean over them, every
               interval one over the images of each image's mean
    original   the conditions of the original model
    """
    def mean(condition, figure):
        """Each image's mean over the seeds of figure(values of the condition), (N,)."""
        return np.mean([figure(conditions[condition]) for conditions in per_seed], axis=0)

    summary = {"n": len(per_seed[0]["clean"]["similarity"])}
    for name in CONDITIONS:
        similarity = mean(name, lambda values: values["similarity"])
        summary[f"{name}_similarity"] = float(similarity.mean())
        summary[f"{name}_interval"] = interval(similarity, seed)
        aside = "" if name == "clean" else "_not_attacked"  # the attacks aim at similarity and @1 alone
        summary[f"{name}_margin{aside}"] = float(mean(name, lambda values: values["margin"]).mean())
        for direction in ("i2t", "t2i"):
            ranks = np.array([conditions[name][f"rank_{direction}"] for conditions in per_seed])  # (seeds, N[, R])
            for k, rest in ((1, ""), (5, aside)):
                recall = float(((ranks >= 0) & (ranks < k)).sum() / (ranks >= 0).sum())  # over all captions
                summary[f"{name}_recall_{direction}@{k}{rest}"] = recall
            once = summary[f"{name}_recall_{direction}@1"]
            summary[f"{name}_recall_{direction}@1_interval"] = wilson(once * len(similarity), len(similarity))
        if name == "clean":
            continue
        rates = [success_rate(conditions["clean"], conditions[name]) for conditions in per_seed]
        summary[f"{name}_success_rate"] = None if None in rates else float(np.mean(rates))
        clean, adversarial = summary["clean_similarity"], summary[f"{name}_similarity"]
        # above 1 when the similarity turns negative
        summary[f"{name}_drop"] = (clean - adversarial) / clean if clean else None
        if original and name == "transfer":
            before = [original[kind]["similarity"] for kind in ("clean", name)]
            means = (float(values.mean()) for values in before)
            summary["improvement"] = improvement(clean, adversarial, *means)
            lost = mean("clean", lambda values: values["similarity"]) - similarity
            summary["improvement_interval"] = improvement_interval(lost, before[0] - before[1], seed)
    return summary


def success_rate(clean, attacked):
    """Return the share of images that no longer rank an own caption first, of those that did; None if none did.

    Of a random defence: of those that did in half of the draws, the part of these draws that is lost.
    """
    before, after = first_share(clean), first_share(attacked)
    right = before >= 0.5
    return float((before - after)[right].sum() / before[right].sum()) if right.any() else None


def summarise_rows(record, specs, seed):
    """Return {row: its summary} in the table's order.

    per_seed        {name: summary} of a row with several seeds
    above_chance    whether its clean R@1 is above that of a random ranking; else it has no improvement
    not_converged   whether more steps lower its white-box cosine by more than TOLERANCE, with any seed
    fall            the largest such fall
    recall_fall     how many of some images that kept their caption lose it with twice the steps, of how many; the most
    recall_not_converged   whether more than one does, with any seed
    """
    names = {}
    for name, spec in specs.items():
        names.setdefault(spec.row, []).append(name)
    original, rows = record["per_image"]["original"], {}
    for row, members in names.items():
        compared = original if row != "original" else None
        rows[row] = summarise([record["per_image"][name] for name in members], seed, compared)
        seeds = members if len(members) > 1 else []
        rows[row]["per_seed"] = {name: summarise([record["per_image"][name]], seed, compared) for name in seeds}
        chance = float(np.mean([record["chance"][name] for name in members]))
        rows[row] |= {"chance": chance, "above_chance": rows[row]["clean_recall_i2t@1_interval"][0] > chance}
        if not (rows[row]["above_chance"] and rows["original"]["above_chance"]):
            for summary in (rows[row], *rows[row]["per_seed"].values()):
                summary |= {key: None for key in summary if key.startswith("improvement")}
        fall = max(record["fall"][name] for name in members)
        checks = [check for name in members for check in record["sanity"].get(name, {}).get("checks", [])]
        unfinished = any(result == NOT_CONVERGED for _, result, _ in checks)
        rows[row] |= {"fall": fall, "not_converged": fall > TOLERANCE or unfinished}
        fallen = [record["recall_fall"][name] for name in members]
        rows[row]["recall_fall"] = max(fallen)
        rows[row]["recall_not_converged"] = max(count for count, _ in fallen) > 1
        seconds = [specs[name].seconds for name in members]
        rows[row]["training_seconds"] = None if None in seconds else float(np.mean(seconds))
        rows[row]["note"] = "; ".join(dict.fromkeys(note for name in members for note in record["notes"][name])) or None
        rows[row]["doubtful"] = any(record["doubtful"][name] for name in members)
        rows[row]["members"] = members
    return rows


def compare_rows(record, seed):
    """Compare every two rows on the same images: differences of white-box similarity and R@1, with 95 % intervals.

    Two rows are separated in similarity if the interval excludes zero by more than what more steps still take from
    either, and if no seed of the one lies among the seeds of the other. Where one of them is not above chance, all
    figures are None.
    """
    pairs, figures = [], ["similarity", "similarity_interval", "recall_i2t@1", "recall_i2t@1_interval", "separated"]
    for names in itertools.combinations(record["rows"], 2):
        rows = [record["rows"][name] for name in names]
        if not all(row["above_chance"] for row in rows):
            pairs.append({"rows": [*names]} | dict.fromkeys(figures))
            continue
        similarities, recalls = [], []  # of each row
        for row in rows:
            members = [record["per_image"][name]["white_box"] for name in row["members"]]
            similarities.append([values["similarity"] for values in members])
            recalls.append([first_share(values) for values in members])
        difference, recall = (np.mean(one, 0) - np.mean(other, 0) for one, other in (similarities, recalls))
        low, high = interval(difference, seed)
        slack = max(row["fall"] if row["not_converged"] else 0 for row in rows)
        means = [[float(values.mean()) for values in members] for members in similarities]
        overlap = max(means[0]) >= min(means[1]) and max(means[1]) >= min(means[0])
        pairs.append({"rows": [*names], "similarity": float(difference.mean()), "similarity_interval": [low, high]})
        pairs[-1] |= {"recall_i2t@1": float(recall.mean()), "recall_i2t@1_interval": interval(recall, seed)}
        pairs[-1]["separated"] = (low > slack or high < -slack) and not overlap
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# Sanity checks that an attack must pass before its figure is trusted

PASS, FAIL, NOT_CONVERGED = "PASS", "FAIL", "NOT CONVERGED"


def sanity(row, attack, seed, run=None):
    """Check the attack on one row (Carlini et al. 2019, arXiv:1902.06705, section 5): a dict with

    checks      [(check, PASS, FAIL or NOT CONVERGED, figures)]; attacks are compared on the same images, with TOLERANCE
    fall        by how much five times the steps, or three starts, lower the mean cosine
    eps_curve   [(grey levels, mean cosine, R@1)]
    """
    checks = []

    def similarity(pixels, seed=seed):
        return score(row, pixels, seed)["similarity"]

    def attacked(attack):
        """Similarities, and whether the own caption is first, (N,) each, under both attacks."""
        worst = under_attack(row, attack, seed, run)
        return worst["similarity"], first_share(worst)

    pixels_adv, wrong = attack_row(attack, row, run)
    base, first = attacked(attack)
    figure = float(base.mean())

    further, still = attacked(replace(attack, steps=5 * attack.steps))
    fall = float((base - further).mean())
    converged = fall <= TOLERANCE and first.sum() - still.sum() <= 1
    figures = f"{attack.steps} steps {figure:.3f}, five times as many {further.mean():.3f}"
    figures += f"; R@1 {first.mean():.2f}, {still.mean():.2f}"
    check = f"five times the steps lower the cosine by at most {TOLERANCE}, R@1 by at most one image"
    checks.append((check, PASS if converged else NOT_CONVERGED, figures))

    noise = (replace(attack, seed=seed + 7919 * which) for which in (1, 2))
    starts = [base, *(similarity(attack_row(start, row, run)[0]) for start in noise)]
    lowest = np.minimum.reduce(starts)
    converged, fall = (base - lowest).mean() <= TOLERANCE, max(fall, float((base - lowest).mean()))
    figures = f"{figure:.3f}, lowest of three for each image {lowest.mean():.3f}"
    checks.append((f"three starts lower it by at most {TOLERANCE}", PASS if converged else NOT_CONVERGED, figures))

    clean = score(row, row.pixels, seed)
    found = [(clean["similarity"], first_share(clean))]
    found += [attacked(scaled(attack, levels / 255)) for levels in EPS_CURVE[1:]]
    curve = [(levels, float(cosine.mean()), float(first.mean())) for levels, (cosine, first) in zip(EPS_CURVE, found)]
    recalls = [recall for *_, recall in curve]
    falls = all(larger <= smaller for smaller, larger in zip(recalls, recalls[1:]))
    figures = "R@1 " + ", ".join(f"{recall:.2f} at {levels}" for levels, _, recall in curve)
    checks.append(("R@1 falls with eps, to at most 0.05", PASS if falls and recalls[-1] <= 0.05 else FAIL, figures))

    signs = np.random.default_rng([seed, 99]).choice([-1, 1], row.pixels.shape)
    noisy = (row.pixels + common.grey_levels(attack.eps) * signs).clip(0, 255).astype(np.uint8)
    noise = float(similarity(noisy).mean())
    figures = f"{figure:.3f}, noise {noise:.3f}"
    checks.append(("it is stronger than random noise of its size", PASS if figure < noise else FAIL, figures))

    gap = similarity(row.transfer) - base
    figures = f"transfer minus white-box {gap.mean():+.3f}"
    checks.append(("transferred images are no stronger", PASS if gap.mean() >= -TOLERANCE else FAIL, figures))

    dead, broken = int(wrong["zero_gradient"].sum()), int(wrong["nonfinite"].sum())
    figures = f"{dead} images with a zero gradient, {broken} with a value that is not finite, of {len(row.pixels)}"
    checks.append(("gradients are there and finite", PASS if dead == broken == 0 else FAIL, figures))

    once, again = similarity(pixels_adv), similarity(pixels_adv, seed + 1)
    apart, shift = float(np.abs(again - once).max()), float((again - once).mean())
    same = abs(shift) <= TOLERANCE if any(row.draws) else apart < 1e-3
    figures = f"other draws change the mean by {shift:+.4f}, an image by at most {apart:.1e}"
    checks.append(("scores are reproducible", PASS if same else FAIL, figures))
    return {"checks": checks, "fall": fall, "eps_curve": curve}


# ---------------------------------------------------------------------------------------------------------------------
# Showing


def duration(seconds):
    """Return a time as the table shows it, '-' for None."""
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def percent(share):
    return "-" if share is None else f"{share:+.1%}"


def setting(record):
    args = record["args"]
    eps, alpha = (f"{args[key] * 255:.4g}/255" for key in ("eps", "alpha"))
    model = f"{args['model']} {args['pretrained']}".strip().replace(f"{common.ROOT}/", "")
    kinds = f"transfer: PGD, {args['steps']} steps of {alpha}; white-box: momentum PGD, {args['attack_steps']} steps"
    return f"{model}, n = {record['n']}, eps {eps}", kinds


def marks_of(record):
    """Return {row: its marks}, which MARKS explains."""
    marks, least = {}, record["rows"]["original"]["clean_recall_i2t@1"] / 3
    for name, row in record["rows"].items():
        failed = False
        for member in row["members"]:
            health, checks = record["health"][member], record["sanity"].get(member, {}).get("checks", [])
            failed |= any(health[problem] for problem in ("zero_gradient", "nonfinite", "vanishing_gradient"))
            failed |= any(result == FAIL for _, result, _ in checks)
        doubtful = row["clean_recall_i2t@1"] < least or not row["above_chance"] or row["doubtful"]
        marks[name] = " (!)" * failed + " (?)" * doubtful + " (*)" * bool(row["note"])
    return marks


MARKS = {
    "(!)": "its attack met gradients that vanish or are not finite, or it fails a sanity check: do not trust its "
    "white-box figures.",
    "(?)": "clean R@1 is under a third of the original's, or not above chance, or the weights may want another "
    "activation. Look for a configuration without the quick_gelu that they want, weights of another model, or captions "
    "that its text tower does not know.",
}


def report_of(record):
    """Return the report's figures where model, images and attack are the report's, else none."""
    same = ("model", "pretrained", "eval_data", "eps", "alpha", "steps")
    default = vars(parse_args([]))
    return REPORT if all(record["args"][key] == default[key] for key in same) else {}


def notes_on(record, marks, shown=str):
    """Return the notes under a table: what is not separated or not converged, of how many seeds, the marks."""
    pairs = [" ~ ".join(map(shown, pair["rows"])) for pair in record["paired"] if pair["separated"] is False]
    at_chance = [shown(name) for name, row in record["rows"].items() if not row["above_chance"]]
    if not pairs and not all(pair["separated"] is None for pair in record["paired"]):
        pairs = [f"none, every {'other ' if at_chance else ''}pair differs"]
    pairs += [f"pairs with {name}: -" for name in at_chance]
    notes = [f"Not separated in white-box cosine: {'; '.join(pairs) or '-'}."]
    falls = [f"{shown(name)} {row['fall']:.3f}" for name, row in record["rows"].items() if row["not_converged"]]
    if falls:
        what = "<= marks an attack that has not converged: more steps lower the mean cosine of some images further"
        notes.append(f"{shown(what)}: {'; '.join(falls)}.")
    checked = {name: row["recall_fall"] for name, row in record["rows"].items() if row["recall_fall"][1]}
    if checked:
        counts = "; ".join(f"{shown(name)} {fallen} of {count}" for name, (fallen, count) in checked.items())
        notes.append(f"Images that kept their caption and lose it with twice the steps: {counts}.")
    for name, row in record["rows"].items():
        notes += [shown(f"{name}: {text}") for member in row["members"][:1] for text in front_notes(record, member)]
    if any(row["training_seconds"] is not None and not row["per_seed"] for row in record["rows"].values()):
        notes.append("Each trained row is of one seed, which is one draw: --reproduce --seeds 3 trains it three times.")
    notes += [shown(f"{mark}: {text}") for mark, text in MARKS.items() if mark in "".join(marks.values())]
    notes += [f"(*) {shown(name)}: {shown(row['note'])}" for name, row in record["rows"].items() if row["note"]]
    return notes + ([f"transfer: {shown(record['transfer_note'])}"] if record["transfer_note"] else [])


def front_notes(record, member):
    """Return what is known of the fronts of a row's first seed: each attack alone, and where the fronts act."""
    notes = []
    if alone := record["alone"][member]:
        figures = (f"{name} {cosine:.3f}, {recall:.0%}" for name, (cosine, recall) in alone.items())
        notes.append(f"white-box cosine and R@1 by each attack alone: {'; '.join(figures)}.")
    if acts := record["acts"][member]:
        shares = ", ".join(f"{share:.0%} {CONDITIONS[kind][0]}" for kind, share in acts.items())
        notes.append(f"it takes for attacked and counters {shares} images.")
        if acts["clean"] > 0.5:
            notes.append("most clean images are taken for attacked: the authors' threshold does not suit this model.")
    return notes


def range_of(row, key):
    """Return the lowest and highest of a figure over the seeds of a row; None of none, or where it does not exist."""
    values = [summary[key] for summary in row["per_seed"].values()]
    return (min(values), max(values)) if values and None not in values else (None, None)


def console_table(record):
    """Return the table at 80 columns."""
    marks, report = marks_of(record), report_of(record)
    lines = [
        *setting(record),
        "",
        f"{'':20}{'clean':^13}{'transfer':^14}{'white-box':^16}{'improve-':>9}{'train':>7}",
        f"{'':20}{'cosine':>7}{'R@1':>6}{'cosine':>8}{'R@1':>6}{'cosine':>9}{'R@1':>7}{'ment':>8}{'time':>8}",
    ]

    def figures(row, values):
        """Cells of a line; values: (row's key) -> number or None."""
        bounds = "<=" if row["not_converged"] else "", "<=" if row["recall_not_converged"] else ""
        cells = []
        for kind, widths in (("clean", (7, 6)), ("transfer", (8, 6)), ("white_box", (9, 7))):
            texts = f"{values(f'{kind}_similarity'):.3f}", f"{values(f'{kind}_recall_i2t@1'):.0%}"
            texts = [bound * (kind == "white_box") + text for bound, text in zip(bounds, texts)]
            cells += [text.rjust(width) for text, width in zip(texts, widths)]
        return "".join(cells) + f"{percent(values('improvement')):>8}"

    for name, row in record["rows"].items():
        title = name + marks[name]
        if len(title) > 20:  # a line of its own
            lines.append(title)
            title = ""
        lines.append(f"{title:20}{figures(row, row.get)}{duration(row['training_seconds']):>8}")
        if row["per_seed"]:
            count = len(row["per_seed"])
            for which, word in enumerate(("lowest", "highest")):
                values = figures(row, lambda key, row=row, which=which: range_of(row, key)[which])
                lines.append(f"{f'  {word} of {count} seeds':20}{values}")
        if name in report:
            clean, adversarial, gain = report[name]
            title = f"  report{': ' + REPORT_NAMES[name] if name in REPORT_NAMES else ''}"
            lines.append(f"{title[:20]:20}{clean:7.3f}{'':6}{adversarial:8.3f}{'':22}{percent(gain):>8}")
        elif name in REPORT_NAMES:
            lines.append(f"  (the report's {REPORT_NAMES[name]})")
    if record["radii"]:
        (_, *header), *rows = radius_lines(record)
        lines += ["", f"{'R@1, cosine at':20}" + "".join(f"{cell:>12}" for cell in header)]
        lines += [f"{name[:20]:20}" + "".join(f"{cell:>12}" for cell in cells) for name, *cells in rows]
    lines.append("")
    for note in notes_on(record, marks):
        lines += textwrap.wrap(note, 80, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


NOTES = """\
In brackets 95 % intervals over the images, by bootstrap, of shares by Wilson's formula; of several seeds those of each
image's mean, and in parentheses the lowest and highest seed. transfer: attacked once on the original model. white-box:
the worst for each image of the transferred one and of momentum PGD on the defence itself, under the cosine loss and,
where an own caption still comes first, under the margin loss; for JPEG through a differentiable codec. R@1: an own
caption comes first. improvement: the share of the original model's drop of the cosine that the defence takes away,
under transfer. success: no own caption first, of the images that had one first when clean. Text to image: over all
captions, one attacked image among clean ones; not comparable with an attack on the whole gallery. Equal captions are
never wrong. training: wall time of one, offline images included. A model of another input size is attacked in its own
pixels; the transferred images reach it as files do, through its own preprocessing."""


def radius_curves(record):
    """Return the curves of --radii of the rows that have them, means over the seeds: {row: [(levels, cosine, R@1)]}."""
    curves = {}
    for name, row in record["rows"].items():
        if all(member in record["radii"] for member in row["members"]):
            points = [{point[0]: point[1:] for point in record["radii"][member]} for member in row["members"]]
            shared = sorted(set.intersection(*({*each} for each in points)))
            means = (np.mean([each[level] for each in points], 0) for level in shared)
            curves[name] = [(level, *map(float, mean)) for level, mean in zip(shared, means)]
    return curves


def radius_lines(record):
    """Return R@1 and similarity of every row at every radius as lines of a table, [[cell]], the header first."""
    curves = radius_curves(record)
    levels = sorted({point[0] for curve in curves.values() for point in curve})
    lines = [["R@1, cosine at"] + [f"{level:.4g}/255" if level else "clean" for level in levels]]
    for name, curve in curves.items():
        at = {level: f"{recall:.2f} {similarity:+.3f}" for level, similarity, recall in curve}
        lines.append([name] + [at.get(level, "-") for level in levels])
    return lines


def markdown(text):
    """Escape a text for Markdown, in one line."""
    return re.sub(r"[\\`*<>\[\]|~$&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))


def markdown_lines(lines):
    """Return a table in Markdown of lists of cells, the header first; short lines are filled up."""
    header, *rows = lines
    rows = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def markdown_table(record):
    """Return the text of table.md; where they are comparable, the report's figures stand beside ours."""
    marks, report = marks_of(record), report_of(record)
    kinds = {"clean": "clean", "transfer": "transfer", "white_box": "white-box"}
    header = ["defence", *(f"{label}: {what}" for label in kinds.values() for what in ("cosine", "R@1"))]
    header += ["improvement", "training"] + (["report: clean", "transfer", "improvement"] if report else [])
    more = ["text to image, R@1: clean", "transfer", "white-box", "success: transfer", "white-box"]
    lines, more_lines = [header], [["defence", *more]]
    for name, row in record["rows"].items():
        alias = f" (the report's {REPORT_NAMES[name]})" if name in REPORT_NAMES else ""
        title = markdown(name + alias + marks[name])
        bounds = {"white_box_similarity": row["not_converged"], "white_box_recall_i2t@1": row["recall_not_converged"]}

        def cell(key, form, row=row, bounds=bounds):
            """A figure with its interval, and its range over the seeds."""
            if row.get(key) is None:
                return "-"
            interval, (lowest, highest) = row.get(f"{key}_interval".replace("_similarity", "")), range_of(row, key)
            inside = f" [{', '.join(map(form, interval))}]" if interval else ""
            seeds = f" ({form(lowest)} to {form(highest)})" if lowest is not None else ""
            return (r"\<= " if bounds.get(key) else "") + f"{form(row[key])}{inside}{seeds}"

        cells = [title]
        for kind in kinds:
            cells += [cell(f"{kind}_similarity", "{:.3f}".format), cell(f"{kind}_recall_i2t@1", "{:.0%}".format)]
        cells += [cell("improvement", percent), duration(row["training_seconds"])]
        if name in report:
            clean, adversarial, gain = report[name]
            cells += [f"{clean:.4f}", f"{adversarial:.4f}", percent(gain)]
        lines.append(cells)
        keys = [*(f"{kind}_recall_t2i@1" for kind in kinds), "transfer_success_rate", "white_box_success_rate"]
        more_lines.append([title, *(cell(key, "{:.0%}".format) for key in keys)])
    table, more_table = markdown_lines(lines), markdown_lines(more_lines)
    notes = notes_on(record, marks, markdown)
    parts = [f"{markdown(', '.join(setting(record)))}.", table, *notes, more_table, NOTES]
    if record["radii"]:
        header, *rows = radius_lines(record)
        parts.append(markdown_lines([header, *([markdown(name), *cells] for name, *cells in rows)]))
    if record["sanity"]:
        parts.append(f"Sanity checks, {min(SANITY_IMAGES, record['n'])} images:")
        parts.append("\n".join(f"- {line}" for line in sanity_lines(record, markdown)))
    return "\n\n".join(parts) + "\n"


def sanity_lines(record, shown=str):
    """Return one line for each check: PASS, FAIL or NOT CONVERGED, with the figures."""
    checks = ((shown(name), *check) for name, row in record["sanity"].items() for check in row["checks"])
    return [f"{result}  {name}: {check}: {figures}" for name, check, result, figures in checks]


@contextmanager
def drawn(path, size, texts, *shape, spacing=None, **options):
    """Yield the axes (rows, columns) of a figure and texts as it can show them, and save it.

    texts     captions or names: in one line each, with ? for what no font of this machine has
    spacing   of matplotlib's subplots_adjust(); without it the layout follows the texts

    No matplotlibrc of the user's changes the figure.
    """
    texts = [" ".join(text.split()) for text in texts]
    fonts, missing = fonts_for({*"".join(texts)})
    texts = [text.translate(dict.fromkeys(map(ord, missing), "?")) for text in texts]
    # captions and names are not formulas
    with matplotlib.style.context(["default", {"text.parse_math": False, "font.family": fonts}]):
        figure = matplotlib.figure.Figure(size)
        yield figure.subplots(*shape, squeeze=False, **options), texts
        if spacing:
            figure.subplots_adjust(**spacing)
        else:
            figure.tight_layout()
        figure.savefig(path, dpi=110)


def fonts_for(characters):
    """Return the names of fonts that have the characters, matplotlib's own first, and the characters that none has."""
    fonts, missing = [], {*characters}
    for name in dict.fromkeys(["DejaVu Sans", *(font.name for font in matplotlib.font_manager.fontManager.ttflist)]):
        found = set()
        if missing and "LastResort" not in name.replace(" ", ""):  # whose glyphs stand for missing ones
            with suppress(OSError, RuntimeError):  # a damaged font
                font = matplotlib.font_manager.get_font(matplotlib.font_manager.findfont(name))
                found = {c for c in missing if c.isprintable() and font.scalable and font.get_char_index(ord(c))}
        fonts += [name] if found or not fonts else []
        missing -= found
    return fonts, missing


def draw_examples(path, row, pixels_adv, pixels_adv_jpeg):
    """Draw a few images clean, attacked, and through JPEG 30, with cosines and the caption that CLIP ranks first.

    First is the own caption where the table counts it as right, else the wrong one with the highest cosine.

    pixels_adv        attacked without JPEG
    pixels_adv_jpeg   attacked through JPEG 30
    """
    clip = row.clip
    clean, adv, adv_jpeg = (as_images(x, clip.device) for x in (row.pixels, pixels_adv, pixels_adv_jpeg))
    columns = {
        "clean": clean,
        "attacked": adv,
        "what was added, x 16": (0.5 + 16 * (adv - clean)).clamp(0, 1),
        "attack, then JPEG 30": jpeg(adv, 30),
        "attack knows JPEG 30": jpeg(adv_jpeg, 30),
    }
    spacing = {"left": 0.01, "right": 0.99, "top": 1 - 0.12 / len(clean), "bottom": 0.3 / len(clean), "hspace": 0.62}
    size, shape = (10, 2.9 * len(clean)), (len(clean), len(columns))
    with drawn(path, size, row.captions, *shape, spacing=spacing) as (axes, captions), torch.no_grad():
        text_features, wrong = clip.encode_text(row.captions), row.wrong_captions(slice(None))
        for column, (title, images) in zip(axes.T, columns.items()):
            cosines = (clip.encode_image(images) @ text_features.T).cpu()  # (B, M)
            hardest, first = cosines.masked_fill(~wrong, -torch.inf).max(1)
            for i, (axis, image) in enumerate(zip(column, images)):
                axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                if images is columns["what was added, x 16"]:
                    axis.set_xlabel(title, fontsize=8)
                    continue
                cosine = cosines[i, row.own[i]]
                right = cosine > hardest[i]
                caption = "own caption" if right else textwrap.shorten(captions[first[i]], 78)
                colour = "#2a7a2a" if right else "#b02020"
                text = f"{title}: {cosine:+.2f}\n" + textwrap.fill(f"first: {caption}", 28)
                axis.set_xlabel(text, fontsize=8, color=colour)
        for axis, own in zip(axes[:, 0], row.own):
            axis.set_title(captions[own], fontsize=9, loc="left")


CONDITIONS = {"clean": ("clean", "#4c72b0"), "transfer": ("transfer", "#dd8452"), "white_box": ("white-box", "#c44e52")}


def tick_labels(names, record):
    """Return labels of the rows for a figure, of these names; <= where the white-box attack has not converged."""
    rows = zip(names, record["rows"].values())
    return [textwrap.fill(name, 14) + ("\n(white-box <=)" if row["not_converged"] else "") for name, row in rows]


def draw_cosines(path, record):
    """Draw the distribution of the images' cosines as violins, for each row and condition, all seeds together."""
    rows = record["rows"]
    with drawn(path, (max(7, 1.3 * len(rows)), 4.4), rows) as (((axis,),), names):
        for k, (condition, (label, colour)) in enumerate(CONDITIONS.items()):
            values = [
                np.concatenate([record["per_image"][member][condition]["similarity"] for member in row["members"]])
                for row in rows.values()
            ]
            at = np.arange(len(rows)) + 0.29 * (k - 1)
            for body in axis.violinplot(values, at, widths=0.3, showextrema=False)["bodies"]:
                body.set(facecolor=colour, alpha=0.6)
            axis.plot(at, [np.median(each) for each in values], "o", color=colour, markersize=4, label=label)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_xticks(range(len(rows)), tick_labels(names, record), fontsize=9)
        axis.set_ylabel(f"cosine with the own caption,\n{record['n']} images, dots: medians")
        axis.legend(ncols=3, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def draw_curves(path, curves, count):
    """Draw similarity and R@1 against the radius: {row: [(grey levels, similarity, R@1)]}, over count images."""
    levels = sorted({point[0] for curve in curves.values() for point in curve})
    with drawn(path, (10, 4), curves, 1, 2) as ((axes,), names):
        for k, (axis, label) in enumerate(zip(axes, ("mean cosine with the own caption", "image-to-text R@1")), 1):
            for name, curve in zip(names, curves.values()):
                axis.plot([levels.index(point[0]) for point in curve], [point[k] for point in curve], ".-", label=name)
            axis.set_xticks(range(len(levels)), [f"{level:.4g}" for level in levels])
            axis.set(xlabel=f"radius in grey levels (eps = x/255), {count} images", ylabel=label)
        axes[1].legend(fontsize=8, frameon=False)


# ---------------------------------------------------------------------------------------------------------------------
# The table, made of one file for each row: rows/<row>-<key>.json


KINDS = "recall_fall", "health", "chance", "alone", "acts"  # of Measured, which the table takes as they are
WRITES = ["rows", "white_box", "table.md", "examples.png", "cosines.png", "eps_curves.png", "radii.png"]


def main(args):
    specs = list_rows(args)
    run = common.Run(args, __file__, "", WRITES)
    data = load_evaluation(args, specs)
    if args.reproduce:
        for spec in specs.values():
            if spec.training and not spec.fronts:
                script, flags = spec.training
                print(f"\n{Path(script.__file__).name}: {flags.output_dir}", flush=True)
                script.main(flags)
    for name, spec in specs.items():
        if spec.training:
            spec = identify(args, name, spec, data)
        specs[name] = replace(spec, key=common.digest([spec.key, common.digest(data.transfer)]))

    entries = {name: common.gather(read_entry(run.dir, name, spec))[0] for name, spec in specs.items()}
    missing = [name for name, entry in entries.items() if missing_parts(args, specs[name], entry)]
    if missing:
        run.begin(any_code=True)
    for name in missing:
        measure_row(args, run, name, specs[name], entries[name], data)

    record = collect(args, specs, entries) | {"args": run.record["args"], "transfer_note": data.note}
    record |= {"n": len(data.images), "coco_ids": [i for i in data.images.coco_ids if i is not None]}
    record["rows"] = summarise_rows(record, specs, args.seed)
    record["paired"] = compare_rows(record, args.seed)
    shown = common.digest([run.record["code"], markdown_table(record)])
    if run.done and common.read_record(run.dir / "metrics.json").get("shown") == shown:
        run.report_done()
        print(console_table(record))
        return
    run.begin(any_code=True)
    show(run, record)
    run.finish(common.pick_device(args.device), **record, shown=shown)
    print(f"\n{console_table(record)}\n\nin {run.dir}: table.md, metrics.json and figures")


def load_evaluation(args, specs=None):
    """Return the Evaluation of the original model; transferred images that are missing are made.

    specs   {name: Spec}: those of given models are identified before the first attack, which one of them may forbid
    """
    clip = load_clip(args)
    images = common.load_images(args, "eval", clip.geometry)
    row = Row("original", clip, images.pixels, images.pixels, *load_candidates(args.candidates, images))
    forgive_equal_captions(row, images.paths)  # exits before the first attack
    data = Evaluation(images, images.pixels, None, clip.geometry, clip.digest, clip.weights_digest)
    for name, spec in (specs or {}).items():
        if not spec.training:
            specs[name] = identify(args, name, spec, data)
    transfer, made = generate.adversarial_images(args, "eval", clip, images)
    return replace(data, transfer=transfer, note=made["note"])


def file_name(name, spec):
    """Return the name of the files of a row: its own, and the digest of all that its figures depend on."""
    plain = re.sub(r"[^\w.+-]+", "_", name).strip("._").lower()
    return f"{plain or 'row'}-{spec.key}"


def read_entry(folder, name, spec):
    """Read the file of a row: {"figures": {...}, "radii": {radius: {...}}, "sanity": {...}}; {} if there is none."""
    file = folder / "rows" / f"{file_name(name, spec)}.json"
    with common.exit_on_error(f"{file} is damaged: remove it"):
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def missing_parts(args, spec, entry):
    """Return what is asked for and not in a row's file: activation, figures, radii, sanity."""
    missing = ["activation"] * bool(spec.twin and "activation" not in entry)
    missing += ["figures"] * ("figures" not in entry)
    missing += [eps for eps in args.radii if common.radius_text(eps) not in entry.get("radii", {})]
    return missing + ["sanity"] * (args.sanity and "sanity" not in entry)


def measure_row(args, run, name, spec, entry, data):
    """Measure what is missing of a row, and store its file after each part."""
    code = {key: run.record[key] for key in ("code", "versions", "commit")}
    folder = run.dir / "white_box" / file_name(name, spec)
    row = replace(load_row(args, name, spec, data), keys=(spec.key, code["code"], code["versions"]))
    attack = row_attack(args, spec)

    def store():
        if not common.RANK:
            (run.dir / "rows").mkdir(exist_ok=True)
            common.save(run.dir / "rows" / f"{file_name(name, spec)}.json", entry)

    if spec.twin and "activation" not in entry:
        entry["activation"] = compare_activations(row, args.seed) | code
        store()
    if doubt := doubt_activation(spec, entry):
        print(f"note: {name}: {doubt}", flush=True)
    if "figures" not in entry:
        measured = measure(row, attack, args.restarts, args.seed, run)
        if not common.RANK:
            save_white_box(folder, measured, data.images)
        if name == "original":
            draw_original(args, run, row, measured)
        kinds = {kind: getattr(measured, kind) for kind in ("fall", *KINDS)}
        entry["figures"] = {"per_image": measured.conditions} | kinds | code
        store()
    for eps in args.radii:
        if common.radius_text(eps) not in entry.setdefault("radii", {}):
            worst = under_attack(row, scaled(attack, eps), args.seed, run)
            entry["radii"][common.radius_text(eps)] = {key: worst[key] for key in ("similarity", "rank_i2t")} | code
            store()
    if args.sanity and "sanity" not in entry:
        entry["sanity"] = sanity(row.part(slice(SANITY_IMAGES)), attack, args.seed, run) | code
        store()


def draw_original(args, run, row, measured):
    """Draw a few images of the original model, attacked without and through JPEG 30."""
    few = replace(row.part(slice(3)), fronts=(jpeg_front(30),))
    attacked_jpeg, _ = attack_row(common.white_box(args.eps, args.attack_steps, through_jpeg=True), few, run)
    if not common.RANK:
        draw_examples(run.dir / "examples.png", row.part(slice(3)), measured.lowest[:3], attacked_jpeg)


def collect(args, specs, entries):
    """Return what the table shows of the rows' files: {kind: {name: ...}}."""
    record = {kind: {} for kind in ("per_image", "fall", *KINDS, "sanity", "radii", "notes", "doubtful")}
    for name, entry in entries.items():
        figures = entry["figures"]
        per_image = {condition: as_arrays(scored) for condition, scored in figures["per_image"].items()}
        record["per_image"][name] = per_image
        for kind in KINDS:
            record[kind][name] = figures[kind]
        checks = entry["sanity"] if args.sanity else None
        if checks:
            record["sanity"][name] = checks
        record["fall"][name] = max(figures["fall"], checks["fall"] if checks else 0)
        if args.radii:
            raw = {eps: as_arrays(entry["radii"][common.radius_text(eps)]) for eps in sorted(args.radii)}
            record["radii"][name] = radius_curve(args, per_image, raw)
        doubt = doubt_activation(specs[name], entry)
        record["doubtful"][name] = bool(doubt)
        record["notes"][name] = [*specs[name].notes, *filter(None, [doubt])]
        if maker := common.other_maker(figures, __file__):
            record["notes"][name].append(f"measured by {maker}")
    return record


def as_arrays(scored):
    """Convert the score() result that a row's file holds to arrays."""
    kinds = {"similarity": np.float32, "margin": np.float32, "rank_i2t": int, "rank_t2i": int}
    return {key: np.array(values, kinds[key]) for key, values in scored.items() if key in kinds}


def radius_curve(args, per_image, raw):
    """Return a row's similarity and R@1 at each radius: [(grey levels, similarity, R@1)], the clean images first.

    raw   {radius: score() result under the attacks of that radius}

    At each radius an image counts as the worst one found in its ball, by the attacks of this radius and of all smaller
    ones, so that no curve rises; from --eps on also by the attack of the table.
    """
    keys = "similarity", "rank_i2t"
    worst = {key: per_image["clean"][key] for key in keys}
    curve = [(0, float(worst["similarity"].mean()), float(first_share(worst).mean()))]
    for eps, found in raw.items():
        table = [{key: per_image["white_box"][key] for key in keys}] if eps >= args.eps else []
        worst = worst_of([worst, found, *table])
        curve.append((round(eps * 255, 6), float(worst["similarity"].mean()), float(first_share(worst).mean())))
    return curve


def show(run, record):
    """Write the table and the figures, and print the sanity checks."""
    if common.RANK:
        return
    common.save(run.dir / "table.md", markdown_table(record))
    draw_cosines(run.dir / "cosines.png", record)
    curves = {name: record["sanity"][name]["eps_curve"] for name in record["rows"] if name in record["sanity"]}
    if curves:
        draw_curves(run.dir / "eps_curves.png", curves, min(SANITY_IMAGES, record["n"]))
    if record["radii"]:
        draw_curves(run.dir / "radii.png", radius_curves(record), record["n"])
    if record["sanity"]:
        for line in ["", *sanity_lines(record)]:
            print(textwrap.fill(line, 80, subsequent_indent=" " * 6))


if __name__ == "__main__":
    common.run_main(main, parse_args())
