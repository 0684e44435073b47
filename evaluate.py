#!/usr/bin/env python3
"""Every model and defence under every attack: the result table, its figures, and the checks that it must pass.

    python evaluate.py --reproduce --preset tiny    # the whole report on the embedded CLIP, minutes on a laptop
    python evaluate.py --reproduce                  # the whole report on CLIP ViT-L/14, on a GPU
    python evaluate.py --checkpoint fare4=hf-hub:chs20/fare4-clip --output_dir runs/report/with_fare
    python evaluate.py --preset tiny --qualities 75 50 30 random --sanity --output_dir runs/tiny/truth
    python evaluate.py --preset tiny --radii 1/255 2/255 4/255 8/255
    python evaluate.py --eval_data my_pictures --model ViT-B-16-quickgelu --output_dir runs/mine/evaluation

transfer    images attacked once on the original model, then shown to the defended one: the report's protocol
white-box   the worst, image by image, of the transferred image and of momentum PGD on the defence itself, end to end,
            under the cosine loss, then, where the own caption still comes first, under the margin loss. For JPEG that
            is the adaptive attack, through a differentiable codec; every score is on the real JPEG bytes

Files written to --output_dir (default runs/<preset>/evaluation); the stages' folders stand beside it:
    table.md, metrics.json (per image, too), examples.png, histogram.png, table.png, with --sanity eps_curves.png, with
    --radii radii.png
"""

import argparse
import itertools
import math
import os
import re
import textwrap
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import common
from common import as_images, attack_all, duration, fail, load_clip, load_examples, number
from eval_jpeg import differentiable_jpeg, jpeg, jpeg_quality, through

BACKEND = os.environ.pop("MPLBACKEND", None)  # a notebook's ends the import elsewhere; a figure in a file needs none
import matplotlib.figure  # noqa: E402
import matplotlib.style  # noqa: E402

if BACKEND:
    os.environ["MPLBACKEND"] = BACKEND

REPORT = {  # Adversarial Robustness Evaluation for CLIP Models, on CLIP ViT-L/14 and MMEB COCO: clean, transfer, gain
    "original": (0.2513, -0.1783, None),
    "MAT": (0.2417, 0.1067, 0.686),
    "caption-aware": (0.2507, 0.2349, 0.963),
    "JPEG 75": (0.2513, 0.1504, 0.765),
    "JPEG 50": (0.2513, 0.2147, 0.915),
    "JPEG 30": (0.2513, 0.2329, 0.957),
}
TRAINED = {"MAT": "mat", "caption-aware": "pgd", "FARE, online": "online"}  # row -> stage folder
STAGES = {  # stage folder -> the script that makes it, and its flags
    "mat": ["defend_clip_mat_v2.py"],
    "pgd": ["defend_clip_pgd_v2.py", "--loss_threshold", 0.1],
    "online": ["defend_clip_pgd_v2.py", "--online_steps", 2],
}
# flags that choose rows: a complete table is extended by them
ROW_FLAGS = ["qualities", "defence", "checkpoint", "adversarial_dir", "sanity", "radii"]
SANITY_IMAGES = 24
SETTLED = 0.02  # by so much may a longer search still lower the mean cosine
EPS_CURVE = [0, 1, 2, 4, 8, 16, 32, 64]  # grey levels


def checkpoint(text):
    """argparse type: NAME=PATH_OR_MODEL."""
    name, _, source = text.partition("=")
    source = common.expand_home(source)
    if "+" in name:
        raise argparse.ArgumentTypeError(f"{name!r} has a +, which joins the steps of --defence: choose another name")
    if not name or not (source.startswith(("local-dir:", "hf-hub:")) or Path(source).is_file()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=a file, NAME=local-dir:DIR or NAME=hf-hub:ORG/NAME")
    return name, source


def parse_args(argv=None):
    parser = common.make_parser(__doc__)
    flag = parser.add_argument_group("rows of the table").add_argument
    flag("--qualities", type=jpeg_quality, nargs="*", default=[75, 50, 30], help="a JPEG row each; random: from 30-75")
    flag("--defence", action="append", default=[], metavar="ROW+jpegQ", help="a row: JPEG before a model; repeatable")
    model = "a further row: checkpoint or bare visual tower for --model, local-dir:DIR, hf-hub:ORG/NAME; repeatable"
    flag("--checkpoint", action="append", default=[], type=checkpoint, metavar="NAME=PATH_OR_MODEL", help=model)
    flag("--adversarial_dir", help="of --split eval; if not given, adversarial_eval beside --output_dir")
    flag = parser.add_argument_group("measuring").add_argument
    flag("--attack_steps", type=number(1, 10**6), help="of the white-box attack; --steps are the transferred images'")
    flag("--restarts", type=number(1, 1000), default=1, help="white-box starts: the transferred images, then noise")
    flag("--candidates", choices=["evaluation", "mmeb"], default="evaluation", help="whose captions to retrieve from")
    radii = "radii of a curve of every row's R@1 and cosine"
    flag("--radii", type=common.radius, nargs="+", default=[], metavar="EPS", help=radii)
    flag("--sanity", action="store_true", help="run the battery of checks on every row, and mark those that fail")
    flag("--reproduce", action="store_true", help="first run every missing stage, each as its own command")
    return common.parse_flags(parser, argv, lambda _: "evaluation", lambda _: "eval")


def reproduce(args):
    """Run the stages, each as its own command; one that is complete and was made with these flags ends at once."""
    flags = f"{common.SHARED} overwrite"
    count = ["--num_images", args.num_images] if args.num_images else []
    generate, counts = "generate_pgd_adversarial.py", {"train": [], "eval": count}
    for split, words in counts.items():
        words = ["--split", split, *words]
        command = common.command_of(generate, args, f"adversarial_{split}", *words, flags=f"{flags} batch_size")
        common.run_script(command)
    for stage, (script, *words) in STAGES.items():
        common.run_script(common.command_of(script, args, stage, *words, flags=flags))


# ---------------------------------------------------------------------------------------------------------------------
# Rows: a model, what its images go through first, the images themselves, and the captions to retrieve from


@dataclass
class Spec:
    """A row of the table before anything is loaded."""

    source: str | None = None  # of load_clip(); None is the original model
    qualities: tuple = ()  # of the JPEG steps in front of it, in order; 'random' is drawn anew at each look
    seconds: float | None = None  # training time
    note: str | None = None  # what a reader of its figures must know


@dataclass
class Row:
    name: str
    clip: common.Clip
    pixels: object  # uint8 (N, 3, H, W), numpy
    transfer: object  # likewise, attacked on the original model: where an attack without a seed starts
    captions: list[str]  # to retrieve from, M distinct ones
    own: torch.Tensor  # (N,) index of each image's own caption
    allowed: torch.Tensor  # (N, M) bool: candidates of each image
    qualities: tuple = ()  # of Spec
    key: str = ""  # digest of row_key()

    def view(self, encode_image, seed, codec=jpeg, here=None):
        """encode_image of the whole defence; its random draws start from seed; here: slice of the images that come."""
        return through(codec, self.qualities, encode_image, seed, here and (len(self.pixels), here))

    def part(self, index):
        """The row with some of its images alone."""
        pixels, transfer = self.pixels[index], self.transfer[index]
        return replace(self, pixels=pixels, transfer=transfer, own=self.own[index], allowed=self.allowed[index])


def list_rows(args):
    """Return the rows in the table's order, {name: Spec}; those of trainings where they are finished."""
    specs = {"original": Spec()}
    for name, stage in TRAINED.items():
        folder = common.stage_folder(args, stage)
        if not (folder / "metrics.json").exists():
            print(f"no finished run in {folder}: the row {name} is left out")
            continue
        script, *words = STAGES[stage]
        command = common.command_of(script, args, stage, *words)
        record = common.require_same(folder, args, "model", "pretrained", "eps", "seed", command=command)
        if not (folder / "open_clip_config.json").is_file():
            again = common.command_line(*command, "--overwrite")
            fail(f"{folder} has no open_clip_config.json, and is no model of today. To make it again: {again}")
        specs[name] = Spec(f"local-dir:{folder}", (), record["training_seconds"], common.code_note(folder))
    taken = {"original", *TRAINED, *TRAINED.values(), *(f"JPEG {q}" for q in args.qualities)}
    for name, source in args.checkpoint:
        if name in taken:
            fail(f"--checkpoint {name}=...: there is a row of that name already; choose another")
        taken.add(name)
        specs[name] = Spec(source)
    short = {stage: name for name, stage in TRAINED.items()}  # --defence takes the name of a stage's folder, too
    defences = {f"JPEG {q}": f"original+jpeg{q}" for q in args.qualities} | {spec: spec for spec in args.defence}
    for name, text in defences.items():
        model, *steps = text.split("+")
        if name in taken and name in args.defence:
            fail(f"--defence {text}: there is a row of that name already; choose another")
        with common.about(f"--defence {text}: write MODEL+jpegQ, MODEL one of {', '.join(specs)}"):
            steps = tuple(jpeg_quality(re.fullmatch("jpeg(.+)", step)[1]) for step in steps)
            behind = specs[short.get(model, model)]
            specs[name] = replace(behind, qualities=behind.qualities + steps)
    return specs


def row_attack(args, spec):
    """Return the white-box attack of a row."""
    return common.white_box(args.eps, args.attack_steps, through_jpeg=bool(spec.qualities))


def row_key(args, spec, images, code):
    """Return what the figures of a row depend on, {part: checksum}: it is measured again where one differs.

    images   checksums of the evaluation images and of the transferred ones
    code     {part: code_checksums()} of what measures it and of the sanity checks
    """
    weights = []
    if not spec.source or not spec.source.startswith(common.SCHEMAS):  # the original model, or a file of weights for it
        weights = common.portable([args.model, args.pretrained])
        weights += common.model_checksums(args.model, args.pretrained).values()
    if spec.source:
        weights += common.source_checksums(spec.source).values()
    attack = [asdict(row_attack(args, spec)), spec.qualities, args.restarts, args.seed, args.precision]
    parts = {"weights": weights, "images": images, "captions": args.candidates, "attack": attack} | code
    if args.radii:
        parts["radii"] = [sorted(args.radii), common.code_checksums(__file__, "radius_curve")]
    return {name: common.digest(part) for name, part in parts.items()}


def check_leakage(name, clip, examples):
    """End if a model was trained on an evaluation image, as far as its weights say."""
    if leaked := clip.train_ids & {*common.known_ids(examples)}:
        fail(f"leakage: {name} was trained on {len(leaked)} of the evaluation images, such as {min(leaked)}")


def load_row(args, name, spec, original, examples):
    """Load a row of the table: the model, and in its own geometry the images of the original's row."""
    clip = load_clip(args, spec.source)
    check_leakage(name, clip, examples)
    row = replace(original, name=name, clip=clip, qualities=spec.qualities)
    if clip.geometry != original.clip.geometry:  # the same images in its own, the transferred ones as files reach it
        rows = examples.with_format(None).remove_columns("pixels")
        row.pixels = load_examples(args, "eval", rows, clip.geometry)[:]["pixels"]
        transform = common.to_geometry(clip.geometry)
        row.transfer = np.stack([transform(Image.fromarray(image.transpose(1, 2, 0))) for image in original.transfer])
    return forgive_equal_captions(row)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def load_candidates(kind, examples):
    """The captions to retrieve from, as a Row has them: captions, own, allowed."""
    own, right = examples["caption"][:], examples["captions"][:]
    lists = examples["texts"][:] if kind == "mmeb" else [list(itertools.chain(*right))] * len(own)
    captions = list(dict.fromkeys(itertools.chain(*lists)))
    # an image's further captions are no wrong answers
    sets = [{*texts} - {*captions_of[1:]} | {captions_of[0]} for texts, captions_of in zip(lists, right)]
    allowed = torch.tensor([[caption in texts for caption in captions] for texts in sets])
    if allowed.sum(1).min() < 2:
        fail("retrieval needs at least two different captions for each image: raise --num_images")
    return captions, torch.tensor([captions.index(caption) for caption in own]), allowed


def forgive_equal_captions(row):
    """Return a row in which captions that its tokenizer makes equal are not each other's wrong answers."""
    length = row.clip.tokenizer(row.captions[:1]).shape[1]
    tokens, whole = (row.clip.tokenizer(row.captions, context_length=size) for size in (length, 8 * length))
    padding = whole[0, -2]  # the last token may be one of its own
    cut = ((whole != padding).sum(1) > (tokens != padding).sum(1)).sum().item()
    if cut:
        print(f"{row.name}: {cut} of {len(row.captions)} captions are longer than its {length} tokens and are cut")
    _, groups = tokens.unique(dim=0, return_inverse=True)
    equal = groups[None] == groups[row.own][:, None]  # (N, M)
    equal.scatter_(1, row.own[:, None], False)
    return replace(row, allowed=row.allowed & ~equal)


def score(row, pixels, seed, gallery=None):
    """Every image against every caption: similarity, lead over the hardest other caption, ranks from 0; (N,) each.

    gallery   clean_gallery(row): text to image, each of these images is then looked for among clean other ones; without
              it, among each other
    """
    features = row.clip.encode_pixels(pixels, row.view(row.clip.encode_image, seed))
    cosines = (features @ row.clip.encode_text(row.captions).T).cpu()  # (N, M)
    own = row.own[:, None]
    similarity = cosines.gather(1, own)  # (N, 1)
    others = cosines.masked_fill(~row.allowed, -torch.inf).scatter(1, own, -torch.inf)
    by_caption = cosines[:, own[:, 0]].T if gallery is None else gallery  # (N, N): row i is caption i with every image
    other_images = by_caption.clone().fill_diagonal_(-torch.inf)
    return {
        "similarity": similarity[:, 0].numpy(),
        "margin": (similarity[:, 0] - others.amax(1)).numpy(),
        "rank_i2t": (others >= similarity).sum(1).numpy(),  # ties count against the model
        "rank_t2i": (other_images >= similarity).sum(1).numpy(),
    }


def clean_gallery(row, seed):
    """Return the cosines of each image's own caption (row) with every clean image (column): (N, N)."""
    features = row.clip.encode_pixels(row.pixels, row.view(row.clip.encode_image, seed))
    return (row.clip.encode_text([row.captions[i] for i in row.own]) @ features.T).cpu()


def attack_row(attack, row, run=None):
    """One attack on one row, from noise if it has a seed, else from the transferred images: pixels_adv, its health."""
    clip, encode = row.clip, row.clip.frozen()
    text_features = clip.encode_text(row.captions)
    own, allowed = row.own[:, None].to(clip.device), row.allowed.to(clip.device)

    def loss_at(here):
        # what is random is drawn anew in each step: the momentum is the expectation over it
        view = row.view(encode, attack.seed or 0, differentiable_jpeg, here)

        def margin(images):  # the lead of the hardest other caption over the own one
            cosines = view(images) @ text_features.T  # (B, M)
            others = cosines.masked_fill(~allowed[here], -torch.inf).scatter(1, own[here], -torch.inf)
            return others.amax(1) - cosines.gather(1, own[here])[:, 0]

        return margin if attack.loss == "margin" else common.own_caption(view, text_features[own[:, 0]])(here)

    start = row.transfer if attack.seed is None else None
    what = f"{row.name}, {attack.loss}" + ", bf16" * clip.bf16
    return attack_all(attack, loss_at, row.pixels, clip, start, run, what, keys=row.key)


def attack_both(attack, row, seed, run=None):
    """The cosine attack, and on its result the margin attack where the own caption is first: [pixels_adv], [health]."""
    lowest, health = attack_row(attack, row, run)
    ranks = common.gather(score(row, lowest, seed)["rank_i2t"])[0]  # rank 0's floats decide for all
    first, narrowest = np.flatnonzero(ranks == 0), lowest.clone()
    if not len(first):
        return [lowest], [health]
    from_lowest = replace(row.part(first), transfer=lowest[first])
    narrowest[first], health_margin = attack_row(replace(attack, loss="margin", seed=None), from_lowest, run)
    return [lowest, narrowest], [health, health_margin]


def measure(row, attack, starts, seed, run=None):
    """One row under every condition: {condition: {measure: (N,)}}, the images of lowest cosine, health."""
    gallery = clean_gallery(row, seed)
    clean, transfer = (score(row, pixels, seed, gallery) for pixels in (row.pixels, row.transfer))
    print(f"{row.name}: clean R@1 {(clean['rank_i2t'] == 0).mean():.2f}", flush=True)
    # the transferred images count as white-box, too, in the ball that those of another geometry may have left
    levels = common.grey_levels(attack.eps)
    low, high = np.maximum(row.pixels, levels) - levels, np.minimum(row.pixels, 255 - levels) + levels
    sets, healths = [torch.from_numpy(row.transfer.clip(low, high))], []
    for noise_seed in [None, *(seed + 7919 * which for which in range(1, starts))]:
        found, health = attack_both(replace(attack, seed=noise_seed), row, seed, run)
        sets, healths = sets + found, healths + health
    scored = [score(row, pixels, seed, gallery) for pixels in sets]
    every = {key: np.stack([values[key] for values in scored]) for key in transfer}  # (sets, N)
    worst = {key: values.max(0) if key.startswith("rank") else values.min(0) for key, values in every.items()}
    lowest = torch.stack(sets)[every["similarity"].argmin(0), torch.arange(len(row.pixels))]
    return {"clean": clean, "transfer": transfer, "white_box": worst}, lowest, common.sum_health(healths)


def radius_curve(row, args, conditions, run=None):
    """Return a row's similarity and R@1 at each of --radii: [(grey levels, similarity, R@1)], the clean images first.

    At each radius every image counts as the worst found in its ball, by the attack of that radius or of a smaller one,
    so that no curve rises; from --eps on also by that of the table.
    """
    scored = [conditions["clean"]]
    curve = [(0, *mean_worst(scored))]
    for eps in sorted(args.radii):
        attack = common.white_box(eps, args.attack_steps, through_jpeg=bool(row.qualities))
        found, _ = attack_both(attack, row, args.seed, run)
        scored += [score(row, pixels, args.seed) for pixels in found]
        table = [conditions["white_box"]] if eps >= args.eps else []
        curve.append((round(eps * 255, 6), *mean_worst(scored + table)))
    return curve


def mean_worst(scored):
    """Return mean similarity and image-to-text R@1 where each image counts as the worst of several score() results."""
    similarity = np.minimum.reduce([values["similarity"] for values in scored])
    ranks = np.maximum.reduce([values["rank_i2t"] for values in scored])
    return float(similarity.mean()), float((ranks == 0).mean())


def improvement(clean, adversarial, clean_0, adversarial_0):
    """Share of the original model's drop that a defence takes away: 1 - (clean - adv) / (clean_0 - adv_0)."""
    return 1 - (clean - adversarial) / (clean_0 - adversarial_0)


def interval(values, seed):
    """95 % percentile bootstrap interval of the mean over images (Efron & Tibshirani 1993): [low, high]."""
    values, rng = np.asarray(values, float), np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=(100, len(values)))].mean(1) for _ in range(100)]  # 10,000 draws
    return np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()


def wilson(count, n):
    """95 % interval of a share, count of n (Wilson 1927): [low, high]; unlike a bootstrap's it is not [0, 0] at 0."""
    z = 1.959964
    middle, half = count + z**2 / 2, z * math.sqrt(count * (n - count) / n + z**2 / 4)
    return [max(0.0, (middle - half) / (n + z**2)), min(1.0, (middle + half) / (n + z**2))]


def improvement_interval(lost, lost_0, seed):
    """95 % bootstrap interval of 1 - mean(lost) / mean(lost_0), both over the same draws of images: [low, high]."""
    lost, lost_0, rng = np.asarray(lost, float), np.asarray(lost_0, float), np.random.default_rng(seed)
    draws = [rng.integers(len(lost), size=(100, len(lost))) for _ in range(100)]
    return np.quantile([1 - lost[d].mean(1) / lost_0[d].mean(1) for d in draws], [0.025, 0.975]).tolist()


def summarise(conditions, seed, original=None):
    """Means, intervals, recalls, attack success rates and drops of one row; improvements over the original.

    conditions, original   measure()'s first result, of the row and of the original model
    """
    summary = {"n": len(conditions["clean"]["similarity"])}
    for name, values in conditions.items():
        summary[f"{name}_similarity"] = float(values["similarity"].mean())
        summary[f"{name}_interval"] = interval(values["similarity"], seed)
        aside = "" if name == "clean" else "_not_attacked"  # margins and @5 of images attacked for similarity and @1
        summary[f"{name}_margin{aside}"] = float(values["margin"].mean())
        for direction in ("i2t", "t2i"):
            first = values[f"rank_{direction}"] < 1
            summary[f"{name}_recall_{direction}@1"] = float(first.mean())
            summary[f"{name}_recall_{direction}@1_interval"] = wilson(int(first.sum()), len(first))
            summary[f"{name}_recall_{direction}@5{aside}"] = float((values[f"rank_{direction}"] < 5).mean())
        if name != "clean":
            right = conditions["clean"]["rank_i2t"] == 0
            wrong_now = values["rank_i2t"][right] > 0
            summary[f"{name}_success_rate"] = float(wrong_now.mean()) if right.any() else None
            clean, adversarial = summary["clean_similarity"], summary[f"{name}_similarity"]
            summary[f"{name}_drop"] = (clean - adversarial) / clean  # above 1 when the similarity turns negative
            if original:
                both = conditions, original
                lost, lost_0 = (each["clean"]["similarity"] - each[name]["similarity"] for each in both)
                before = (float(original[kind]["similarity"].mean()) for kind in ("clean", name))
                summary[f"improvement_{name}"] = improvement(clean, adversarial, *before)
                summary[f"improvement_{name}_interval"] = improvement_interval(lost, lost_0, seed)
    return summary


def compare_rows(per_row, seed):
    """Paired differences of white-box similarity and R@1 between every two rows, with 95 % bootstrap intervals."""
    pairs = []
    for rows in itertools.combinations(per_row, 2):
        one, other = (per_row[name]["white_box"] for name in rows)
        similarity = one["similarity"] - other["similarity"]
        recall = (one["rank_i2t"] < 1).astype(float) - (other["rank_i2t"] < 1)
        low, high = interval(similarity, seed)
        pairs.append({"rows": [*rows], "similarity": float(similarity.mean()), "similarity_interval": [low, high]})
        pairs[-1] |= {"recall_i2t@1": float(recall.mean()), "recall_i2t@1_interval": interval(recall, seed)}
        pairs[-1]["separated"] = not low <= 0 <= high
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# The sanity battery: what an attack's figure must survive before it is believed


def sanity(row, attack, seed, run=None):
    """Carlini et al. 2019 (arXiv:1902.06705), section 5, on one row: [(check, holds, figures)], its eps curve."""

    def attacked(**changes):
        return attack_row(replace(attack, **changes), row, run)

    def similarity(pixels, look=seed):
        return score(row, pixels, look)["similarity"]

    def under_both(**changes):
        """Similarities under the cosine attack, and whether the own caption is first under both attacks, (N,) each."""
        found, _ = attack_both(replace(attack, **changes), row, seed, run)
        scored = [score(row, pixels, seed) for pixels in found]
        return scored[0]["similarity"], np.maximum.reduce([values["rank_i2t"] for values in scored]) < 1

    pixels_adv, health = attacked()
    base, first = under_both()
    figure, (low, high) = float(base.mean()), interval(base, seed)
    text = f"{figure:.3f} [{low:.3f}, {high:.3f}]"

    further, still = under_both(steps=5 * attack.steps)
    # where no own caption is first any more, the cosine's further fall is printed alone: it cannot fall where it counts
    allowed = SETTLED if first.any() else math.inf
    holds = figure - further.mean() <= allowed and first.sum() - still.sum() <= 1
    fall = f"{attack.steps} steps {figure:.3f}, five times as many {further.mean():.3f}"
    fall += f"; R@1 {first.mean():.2f}, {still.mean():.2f}"
    checks = [(f"five times the steps lower it by at most {SETTLED} and one image", bool(holds), fall)]

    starts = [base, *(similarity(attacked(seed=seed + 7919 * which)[0]) for which in (1, 2))]
    worst = float(np.minimum.reduce(starts).mean())
    three = f"{figure:.3f}, of three {worst:.3f}"
    checks.append((f"three starts lower it by at most {SETTLED}", figure - worst <= allowed, three))

    clean = score(row, row.pixels, seed)
    looks = [(clean["similarity"], clean["rank_i2t"] < 1)]
    for levels in EPS_CURVE[1:]:  # as many steps, each as large a part of the radius
        looks.append(under_both(eps=levels / 255, alpha=attack.alpha * (levels / 255 / attack.eps)))
    curve = [(levels, float(cosine.mean()), float(first.mean())) for levels, (cosine, first) in zip(EPS_CURVE, looks)]
    falls = all(b[1] <= a[1] + 0.02 for a, b in zip(curve, curve[1:]))
    recalls = "R@1 " + ", ".join(f"{recall:.2f} at {levels}" for levels, _, recall in curve)
    checks.append(("larger eps ends in total failure", falls and curve[-1][2] <= 0.05, recalls))

    signs = np.random.default_rng([seed, 99]).choice([-1, 1], row.pixels.shape)
    noisy = (row.pixels + common.grey_levels(attack.eps) * signs).clip(0, 255).astype(np.uint8)
    noise = float(similarity(noisy).mean())
    checks.append(("the attack beats random noise of its size", figure < noise, f"{figure:.3f}, noise {noise:.3f}"))

    gap = similarity(row.transfer) - base
    transfers = f"transfer minus white-box {gap.mean():+.3f}"
    checks.append(("transfer does not beat white-box", interval(gap, seed)[1] >= 0, transfers))

    dead, broken = health["images_with_zero_gradients"], health["images_with_nonfinite_values"]
    counts = f"{dead} images with a zero gradient, {broken} with a value not finite, of {len(row.pixels)}"
    checks.append(("gradients are there and finite", dead == broken == 0, counts))

    again = similarity(pixels_adv, seed + 1)
    apart, mean = float(np.abs(base - again).max()), float(again.mean())
    same = low <= mean <= high if "random" in row.qualities else apart < 1e-3
    checks.append(("another look gives the same", same, f"{text}, again {mean:.3f}, an image by at most {apart:.1e}"))

    if row.clip.bf16:
        row.clip.bf16 = False
        exact = float(similarity(attacked()[0]).mean())
        row.clip.bf16 = True
        checks.append(("an fp32 attack is no stronger", exact >= low, f"bf16 {text}, fp32 {exact:.3f}"))
    return checks, curve


# ---------------------------------------------------------------------------------------------------------------------
# Showing


def percent(share):
    return "-" if share is None else f"{share:+.1%}"


def setting(record):
    args = record["args"]
    eps, alpha = (f"{args[key] * 255:.4g}/255" for key in ("eps", "alpha"))
    model = f"{args['model']} {args['pretrained']}".strip()
    kinds = f"transfer: PGD, {args['steps']} steps of {alpha}; white-box: momentum PGD, {args['attack_steps']} steps"
    return f"{model}, n = {record['n']}, eps {eps}", kinds


def marks_of(record):
    """{row: its marks}: (!) it failed a check or its attack lacked a gradient, (?) it may not be loaded as trained, (*)
    it has a note."""
    marks, least = {}, record["rows"]["original"]["clean_recall_i2t@1"] / 3
    for name, row in record["rows"].items():
        health, checks = record["health"][name], record["sanity"].get(name, {}).get("checks", [])
        failed = health["images_with_zero_gradients"] + health["images_with_nonfinite_values"] > 0
        failed |= any(not holds for _, holds, _ in checks)
        marks[name] = " (!)" * failed + " (?)" * (row["clean_recall_i2t@1"] < least) + " (*)" * bool(row["note"])
    return marks


DOUBT = """\
(?): clean R@1 is under a third of the original's. Look for a configuration without the quick_gelu that the weights
want, weights of another model, or captions that its text tower does not know."""


def report_of(record):
    """The report's figures, if model and budget are the report's."""
    same = ("model", "pretrained", "eval_data", "eps", "alpha", "steps")
    default = vars(parse_args([]))
    return REPORT if all(record["args"][key] == default[key] for key in same) else {}


def notes_on(record, marks, shown=str):
    """What stands under the table: the pairs of rows that are not separated, what (?) means, and the rows' notes."""
    pairs = [" ~ ".join(map(shown, pair["rows"])) for pair in record["paired"] if not pair["separated"]]
    what = "not separated in white-box similarity after these steps (95 % paired, over the images): "
    notes = [what + ("; ".join(pairs) or "none, every pair differs") + "."]
    notes += [DOUBT] if "(?)" in "".join(marks.values()) else []
    rows = {shown(name): row["note"] for name, row in record["rows"].items() if row["note"]}
    notes += [f"(*) {name}: {shown(note)}" for name, note in rows.items()]
    return notes + ([f"transfer: {shown(record['transfer_note'])}"] if record["transfer_note"] else [])


def console_table(record):
    """The table at 80 columns."""
    marks, report = marks_of(record), report_of(record)
    lines = [
        *setting(record),
        "",
        f"{'':21}{'similarity':^23}{'improvement':^16}{'R@1 i2t':^12}{'train':>8}",
        f"{'':21}{'clean':>7}{'transfer':>9}{'w-box':>7}{'transf.':>8}{'w-box':>8}{'clean':>6}{'w-box':>6}{'time':>8}",
    ]
    for name, row in record["rows"].items():
        cells = [f"{name[: 21 - len(marks[name])] + marks[name]:21}"]
        cells += [f"{row[f'{kind}_similarity']:{width}.3f}" for kind, width in zip(CONDITIONS, (7, 9, 7))]
        cells += [f"{percent(row.get(f'improvement_{kind}')):>8}" for kind in ("transfer", "white_box")]
        cells += [f"{row[f'{kind}_recall_i2t@1']:6.2f}" for kind in ("clean", "white_box")]
        lines.append("".join(cells) + f"{duration(row['training_seconds']):>8}")
        if name in report:
            clean, adversarial, gain = report[name]
            lines.append(f"{'  the report':21}{clean:7.3f}{adversarial:9.3f}{'':7}{percent(gain):>8}")
    if record["radii"]:
        (_, *header), *rows = radius_lines(record)
        lines += ["", f"{'R@1, cosine at':20}" + "".join(f"{cell:>12}" for cell in header)]
        lines += [f"{name[:20]:20}" + "".join(f"{cell:>12}" for cell in cells) for name, *cells in rows]
    lines.append("")
    for note in notes_on(record, marks):
        lines += [note] if " python " in note else textwrap.wrap(note, 80)  # a command is to be pasted as it stands
    return "\n".join(lines)


NOTES = """\
In brackets 95 % intervals over the images, by bootstrap, of shares by Wilson's formula. transfer: attacked once on the
original model. white-box: the worst for each image of the transferred one and of momentum PGD on the defence itself,
under the cosine loss and, where the own caption still comes first, under the margin loss; for JPEG through a
differentiable codec. improvement: the share of the original model's drop that the defence takes away. R@1: image to
text / text to image, where one attacked image stands among clean ones. success: own caption no longer first, of the
images whose own caption was first when clean. training: wall time, offline images included. A model of another input
size is attacked in its own pixels; the transferred images reach it as files do, through its own preprocessing. Where
R@1 is 0, the cosine still falls with further steps."""


def radius_lines(record):
    """R@1 and similarity of every row at every radius, as lines of a table: [[cell]], the header first."""
    curves = record["radii"]
    levels = sorted({point[0] for curve in curves.values() for point in curve})
    lines = [["R@1, cosine at"] + [f"{level:.4g}/255" if level else "clean" for level in levels]]
    for name, curve in curves.items():
        at = {level: f"{recall:.2f} {similarity:+.3f}" for level, similarity, recall in curve}
        lines.append([name] + [at.get(level, "-") for level in levels])
    return lines


def markdown(text):
    """A text as it stands, in one line, in a cell or outside."""
    return re.sub(r"[\\`*<>\[\]|~$&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))


def markdown_table(record):
    """table.md: with intervals, and the report's figures beside ours where they are comparable."""
    marks, report = marks_of(record), report_of(record)
    header = ["defence", "clean", "transfer", "white-box", "improvement transfer", "improvement white-box"]
    header += ["R@1 clean", "R@1 white-box", "success", "n", "training"]
    header += ["report: clean", "report: transfer", "report: improvement"] if report else []
    lines = [header, ["---"] * len(header)]
    for name, row in record["rows"].items():
        cells = [markdown(name + marks[name])]
        for kind in ("clean", "transfer", "white_box"):
            low, high = row[f"{kind}_interval"]
            cells.append(f"{row[f'{kind}_similarity']:.4f} [{low:.3f}, {high:.3f}]")
        for kind in ("transfer", "white_box"):
            gain, ends = row.get(f"improvement_{kind}"), row.get(f"improvement_{kind}_interval")
            cells.append(f"{percent(gain)} [{', '.join(map(percent, ends))}]" if ends else "-")
        for kind in ("clean", "white_box"):
            shares = []
            for direction in ("i2t", "t2i"):
                low, high = row[f"{kind}_recall_{direction}@1_interval"]
                shares.append(f"{row[f'{kind}_recall_{direction}@1']:.0%} [{low:.0%}, {high:.0%}]")
            cells.append(" / ".join(shares))
        success = row["white_box_success_rate"]
        cells += ["-" if success is None else f"{success:.0%}", str(row["n"]), duration(row["training_seconds"])]
        if name in report:
            clean, adversarial, gain = report[name]
            cells += [f"{clean:.4f}", f"{adversarial:.4f}", percent(gain)]
        lines.append(cells + [""] * (len(header) - len(cells)))
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    parts = [f"{markdown(', '.join(setting(record)))}.", table, NOTES, *notes_on(record, marks, markdown)]
    if record["radii"]:
        header, *rows = radius_lines(record)
        lines = [header, ["---"] * len(header), *([markdown(name), *cells] for name, *cells in rows)]
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    if record["sanity"]:
        parts.append(f"Sanity battery, {min(SANITY_IMAGES, record['n'])} images; (!) marks a row that fails a check:")
        parts.append("\n".join(f"- {line}" for line in sanity_lines(record, markdown)))
    return "\n\n".join(parts) + "\n"


def sanity_lines(record, shown=str):
    """One line a check: holds or not, with the figures."""
    checks = ((shown(name), *check) for name, row in record["sanity"].items() for check in row["checks"])
    return [f"{'holds' if holds else 'FAILS'}  {name}: {check}: {figures}" for name, check, holds, figures in checks]


@contextmanager
def drawn(path, size, *shape, **options):
    """The axes (rows, columns) of a figure, which is saved at the end; no matplotlibrc of the user's changes it."""
    # captions and names are not formulas
    with matplotlib.style.context(["default", {"text.parse_math": False}]):
        figure = matplotlib.figure.Figure(size)
        yield figure.subplots(*shape, squeeze=False, **options)
        figure.tight_layout()
        figure.savefig(path, dpi=110)


def draw_examples(path, row, pixels_adv):
    """Clean, adversarial, delta, and the adversarial image through JPEG 30, with captions and cosines."""
    clip, captions = row.clip, [row.captions[i] for i in row.own]
    clean, adv = (as_images(x, clip.device) for x in (row.pixels, pixels_adv))
    columns = {
        "clean": clean,
        "adversarial": adv,
        "delta, amplified 16 times": (0.5 + 16 * (adv - clean)).clamp(0, 1),
        "adversarial, JPEG 30": jpeg(adv, 30),
    }
    with drawn(path, (11, 2.95 * len(clean)), len(clean), 4) as axes, torch.no_grad():
        for column, (title, images) in zip(axes.T, columns.items()):
            cosines = (clip.encode_image(images) * clip.encode_text(captions)).sum(-1)
            for axis, image, cosine in zip(column, images, cosines):
                axis.imshow(image.permute(1, 2, 0).cpu().numpy())
                axis.set(xticks=[], yticks=[])
                axis.set_xlabel(title if title.startswith("delta") else f"{title}: {cosine:+.3f}", fontsize=9)
        for axis, caption in zip(axes[:, 0], captions):
            axis.set_title(caption, fontsize=9, loc="left")


CONDITIONS = {"clean": ("clean", "#4c72b0"), "transfer": ("transfer", "#dd8452"), "white_box": ("white-box", "#c44e52")}


def draw_histograms(path, record):
    """Distribution of the cosines of every row under every condition."""
    rows = record["per_image"]
    every = [value for row in rows.values() for scored in row.values() for value in scored["similarity"]]
    edges = np.linspace(min(every), max(every), 41)
    with drawn(path, (8, 1.35 * len(rows) + 0.9), len(rows), sharex=True) as axes:
        for axis, (name, row) in zip(axes[:, 0], rows.items()):
            for condition, (label, colour) in CONDITIONS.items():
                axis.hist(row[condition]["similarity"], edges, color=colour, alpha=0.55, label=label)
            axis.axvline(0, color="black", linewidth=0.6)
            axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
            axis.set_yticks([])
        axes[0, 0].legend(ncols=3, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
        axes[-1, 0].set_xlabel(f"cosine of an image with its own caption, {record['n']} images")


def draw_table(path, record):
    """The table's similarities as bars with their 95 % intervals."""
    rows = record["rows"]
    with drawn(path, (max(6.5, 1.25 * len(rows)), 4)) as ((axis,),):
        for k, (condition, (label, colour)) in enumerate(CONDITIONS.items()):
            means = np.array([row[f"{condition}_similarity"] for row in rows.values()])
            low, high = np.array([row[f"{condition}_interval"] for row in rows.values()]).T
            at = np.arange(len(rows)) + 0.27 * (k - 1)
            axis.bar(at, means, 0.25, color=colour, label=label, yerr=[means - low, high - means], capsize=2)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_xticks(range(len(rows)), [textwrap.fill(name, 14) for name in rows], fontsize=9)
        axis.set_ylabel("mean cosine with the own caption")
        axis.legend(ncols=3, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def draw_curves(path, curves, count):
    """Similarity and R@1 against the attack's radius: {row: [(grey levels, similarity, R@1)]}, over count images."""
    levels = sorted({point[0] for curve in curves.values() for point in curve})
    with drawn(path, (10, 4), 1, 2) as (axes,):
        for k, (axis, label) in enumerate(zip(axes, ("mean cosine with the own caption", "image-to-text R@1")), 1):
            for name, curve in curves.items():
                axis.plot([levels.index(point[0]) for point in curve], [point[k] for point in curve], ".-", label=name)
            axis.set_xticks(range(len(levels)), [f"{level:.4g}" for level in levels])
            axis.set(xlabel=f"radius in grey levels (eps = x/255), {count} images", ylabel=label)
        axes[1].legend(fontsize=8, frameon=False)


MEASURED = ["keys", "per_image", "health", "row_gradients", "sanity", "radii"]  # of metrics.json, each {row: ...}
OPTIONAL = ["sanity", "radii"]  # of these what --sanity and --radii ask for


def main(args):
    if args.reproduce:
        reproduce(args)
    rows, folder = common.load_rows(args, "eval"), common.adversarial_folder(args, "eval")
    specs = list_rows(args)
    code = common.code_checksums(__file__, "Row", "measure", "load_row", "load_candidates", "row_attack")
    run = common.Run(args, code, rows, extends=ROW_FLAGS)
    images = [rows["checksum"][:], common.adversarial_checksum(folder, rows), args.skip_bad_images]
    images += [rows["texts"][:]] if args.candidates == "mmeb" else []
    code = {"code": code, "sanity": common.code_checksums(__file__, "sanity")}
    keys = {name: row_key(args, spec, images, code) for name, spec in specs.items()}

    record = {"args": run.record["args"], "transfer_note": common.code_note(folder)}
    record["shown_by"] = common.digest(common.code_checksums(__file__))  # other code shows the same figures anew
    take_measured(run, record, keys)
    asked = ["per_image", *(kind for kind in OPTIONAL if getattr(args, kind))]
    missing = [name for name in keys if any(name not in record[kind] for kind in asked)]
    written = (run.dir / "table.md").exists()
    if run.previous and not missing and written and is_shown(record, run.previous, specs):
        run.report_complete()
        print(console_table(run.previous))
        return

    clip = load_clip(args)
    if missing:
        measure_rows(args, run, record, specs, keys, missing, clip, rows, folder)
    for kind in MEASURED:  # in the order of the table
        record[kind] = {name: record[kind][name] for name in specs if name in record[kind]}
    record["rows"] = {}
    for name, spec in specs.items():
        original = record["per_image"]["original"] if name != "original" else None
        summary = summarise(record["per_image"][name], args.seed, original)
        summary |= {"training_seconds": spec.seconds, "gradients": record["row_gradients"][name], "note": spec.note}
        record["rows"][name] = summary
    record |= {"n": record["rows"]["original"]["n"], "paired": compare_rows(record["per_image"], args.seed)}
    show(run, record)
    run.finish(clip, **record)
    print(f"\n{console_table(record)}\n\nin {run.dir}: table.md, metrics.json and figures")


def take_measured(run, record, keys):
    """Take over into the record what the folder's earlier table has measured under the same keys.

    Rows that are not asked for now go to "not_shown", so that they need not be measured again some other time.
    """
    previous = run.previous or {}
    unseen = previous.get("not_shown", {})
    earlier = {kind: unseen.get(kind, {}) | previous.get(kind, {}) for kind in MEASURED}
    record |= {kind: {} for kind in MEASURED} | {"not_shown": {kind: {} for kind in MEASURED}}
    record["coco_ids"] = previous.get("coco_ids")
    for name, was in earlier["keys"].items():
        target = record if name in keys else record["not_shown"]
        changed = [part for part, value in keys.get(name, was).items() if was.get(part) != value]
        if {*changed} - {*OPTIONAL}:
            why = ", ".join(f"code ({run.changed})" if part == "code" and run.changed else part for part in changed)
            print(f"{name} is measured again: other {why}")
            continue
        for kind in changed:
            if name in earlier[kind]:
                print(f"{name}: its figures of --{kind} are of other code or flags and are dropped")
        for kind in MEASURED:
            if name in earlier[kind] and kind not in changed:
                target[kind][name] = earlier[kind][name]
        target["per_image"][name] = {
            condition: {key: np.array(values, int if "rank" in key else np.float32) for key, values in scored.items()}
            for condition, scored in earlier["per_image"][name].items()
        }


def is_shown(record, previous, specs):
    """Return whether the folder's earlier table shows these rows, with these notes, by the code of now."""
    shown = [(name, row["note"], row["training_seconds"]) for name, row in previous["rows"].items()]
    same = all(record[key] == previous[key] for key in ("transfer_note", "shown_by"))
    return same and shown == [(name, spec.note, spec.seconds) for name, spec in specs.items()]


def measure_rows(args, run, record, specs, keys, missing, clip, rows, folder):
    """Measure the missing rows, and run their sanity checks, into the record.

    clip           the original model
    rows, folder   the evaluation images, and where the transferred ones lie
    """
    examples = load_examples(args, "eval", rows, clip.geometry)
    check_leakage("original", clip, examples)
    transfer = common.load_adversarial(folder, examples, args)
    original = Row("original", clip, examples[:]["pixels"], transfer, *load_candidates(args.candidates, examples))
    loaded = {None: forgive_equal_captions(original)}  # a row for each model; one behind JPEG has the model of another
    for name in missing:
        if specs[name].source not in loaded:
            loaded[specs[name].source] = load_row(args, name, specs[name], original, examples)

    unmeasured = [name for name in missing if name not in record["per_image"]]
    checks = 2 * (1 + 5) + 2 + 2 * len(EPS_CURVE)  # attacks on an image, five times the steps as five; see sanity()
    attacked = len(missing) * checks * min(SANITY_IMAGES, len(examples)) * args.sanity  # at most
    attacked += len(missing) * 2 * len(args.radii) * len(examples)
    attacked += len(unmeasured) * 2 * args.restarts * len(examples)  # both losses
    common.announce(clip, original.pixels, examples["caption"][:], attacked * args.attack_steps)
    for source, row in loaded.items():
        if source:
            common.check_gradient(row.clip, row.pixels, examples["caption"][:])
    run.require_space(1.1 * attacked * original.pixels[0].nbytes)

    record["coco_ids"] = common.known_ids(examples)
    for name in missing:
        spec, attack = specs[name], row_attack(args, specs[name])
        key = common.digest({part: value for part, value in keys[name].items() if part not in OPTIONAL})
        row = replace(loaded[spec.source], name=name, qualities=spec.qualities, key=key)
        if name in unmeasured:
            conditions, lowest, record["health"][name] = measure(row, attack, args.restarts, args.seed, run)
            record["per_image"][name], record["row_gradients"][name] = conditions, "bf16" if row.clip.bf16 else "fp32"
            if name == "original" and not common.RANK:
                draw_examples(run.dir / "examples.png", row.part(slice(4)), lowest[:4])
        if args.sanity:
            checks, curve = sanity(row.part(slice(SANITY_IMAGES)), attack, args.seed, run)
            record["sanity"][name] = {"checks": checks, "eps_curve": curve}
        if args.radii:
            record["radii"][name] = radius_curve(row, args, record["per_image"][name], run)
        record["keys"][name] = record["keys"].get(name, {}) | keys[name]


def show(run, record):
    """Write the table and the figures, and print the sanity checks."""
    if common.RANK:
        return
    common.save(run.dir / "table.md", markdown_table(record))
    draw_histograms(run.dir / "histogram.png", record)
    draw_table(run.dir / "table.png", record)
    count = min(SANITY_IMAGES, record["n"])
    curves = {name: row["eps_curve"] for name, row in record["sanity"].items()}
    for name, kind, n in (("eps_curves.png", curves, count), ("radii.png", record["radii"], record["n"])):
        (run.dir / name).unlink(missing_ok=True)  # of a run before
        if kind:
            draw_curves(run.dir / name, kind, n)
    if record["sanity"]:
        for line in ["", *sanity_lines(record)]:
            print(textwrap.fill(line, 80, subsequent_indent=" " * 7))


if __name__ == "__main__":
    common.run_main(main, parse_args())
