#!/usr/bin/env python3
"""Every model and defence under every attack: the result table, its figures, and the checks that it must pass.

    python evaluate.py --reproduce --preset tiny    # the whole report on the embedded CLIP, minutes on a laptop
    python evaluate.py --reproduce                  # the whole report on CLIP ViT-L/14, on a GPU
    python evaluate.py --checkpoint fare4=hf-hub:chs20/fare4-clip --output_dir runs/report/with_fare
    python evaluate.py --attack pgd apgd --attack_loss cosine margin --sanity --output_dir runs/report/truth

transfer    images attacked once on the original model, then shown to the defended one: the report's protocol
white-box   the worst, image by image, of the transferred image and of every attack asked for on the defence itself, end
            to end. For JPEG that is the adaptive attack: through the real codec with a straight-through backward,
            and through a differentiable codec; every score on the real JPEG bytes

--reproduce first runs each missing stage as the command that a user would type. --sanity runs the battery of Carlini et
al. 2019 (arXiv:1902.06705) on every row and marks those that fail. --rerun FILE prints the commands that made a
metrics.json.

Files written to --output_dir (default runs/<preset>/evaluation); the stages' folders stand beside it:
    table.md, metrics.json (per image, too), examples.png, histogram.png, table.png, with --sanity eps_curves.png
"""

import argparse
import copy
import io
import math
import re
import shlex
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

import common
from common import as_images, attack_all, encode_all, fail, jpeg, load_clip, load_examples, number

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False  # captions and names are not formulas
from matplotlib import pyplot as plt  # noqa: E402

REPORT = {  # Adversarial Robustness Evaluation for CLIP Models, on CLIP ViT-L/14 and MMEB COCO: clean, transfer
    "original": (0.2513, -0.1783),
    "MAT": (0.2417, 0.1067),
    "caption-aware": (0.2507, 0.2349),
    "JPEG 75": (0.2513, 0.1504),
    "JPEG 50": (0.2513, 0.2147),
    "JPEG 30": (0.2513, 0.2329),
}
TRAINED = {"MAT": "mat", "caption-aware": "pgd", "caption-aware, online": "online"}  # row -> stage folder
RANDOM_QUALITIES = 30, 75  # of JPEG random, both included
DRAWS = 10_000  # of the bootstrap
EPS_CURVE = [0, 1, 2, 4, 8, 16, 32, 64]  # grey levels


def checkpoint(text):
    """argparse type: NAME=PATH_OR_MODEL."""
    name, _, source = text.partition("=")
    if not name or not source:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE, NAME=local-dir:DIR or NAME=hf-hub:ORG/NAME")
    if not source.startswith(("local-dir:", "hf-hub:")) and not Path(source).is_file():
        raise argparse.ArgumentTypeError(f"{source} is no file; models are given as local-dir:DIR or hf-hub:ORG/NAME")
    return name, source


def quality(text):
    """argparse type: a JPEG quality from 1 to 95, or 'random'."""
    return text if text == "random" else number(1, 95)(text)


def parse_args(argv=None):
    parser = common.make_parser(__doc__)
    group = parser.add_argument_group("rows of the table")
    group.add_argument(
        "--qualities",
        type=quality,
        nargs="*",
        default=[75, 50, 30],
        help="a JPEG row each; random: drawn anew from 30-75 for each image (default: 75 50 30)",
    )
    group.add_argument(
        "--defence",
        action="append",
        default=[],
        metavar="ROW+jpegQ",
        help="a further row: JPEG in front of a model, such as caption-aware+jpeg50 or online+jpegrandom; repeatable",
    )
    group.add_argument(
        "--checkpoint",
        type=checkpoint,
        action="append",
        default=[],
        metavar="NAME=PATH_OR_MODEL",
        help="a further row: checkpoint or bare visual tower for --model, local-dir:DIR, hf-hub:ORG/NAME; repeatable",
    )
    group.add_argument("--adversarial_dir", help="of --split eval (default: adversarial_eval beside --output_dir)")
    group = parser.add_argument_group("white-box attack: every combination is run, and the worst kept for each image")
    group.add_argument("--attack", nargs="+", choices=["pgd", "apgd"], default=["pgd", "apgd"], help="(default: both)")
    group.add_argument(
        "--attack_loss",
        nargs="+",
        choices=["cosine", "margin"],
        default=["cosine"],
        help="cosine with the own caption; margin: the own caption's lead over the hardest other (default: cosine)",
    )
    group.add_argument("--restarts", type=number(1), default=1, help="random starts (default: %(default)s)")
    group.add_argument(
        "--differentiable_jpeg",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="attack JPEG rows through a differentiable codec, too; scores stay on the real bytes",
    )
    group.add_argument(
        "--eot", type=number(1), default=4, help="draws averaged in each step against randomness (default: %(default)s)"
    )
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--candidates",
        choices=["evaluation", "mmeb"],
        default="evaluation",
        help="captions to retrieve from: those of the evaluation images, or MMEB's own list for each row (evaluation)",
    )
    group.add_argument("--sanity", action="store_true", help="run the battery of checks on every row")
    group.add_argument("--sanity_images", type=number(2), default=24, help="images in it (default: %(default)s)")
    group = parser.add_argument_group("reproduction")
    group.add_argument("--reproduce", action="store_true", help="run every missing stage first")
    group.add_argument(
        "--rerun",
        metavar="METRICS",
        help="print the commands that made the run of this metrics.json, its inputs' first, and run nothing (none)",
    )
    group.add_argument("--num_train_images", type=number(1), help="images trained on (default: %(default)s)")
    group.add_argument("--train_batch_size", type=number(1), help="of the trainings (default: %(default)s)")
    group.add_argument("--val_images", type=number(1), help="of the trainings (default: %(default)s)")
    group.add_argument("--epochs", type=number(1), help="of the trainings (default: %(default)s)")
    group.add_argument("--lr", type=number(0, kind=float), help="of the trainings (default: %(default)s)")
    group.add_argument("--online_images", type=number(1), help="of the online training (default: %(default)s)")
    group.add_argument("--online_lr", type=number(0, kind=float), help="of the online training (default: %(default)s)")
    threshold = {"type": number(0, kind=float), "default": 0.1}
    group.add_argument("--loss_threshold", **threshold, help="of the offline caption-aware training (%(default)s)")
    group.add_argument("--online_steps", type=number(0), default=3, help="of the online training; 0: no such row (3)")
    return common.parse_flags(parser, argv, stage="evaluation", images="eval", batch="attack")


def reproduce(args):
    """Run the stages, each as its own command; one that is complete and was made with these flags ends at once."""
    default = parse_args(["--preset", args.preset])
    given = {key for key, value in vars(args).items() if value != getattr(default, key)}

    def command(script, stage, flags, **values):
        words = [script, *(["--preset", args.preset] if args.preset != "report" else [])]
        words += [word for key, value in values.items() for word in (f"--{key}", str(value))]
        for key in flags.split():
            if key in given:
                words += [f"--{key}"] if getattr(args, key) is True else [f"--{key}", str(getattr(args, key))]
        folder = Path(args.output_dir).parent / stage
        return folder, words + (["--output_dir", str(folder)] if "output_dir" in given else [])

    shared = "model pretrained precision device train_data eval_data image_root sample_seed skip_bad_images"
    shared += " num_workers cache_dir eps alpha steps seed deterministic overwrite"
    attack, training = f"{shared} batch_size", f"{shared} val_images"
    sizes = {"num_images": args.num_train_images} if "num_train_images" in given else {}

    def epochs(lr):
        short = f"{lr:.0e}".replace("e-0", "e-")
        lr = short if float(short) == lr else lr
        return {"batch_size": args.train_batch_size, "lr": lr, "epochs": args.epochs}

    offline = {**epochs(args.lr), **sizes}
    online = {"online_steps": args.online_steps, "online_start": "noise", "num_images": args.online_images}
    stages = [
        command("generate_pgd_adversarial.py", "adversarial_train", attack, split="train", **sizes),
        command("generate_pgd_adversarial.py", "adversarial_eval", f"{attack} num_images", split="eval"),
        command("defend_clip_mat_v2.py", "mat", training, **offline),
        command("defend_clip_pgd_v2.py", "pgd", training, **offline, loss_threshold=args.loss_threshold),
        command("defend_clip_pgd_v2.py", "online", training, **epochs(args.online_lr), **online),
    ]
    for folder, words in stages:
        if folder.name != "online" or args.online_steps:
            common.run_script(words)


def commands_behind(file, seen):
    """Yield the commands that made the run of a metrics.json, its inputs' first, as they were typed; each once."""
    record = common.read_record(file)
    argv, processes, commit = (record.get(key) for key in ("argv", "processes", "commit"))
    typed = isinstance(argv, list) and all(isinstance(word, str) for word in argv)
    if not typed or not (common.ROOT / Path(argv[0]).name).is_file() or not isinstance(processes, int):
        fail(f"--rerun {file}: it does not say by which of these scripts it was made")
    for source in map(Path, record["inputs"]):
        made = (source if source.is_dir() else source.parent) / "metrics.json"
        if made.is_file() and made.resolve() not in seen:
            yield from commands_behind(made, seen)
    seen.add(file.resolve())
    start = ["python"] if processes == 1 else ["torchrun", f"--nproc_per_node={processes}"]
    line = f"{shlex.join([*start, *argv])}  # commit {commit}"
    if not line.isprintable():
        fail(f"--rerun {file}: its command holds characters that cannot be printed")
    yield line


# ---------------------------------------------------------------------------------------------------------------------
# Rows: a model, and what its images go through first


@dataclass
class Row:
    name: str
    clip: common.Clip
    qualities: tuple = ()  # of the JPEG steps in front of it, in order; 'random' is drawn anew at each look
    seconds: float | None = None  # training time

    def view(self, encode_image, seed, codec=jpeg):
        """encode_image of the whole defence; its random draws start from seed, an int or a list of them."""
        draws = np.random.default_rng(seed)

        def encode(images):
            for q in self.qualities:
                low, high = RANDOM_QUALITIES
                images = codec(images, draws.integers(low, high + 1, len(images)) if q == "random" else q)
            return encode_image(images)

        return encode

    @property
    def randomised(self):
        return "random" in self.qualities


def build_rows(args, clip, stages, trained, examples):
    """The rows of the table, in its order."""
    models = {"original": clip}
    rows = [Row("original", clip)]
    taken = {"original", *TRAINED, *TRAINED.values(), *(f"JPEG {q}" for q in args.qualities)}
    for name, _ in args.checkpoint:
        if name in taken:
            fail(f"--checkpoint {name}=...: there is a row of that name already; choose another")
        taken.add(name)
    refuse_leaked(clip, args.pretrained or args.model, examples)
    files = [(name, str(stages / folder / "best.pt")) for name, folder in trained.items()]
    for name, source in [*files, *args.checkpoint]:
        model = models[name] = models[TRAINED.get(name, name)] = load_clip(args, source)
        refuse_leaked(model, source, examples)
        rows.append(Row(name, model, seconds=training_seconds(stages, trained[name]) if name in trained else None))
    rows += [Row(f"JPEG {q}", clip, (q,)) for q in args.qualities]
    for spec in args.defence:
        name, *steps = spec.split("+")
        known = {key.lower(): key for key in models}
        if name.lower() not in known or not steps or not all(step.startswith("jpeg") for step in steps):
            fail(f"--defence {spec}: write MODEL+jpegQ, MODEL one of {', '.join(models)}")
        try:
            rows.append(Row(spec, models[known[name.lower()]], tuple(quality(step[4:]) for step in steps)))
        except argparse.ArgumentTypeError as error:
            fail(f"--defence {spec}: {error}")
    return rows


def refuse_leaked(clip, source, examples):
    leaked = clip.train_ids & set(examples.coco_ids)
    if leaked:
        fail(f"leakage: {source} was trained on {len(leaked)} of the evaluation images, such as {min(leaked)}")


def training_seconds(stages, stage):
    """Wall time of a training, the offline adversarial images included."""
    record, offline = common.read_record(stages / stage / "metrics.json"), stages / "adversarial_train" / "metrics.json"
    seconds = record.get("training_seconds", 0)
    if record.get("adversarial_dir") and offline.exists():
        seconds += common.read_record(offline).get("seconds", 0)
    return seconds


def differentiable_jpeg(images, quality):
    """jpeg() with a gradient that knows of the quantisation: (B, 3, H, W) float32 in [0, 1], both ways.

    Baseline JPEG as Pillow writes it (4:2:0) and libjpeg reads it, in floats. Coefficients are rounded in the forward
    pass; the backward pass takes the derivative of the cubic of Shin & Song 2017 ("JPEG-resistant adversarial images"),
    which tells which coefficients a small change can move.
    """
    height, width = images.shape[2:]
    x = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate") * 255
    to_ycc = x.new_tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    luma, *chroma = torch.einsum("ij,bjhw->bihw", to_ycc, x).split(1, 1)
    n = torch.arange(8, device=x.device)
    dct = torch.cos((2 * n[None] + 1) * n[:, None] * math.pi / 16) * 0.5  # (8, 8), orthonormal
    dct[0] = 8**-0.5
    tables = [quantisation_tables(int(q)) for q in np.broadcast_to(quality, len(x))]

    def quantise(plane, kind):  # (B, 1, H, W)
        table = x.new_tensor([pair[kind] for pair in tables]).view(-1, 1, 1, 8, 8)
        blocks = plane[:, 0].unfold(1, 8, 8).unfold(2, 8, 8)  # (B, H / 8, W / 8, 8, 8)
        c = dct @ blocks @ dct.T / table
        rounded = c.round().detach()
        cubic = (c - rounded) ** 3
        blocks = dct.T @ ((rounded + cubic - cubic.detach()) * table) @ dct
        return blocks.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)[:, None]

    planes = [quantise(luma - 128, 0) + 128]
    for plane in chroma:
        half = quantise(F.avg_pool2d(plane, 2), 1)
        planes.append(F.interpolate(half, scale_factor=2, mode="bilinear", align_corners=False))
    rgb = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(to_ycc), torch.cat(planes, 1))
    return (rgb[..., :height, :width] / 255).clamp(0, 1)


def quantisation_tables(quality):
    """Pillow's luma and chroma tables of a quality, 64 numbers each, row by row."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG", quality=quality)
    return [list(table) for table in Image.open(buffer).quantization.values()]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


@dataclass
class Candidates:
    """The captions to retrieve from."""

    captions: list[str]  # M distinct ones
    own: torch.Tensor  # (N,) index of each image's own caption
    allowed: torch.Tensor  # (N, M) bool: candidates of each image


def load_candidates(args, examples):
    lists = [examples.captions] * len(examples)
    if args.candidates == "mmeb":
        flag, table, rows = common.open_split(args, "eval")
        row_of = {coco_id: row for row, _, coco_id in rows}
        lists = common.read_column(flag, table.select([row_of[i] for i in examples.coco_ids]), "tgt_text")
        for coco_id, texts in zip(examples.coco_ids, lists):
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                fail(f"{flag}: row {row_of[coco_id]}: tgt_text holds something that is no text")
        lists = [[text.strip() for text in texts] for texts in lists]
    if len({text for texts in lists for text in texts}) < 2:
        fail("retrieval needs at least two different captions: raise --num_images")
    index = {caption: i for i, caption in enumerate(dict.fromkeys(text for texts in lists for text in texts))}
    allowed = torch.zeros(len(examples), len(index), dtype=torch.bool)
    for i, texts in enumerate(lists):
        allowed[i, [index[text] for text in texts]] = True
    return Candidates(list(index), torch.tensor([index[caption] for caption in examples.captions]), allowed)


def score(row, pixels, candidates, args):
    """Every image against every caption: similarity, lead over the hardest other caption, ranks from 0; (N,) each."""
    clip = row.clip
    text_features = clip.encode_text(candidates.captions)
    features = encode_all(row.view(clip.encode_image, args.seed), pixels, args)
    cosines = (features @ text_features.T).cpu()  # (N, M)
    own = candidates.own[: len(cosines), None]
    similarity = cosines.gather(1, own)  # (N, 1)
    others = cosines.masked_fill(~candidates.allowed[: len(cosines)], -torch.inf).scatter(1, own, -torch.inf)
    by_caption = cosines[:, own[:, 0]].T  # (N, N): row i is caption i against every image
    return {
        "similarity": similarity[:, 0].numpy(),
        "margin": (similarity[:, 0] - others.amax(1)).numpy(),
        "rank_i2t": (others >= similarity).sum(1).numpy(),  # ties count against the model
        "rank_t2i": (by_caption >= by_caption.diagonal()[:, None]).sum(1).numpy() - 1,
    }


def attack_loss(kind, row, candidates):
    """cosine: the report's loss. margin: the lead of the hardest other caption over the own one.

    returns   (encode_image, slice of the examples) -> loss_fn of their images for pgd()
    """
    text_features = row.clip.encode_text(candidates.captions)
    own = candidates.own.to(text_features.device)
    allowed = candidates.allowed.to(text_features.device)

    def margin(image_features, here):
        cosines = image_features @ text_features.T
        others = cosines.masked_fill(~allowed[here], -torch.inf).scatter(1, own[here, None], -torch.inf)
        return others.amax(1) - cosines.gather(1, own[here, None])[:, 0]

    if kind == "cosine":
        return lambda encode_image, here: common.own_caption(encode_image, text_features[own])(here)
    return lambda encode_image, here: lambda images: margin(encode_image(images), here)


def attack_row(row, examples, candidates, args, method="pgd", loss="cosine", restart=0, codec=jpeg, run=None):
    """One attack on one row: pixels_adv, its score and its health; what a killed run has kept is not attacked again."""
    key = [row.name, row.clip.bf16, len(examples), args.eps, args.alpha, args.steps]
    key += [method, loss, restart, codec.__name__]
    kept = run and run.kept(key)
    if kept:
        return kept["pixels"], score(row, kept["pixels"], candidates, args), kept["health"]
    encode, loss_of = row.clip.frozen(), attack_loss(loss, row, candidates)
    draws = args.eot if row.randomised else 1  # expectation over transformation, Athalye et al. 2018

    def loss_at(here):
        once = row.view(encode, [args.seed, 1 + restart, here.start], codec)
        return loss_of(lambda images: torch.stack([once(images) for _ in range(draws)]).mean(0), here)

    options = {"seed": 7919 * restart, "auto": method == "apgd", "what": f"{row.name}, {method}, {loss}"}
    pixels_adv, health = attack_all(loss_at, examples, args, **options)
    if run and not common.RANK:
        run.keep(key, {"pixels": pixels_adv, "health": health})
    return pixels_adv, score(row, pixels_adv, candidates, args), health


def attacks_on(row, args):
    """The attacks of --attack, --attack_loss, --restarts and, on JPEG rows, both backward passes."""
    codecs = {"straight-through": jpeg}
    if row.qualities and args.differentiable_jpeg:
        codecs["differentiable"] = differentiable_jpeg
    for codec_name, codec in codecs.items():
        for method in args.attack:
            for loss in args.attack_loss:
                for restart in range(args.restarts):
                    name = f"{method}, {loss}, start {restart}" + (f", {codec_name}" if row.qualities else "")
                    yield name, {"method": method, "loss": loss, "restart": restart, "codec": codec}


def measure(row, examples, transfer, candidates, args, run=None):
    """One row under every condition: {condition: {measure: (N,)}}, the worst images, {attack: mean}, health."""
    conditions = {"clean": score(row, examples.pixels, candidates, args)}
    conditions["transfer"] = score(row, transfer, candidates, args)
    worst, pixels_worst = dict(conditions["transfer"]), transfer.clone()
    means, healths = {}, []
    for name, options in attacks_on(row, args):
        pixels_adv, scored, health = attack_row(row, examples, candidates, args, **options, run=run)
        means[name] = float(scored["similarity"].mean())
        healths.append(health)
        lower = scored["similarity"] < worst["similarity"]
        pixels_worst[torch.from_numpy(lower)] = pixels_adv[torch.from_numpy(lower)]
        for key, keep in (("similarity", np.minimum), ("margin", np.minimum), ("rank_i2t", np.maximum)):
            worst[key] = keep(worst[key], scored[key])
        del pixels_adv  # not beside those of the next attack
    worst["rank_t2i"] = score(row, pixels_worst, candidates, args)["rank_t2i"]
    return conditions | {"white_box": worst}, pixels_worst, means, common.sum_health(healths)


def improvement(clean, adversarial, clean_0, adversarial_0):
    """Share of the original model's drop that a defence takes away: 1 - (clean - adv) / (clean_0 - adv_0)."""
    return 1 - (clean - adversarial) / (clean_0 - adversarial_0)


def drop(clean, adversarial):
    """Share of the clean similarity that an attack takes away; above 1 when the similarity turns negative."""
    return (clean - adversarial) / clean


def interval(values, seed):
    """95 % percentile bootstrap interval of the mean over images (Efron & Tibshirani 1993): [low, high]."""
    values, rng = np.asarray(values, float), np.random.default_rng(seed)
    shares = [
        len(part) for part in np.array_split(range(DRAWS), math.ceil(len(values) / 10))
    ]  # 100,000 picks at a time
    means = [values[rng.integers(len(values), size=(share, len(values)))].mean(1) for share in shares]
    return np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()


def summarise(conditions, seed):
    """Means, intervals, recalls, attack success rates and margins of one row."""
    summary = {"n": len(conditions["clean"]["similarity"])}
    for name, values in conditions.items():
        summary[f"{name}_similarity"] = float(values["similarity"].mean())
        summary[f"{name}_interval"] = interval(values["similarity"], seed)
        summary[f"{name}_margin"] = float(values["margin"].mean())
        for direction in ("i2t", "t2i"):
            for k in (1, 5):
                summary[f"{name}_recall_{direction}@{k}"] = float((values[f"rank_{direction}"] < k).mean())
        summary[f"{name}_recall_i2t@1_interval"] = interval(values["rank_i2t"] < 1, seed)
        if name != "clean":
            summary[f"{name}_success_rate"] = float((values["rank_i2t"] > 0).mean())  # own caption no longer first
    return summary


def compare_rows(per_row, seed):
    """Paired differences of white-box similarity and R@1 between every two rows, with 95 % bootstrap intervals."""
    pairs, names = [], list(per_row)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            one, other = per_row[a]["white_box"], per_row[b]["white_box"]
            similarity = one["similarity"] - other["similarity"]
            recall = (one["rank_i2t"] < 1).astype(float) - (other["rank_i2t"] < 1)
            low, high = interval(similarity, seed)
            pairs.append({"rows": [a, b], "similarity": float(similarity.mean()), "similarity_interval": [low, high]})
            pairs[-1] |= {"recall_i2t@1": float(recall.mean()), "recall_i2t@1_interval": interval(recall, seed)}
            pairs[-1]["separated"] = not low <= 0 <= high
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# The sanity battery: what an attack's figure must survive before it is believed


def sanity(row, examples, transfer, candidates, args, means, run=None):
    """Carlini et al. 2019, section 5, on one row: [(check, holds, figures)], its eps curve [(eps, similarity, R@1)].

    means   {attack: mean similarity} of the row's attacks in the table: the battery questions the strongest
    """
    strongest = min(means, key=means.get)
    options = dict(attacks_on(row, args))[strongest] | {"loss": "cosine"}

    def attacked(restart=0, **budget):
        changed = copy.copy(args)
        vars(changed).update(budget)
        return attack_row(row, examples, candidates, changed, **options | {"restart": restart}, run=run)

    def mean(scored):
        return float(scored["similarity"].mean())

    pixels_adv, base, health = attacked()
    figure, (low, high) = mean(base), interval(base["similarity"], args.seed)
    checks = []

    steps, inside, (least, most), text = args.steps, False, (low, high), f"{args.steps} steps {figure:.3f}"
    while not inside and steps < 25 * args.steps:  # until five times the steps change little
        scored = attacked(steps=5 * steps)[1]
        inside = least <= mean(scored) <= most
        least, most = interval(scored["similarity"], args.seed)
        steps *= 5
        text += f", {steps} steps {mean(scored):.3f}"
    text += f", interval [{low:.3f}, {high:.3f}]"
    if not inside or steps > 5 * args.steps:
        text += f": not converged with {args.steps} steps, " + (f"but with {steps // 5}" if inside else "nor with more")
    checks.append(("more steps move it less than its interval", inside and steps == 5 * args.steps, text))

    starts = [scored["similarity"] for scored in (base, attacked(1)[1], attacked(2)[1])]
    restarts = float(np.minimum.reduce(starts).mean())  # a plain float, so that metrics.json takes what is compared
    text = f"1 start {figure:.3f}, worst of 3 {restarts:.3f}, interval [{low:.3f}, {high:.3f}]"
    checks.append(("more restarts move it less than its interval", low <= restarts <= high, text))

    curve = []
    for levels in EPS_CURVE:
        if levels == 0:
            scored = score(row, examples.pixels, candidates, args)
        elif levels == round(args.eps * 255):
            scored = base
        else:  # as many steps, each as large a part of the radius
            scored = attacked(eps=levels / 255, alpha=args.alpha * (levels / 255) / args.eps)[1]
        curve.append((levels, mean(scored), float((scored["rank_i2t"] < 1).mean())))
    falls = all(b[1] <= a[1] + 0.02 for a, b in zip(curve, curve[1:]))
    text = "R@1 " + ", ".join(f"{recall:.2f} at {levels}" for levels, _, recall in curve)
    checks.append(("larger eps ends in total failure", falls and curve[-1][2] <= 0.05, text))

    signs = common.start_noise(args.seed + 99, range(len(examples)), examples.pixels.shape[1:]).sign()
    clean = as_images(np.asarray(examples.pixels), "cpu")
    noise = mean(score(row, common.to_pixels(clean + args.eps * signs, examples.pixels, args.eps), candidates, args))
    checks.append(("the attack beats random noise of its size", figure < noise, f"{figure:.3f}, noise {noise:.3f}"))

    gap = score(row, transfer, candidates, args)["similarity"] - base["similarity"]
    transfers = f"transfer minus white-box {gap.mean():+.3f}"
    checks.append(("transfer does not beat white-box", interval(gap, args.seed)[1] >= 0, transfers))

    dead, broken = health["images_with_zero_gradients"], health["images_with_nonfinite_values"]
    text = f"{dead} images with a zero gradient, {broken} with a value not finite, of {len(examples)}"
    checks.append(("gradients are there and finite", dead == broken == 0, text))

    view, images = row.view(row.clip.encode_image, args.seed), as_images(pixels_adv, row.clip.device)
    with torch.no_grad():
        apart = (view(images) - view(images)).abs().max().item()
    if row.randomised:
        checks.append(("randomness is averaged over", args.eot > 1, f"{args.eot} draws a step"))
    else:
        checks.append(("the same image gives the same features", apart < 1e-3, f"largest difference {apart:.1e}"))

    if row.clip.bf16:
        row.clip.bf16 = False
        exact = mean(attacked()[1])
        row.clip.bf16 = True
        text = f"bf16 {figure:.3f}, fp32 {exact:.3f}, interval [{low:.3f}, {high:.3f}]"
        checks.append(("an fp32 attack is no stronger", exact >= low, text))
    return checks, curve


# ---------------------------------------------------------------------------------------------------------------------
# Showing


def duration(seconds):
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min" if seconds < 600 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def percent(share):
    return "-" if share is None else f"{share:+.1%}"


def setting(record):
    args = record["args"]
    eps, alpha = (f"{args[key] * 255:.4g}/255" for key in ("eps", "alpha"))
    model = f"{args['model']} {args['pretrained']}".strip().replace(f"{common.ROOT}/", "")
    kinds = f"{' + '.join(args['attack']).upper()}, {' + '.join(args['attack_loss'])} loss, {args['restarts']} start(s)"
    return f"{model}, n = {record['n']}\n{kinds}, {args['steps']} steps, eps {eps}, alpha {alpha}"


def marked(record, name):
    """The row's name, with a mark if it failed a check, or if its attack lacked a gradient somewhere."""
    health = record["health"][name]
    failed = health["images_with_zero_gradients"] + health["images_with_nonfinite_values"] > 0
    failed |= any(not holds for _, holds, _ in record["sanity"].get(name, {}).get("checks", []))
    return f"{name} (!)" if failed else name


def report_of(record):
    """The report's figures, if model and budget are the report's."""
    same = ("model", "pretrained", "eval_data", "eps", "alpha", "steps")
    default = vars(parse_args([]))
    return REPORT if all(record["args"][key] == default[key] for key in same) else {}


def report_gain(name):
    return None if name == "original" else improvement(*REPORT[name], *REPORT["original"])


def not_separated(record, shown=str):
    pairs = [" ~ ".join(map(shown, pair["rows"])) for pair in record["paired"] if not pair["separated"]]
    return "not separated in white-box similarity (95 % paired): " + ("; ".join(pairs) or "none, every pair differs")


def console_table(record):
    """The table at 80 columns."""
    lines = [
        setting(record),
        "",
        f"{'':21}{'similarity':^23}{'improvement':^16}{'R@1 i2t':^12}{'train':>8}",
        f"{'':21}{'clean':>7}{'transfer':>9}{'w-box':>7}{'transf.':>8}{'w-box':>8}{'clean':>6}{'w-box':>6}{'time':>8}",
    ]
    for name, row in record["rows"].items():
        cells = [f"{marked(record, name)[:21]:21}{row['clean_similarity']:7.3f}{row['transfer_similarity']:9.3f}"]
        cells.append(f"{row['white_box_similarity']:7.3f}")
        cells += [f"{percent(row.get(f'improvement_{kind}')):>8}" for kind in ("transfer", "white_box")]
        cells += [f"{row[f'{kind}_recall_i2t@1']:6.2f}" for kind in ("clean", "white_box")]
        lines.append("".join(cells) + f"{duration(row['training_seconds']):>8}")
        if name in report_of(record):
            clean, adversarial = REPORT[name]
            lines.append(f"{'  the report':21}{clean:7.3f}{adversarial:9.3f}{'':7}{percent(report_gain(name)):>8}")
    return "\n".join([*lines, "", *textwrap.wrap(not_separated(record), 80)])


NOTES = """\
In brackets 95 % bootstrap intervals over the images. transfer: attacked once on the original model. white-box: the
worst for each image of the transferred one and of every attack on the defence itself; for JPEG straight through the
real codec, and through a differentiable one. improvement: the share of the original model's drop that the defence takes
away. R@1, R@5: image to text / text to image. success: own caption no longer first. training: wall time, offline images
included.
"""


def markdown(text):
    """A text as it stands, in one line, in a cell or outside."""
    return re.sub(r"[\\`*<>\[\]|~$&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))


def markdown_table(record):
    """table.md: with intervals, and the report's figures beside ours where they are comparable."""
    report = report_of(record)
    header = ["defence", "clean", "transfer", "white-box", "improvement transfer", "improvement white-box"]
    header += ["R@1 clean", "R@1 white-box", "R@5 white-box", "success", "margin", "n", "training"]
    header += ["report: clean", "report: transfer", "report: improvement"] if report else []
    lines = [header, ["---"] * len(header)]
    for name, row in record["rows"].items():
        cells = [markdown(marked(record, name))]
        for kind in ("clean", "transfer", "white_box"):
            low, high = row[f"{kind}_interval"]
            cells.append(f"{row[f'{kind}_similarity']:.4f} [{low:.3f}, {high:.3f}]")
        cells += [percent(row.get(f"improvement_{kind}")) for kind in ("transfer", "white_box")]
        for kind, k in (("clean", 1), ("white_box", 1), ("white_box", 5)):
            cells.append(f"{row[f'{kind}_recall_i2t@{k}']:.0%} / {row[f'{kind}_recall_t2i@{k}']:.0%}")
        cells += [f"{row['white_box_success_rate']:.0%}", f"{row['white_box_margin']:+.3f}"]
        cells += [str(row["n"]), duration(row["training_seconds"])]
        if name in report:
            cells += [*(f"{value:.4f}" for value in report[name]), percent(report_gain(name))]
        lines.append(cells + [""] * (len(header) - len(cells)))
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    text = f"{markdown(setting(record).replace(chr(10), ', '))}.\n\n{table}\n\n{NOTES}\n"
    text += f"{not_separated(record, markdown)}.\n"
    if record["sanity"]:
        text += f"\nSanity battery, {record['args']['sanity_images']} images; (!) marks a row that fails a check:\n\n"
        text += "".join(f"- {line}\n" for line in sanity_lines(record, markdown))
    return text


def sanity_lines(record, shown=str):
    """One line a check: holds or not, with the figures."""
    return [
        f"{'holds' if holds else 'FAILS'}  {shown(name)}: {check}: {figures}"
        for name, row in record["sanity"].items()
        for check, holds, figures in row["checks"]
    ]


def draw_examples(path, examples, adversarial, clip):
    """Clean, adversarial, delta, and the adversarial image through JPEG 30, with captions and cosines."""
    count = min(4, len(examples))
    text_features = clip.encode_text(examples.captions[:count])
    clean, adv = (common.as_images(p[:count], clip.device) for p in (examples.pixels, adversarial))
    columns = {
        "clean": clean,
        "adversarial": adv,
        "delta, amplified 16 times": (0.5 + 16 * (adv - clean)).clamp(0, 1),
        "adversarial, JPEG 30": jpeg(adv, 30),
    }
    figure, axes = plt.subplots(count, 4, figsize=(11, 2.95 * count), squeeze=False)
    for j, (title, images) in enumerate(columns.items()):
        with torch.no_grad():
            cosines = (clip.encode_image(images) * text_features).sum(-1)
        for i in range(count):
            axes[i, j].imshow(images[i].permute(1, 2, 0).cpu().numpy())
            axes[i, j].set(xticks=[], yticks=[])
            axes[i, j].set_xlabel(title if title.startswith("delta") else f"{title}: {cosines[i]:+.3f}", fontsize=9)
    for i in range(count):
        axes[i, 0].set_title(examples.captions[i], fontsize=9, loc="left")
    figure.suptitle("Cosine of each image with its own caption, original model", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


CONDITIONS = {"clean": ("clean", "#4c72b0"), "transfer": ("transfer", "#dd8452"), "white_box": ("white-box", "#c44e52")}


def draw_histograms(path, record):
    """Distribution of the cosines of every row under every condition."""
    rows = record["rows"]
    every = [v for row in record["per_image"].values() for values in row.values() for v in values["similarity"]]
    edges = np.linspace(min(every), max(every), 41)
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 1.35 * len(rows) + 0.9), sharex=True, squeeze=False)
    for axis, name in zip(axes[:, 0], rows):
        for condition, (label, colour) in CONDITIONS.items():
            values = record["per_image"][name][condition]["similarity"]
            axis.hist(values, edges, color=colour, alpha=0.55, label=label)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set_yticks([])
    axes[0, 0].legend(ncols=3, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    axes[-1, 0].set_xlabel(f"cosine of an image with its own caption, {record['n']} images")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_table(path, record):
    """The table's similarities as bars with their 95 % intervals."""
    rows = record["rows"]
    figure, axis = plt.subplots(figsize=(max(6.5, 1.25 * len(rows)), 4))
    for k, (condition, (label, colour)) in enumerate(CONDITIONS.items()):
        means = np.array([row[f"{condition}_similarity"] for row in rows.values()])
        low, high = np.array([row[f"{condition}_interval"] for row in rows.values()]).T
        at = np.arange(len(rows)) + 0.27 * (k - 1)
        axis.bar(at, means, 0.25, color=colour, label=label, yerr=[means - low, high - means], capsize=2)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xticks(range(len(rows)), [textwrap.fill(name, 14) for name in rows], fontsize=9)
    axis.set_ylabel("mean cosine with the own caption")
    axis.legend(ncols=3, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_eps_curves(path, record):
    """R@1 and similarity of every row against the attack's radius."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for name, row in record["sanity"].items():
        levels, similarity, recall = zip(*row["eps_curve"])
        axes[0].plot(range(len(levels)), similarity, marker=".", label=name)
        axes[1].plot(range(len(levels)), recall, marker=".", label=name)
    for axis, label in zip(axes, ("mean cosine with the own caption", "image-to-text R@1")):
        axis.set_xticks(range(len(EPS_CURVE)), EPS_CURVE)
        axis.set(xlabel=f"eps in grey levels, {record['args']['sanity_images']} images", ylabel=label)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.axvline(EPS_CURVE.index(8), color="grey", linewidth=0.6, linestyle=":")
    axes[1].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------


def announce(rows, examples, candidates, args):
    """Print the work of the table before it starts, with an estimate from one batch of the first row."""
    draws = {row.name: args.eot if row.randomised else 1 for row in rows}
    work = sum(len(list(attacks_on(row, args))) * draws[row.name] for row in rows) * len(examples) * args.steps
    if args.sanity:  # at least 14 times the steps of one attack, see sanity(): 5 + 1 + 2 + one a radius
        work += sum(draws.values()) * args.sanity_images * args.steps * (8 + len(EPS_CURVE) - 2)
    first, began = examples.part(0, 50), time.perf_counter()
    once = copy.copy(args)
    once.steps = 2
    attack_row(rows[0], first, candidates, once)
    seconds = work * (time.perf_counter() - began) / (3 * len(first))
    print(f"{len(rows)} rows, {work:,} image-steps of attack: about {duration(seconds)}", flush=True)


def kept_bytes(args, models, examples):
    """Disk for the attacked images of every row that are kept until the table is there, at most."""
    rows = models + len(args.checkpoint) + len(args.qualities) + len(args.defence)
    attacks = 2 * len(args.attack) * len(args.attack_loss) * args.restarts  # two codecs
    images = attacks * len(examples) + ((7 + len(EPS_CURVE)) * args.sanity_images if args.sanity else 0)
    return 1.1 * rows * images * examples.pixels[0].nbytes


def main(args):
    if args.rerun:
        print("\n".join(commands_behind(Path(args.rerun), set())))
        return
    if args.reproduce:
        reproduce(args)
    stages = Path(args.output_dir).parent
    transfer_dir = common.adversarial_folder(args, "eval", args.num_images)
    trained = {name: folder for name, folder in TRAINED.items() if (stages / folder / "metrics.json").exists()}
    inputs = [transfer_dir, *(stages / folder for folder in trained.values())]
    inputs += [file for _, source in args.checkpoint for file in common.model_files(source)]
    run = common.Run(args, inputs, show=console_table)
    for name in TRAINED.keys() - trained.keys():
        print(f"no finished run in {stages / TRAINED[name]}: the row {name} is left out")

    examples = load_examples(args, "eval", args.num_images)
    run.require_disk(kept_bytes(args, 1 + len(trained), examples))
    transfer = torch.from_numpy(common.load_adversarial(transfer_dir, examples, args))
    candidates = load_candidates(args, examples)
    rows = build_rows(args, load_clip(args), stages, trained, examples)
    announce(rows, examples, candidates, args)

    record = {"n": len(examples), "rows": {}, "paired": [], "sanity": {}, "attacks": {}, "health": {}}
    per_row, original_worst = {}, None
    for row in rows:
        per_row[row.name], worst, means, health = measure(row, examples, transfer, candidates, args, run)
        record["attacks"][row.name], record["health"][row.name] = means, health
        summary = summarise(per_row[row.name], args.seed) | {"training_seconds": row.seconds}
        record["rows"][row.name] = summary
        first = record["rows"]["original"]
        original_worst = worst[:4].clone() if original_worst is None else original_worst  # for examples.png
        del worst
        for kind in ("transfer", "white_box"):
            summary[f"{kind}_drop"] = drop(summary["clean_similarity"], summary[f"{kind}_similarity"])
            if row.name != "original":
                figures = [r[f"{k}_similarity"] for r in (summary, first) for k in ("clean", kind)]
                summary[f"improvement_{kind}"] = improvement(*figures)
        if args.sanity:
            few = examples.part(0, args.sanity_images)
            checks, curve = sanity(row, few, transfer[: len(few)], candidates, args, means, run)
            record["sanity"][row.name] = {"checks": checks, "eps_curve": curve}
    record["paired"] = compare_rows(per_row, args.seed)
    record |= {"coco_ids": examples.coco_ids, "skipped_images": examples.skipped}
    record["per_image"] = {
        name: {kind: {key: values.tolist() for key, values in scored.items()} for kind, scored in conditions.items()}
        for name, conditions in per_row.items()
    }

    run.begin()
    shown = {"args": vars(args)} | record
    figures = ["examples.png", "histogram.png", "table.png", *(["eps_curves.png"] if args.sanity else [])]
    if not common.RANK:
        common.write_text(run.dir / "table.md", markdown_table(shown))
        draw_examples(run.dir / "examples.png", examples, original_worst, rows[0].clip)
        draw_histograms(run.dir / "histogram.png", shown)
        draw_table(run.dir / "table.png", shown)
    (run.dir / "eps_curves.png").unlink(missing_ok=True)  # of a run before
    if args.sanity and not common.RANK:
        draw_eps_curves(run.dir / "eps_curves.png", shown)
        print("\n".join(["", *(textwrap.fill(line, 80, subsequent_indent=" " * 7) for line in sanity_lines(record))]))
    run.finish(rows[0].clip.device, **record)
    print(f"\n{console_table(shown)}\n\nin {run.dir}: table.md, metrics.json, {', '.join(figures)}")


if __name__ == "__main__":
    common.run_main(main, parse_args())
