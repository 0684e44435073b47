"""How fast the attack and a training step are, beside the libraries and scripts one would use instead.

    pip install -r tests/bench/requirements.txt
    python tests/bench/speed.py --json speed.json             # on an idle machine
    python tests/bench/speed.py --only ViT-L --only train     # the rows whose name holds either; GPU is one, too
    python tests/bench/speed.py --small                       # does it still run? Its ratios mean nothing

A ratio is the peer's median time over ours; the samples are taken in turn, in one process. All attacks start from the
same images; the cosines they end at are printed. Weights are random, and models and attacks are built before the clock
starts. With a GPU: what ViT-L/14 makes of it.
"""

import argparse
import logging
import platform
import re
import shlex
import signal
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402

EPS, ALPHA = 8 / 255, 2 / 255
NOT_INSTALLED = "not installed (pip install -r tests/bench/requirements.txt)"
PACKAGES = "open_clip_torch", "pillow", "torchattacks", "foolbox", "adversarial-robustness-toolbox", "cleverhans"


class Row(NamedTuple):
    name: str
    ours: str  # names of two contestants
    peer: str
    target: float | None  # least ratio
    tolerance: float | None = None  # of the difference between the two results


def make_clip(arch, device, small):
    arch = "ViT-B-32-quickgelu" if small else arch
    words = ["--model", arch, "--pretrained", "random", "--device", device, "--precision", "fp32"]
    clip = common.load_clip(common.fill(common.make_parser("").parse_args(words), "speed", "eval"))
    for transformer in (clip.model.visual.transformer, clip.model.transformer):
        transformer.resblocks = transformer.resblocks[: 2 if small else None]
    return clip


def captions(n):
    return [f"a photo of {i} things on a table" for i in range(n)]


# ---------------------------------------------------------------------------------------------------------------------
# What is timed: build(names, args) returns {name: function without arguments} and compare(ours, peer) of two results


class OwnCaption(torch.nn.Module):
    """Plain open_clip behind its normalisation; logits [cosine with the own caption, 0], so that class 0 is right.

    The libraries maximise the cross-entropy, log(1 + exp(-cosine)): its gradient is the cosine's times a negative
    number for each image, so the work, the signs and the iterates are those of the cosine itself.
    """

    def __init__(self, clip, text_features):
        super().__init__()
        self.model, self.mean, self.std, self.text_features = clip.model, clip.mean, clip.std, text_features

    def forward(self, images):
        cosine = (self.model.encode_image((images - self.mean) / self.std, normalize=True) * self.text_features).sum(-1)
        return torch.stack([cosine, torch.zeros_like(cosine)], 1)


def make_peer(name, module, images, steps):
    """A library's PGD in its ordinary wrapper; None if it is not installed."""
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    try:
        if name == "torchattacks":
            import torchattacks

            attack = torchattacks.PGD(module, eps=EPS, alpha=ALPHA, steps=steps, random_start=False)
            return lambda: attack(images, labels)
        if name == "foolbox":
            import foolbox

            model = foolbox.PyTorchModel(module, bounds=(0, 1), device=images.device)
            attack = foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=steps, random_start=False)
            return lambda: attack(model, images, labels, epsilons=EPS)[1]
        if name == "ART":
            from art.attacks.evasion import ProjectedGradientDescent
            from art.estimators.classification import PyTorchClassifier

            options = {"nb_classes": 2, "clip_values": (0, 1), "device_type": "cpu"}
            model = PyTorchClassifier(module, torch.nn.CrossEntropyLoss(), images.shape[1:], **options)
            attack = ProjectedGradientDescent(model, eps=EPS, eps_step=ALPHA, max_iter=steps, verbose=False)
            return lambda: torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))
        from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent

        options = {"clip_min": 0, "clip_max": 1, "y": labels, "rand_init": False}
        return lambda: projected_gradient_descent(module, images, EPS, ALPHA, steps, np.inf, **options)
    except ImportError:
        return None


def make_ours(clip, bf16, images, text_features, steps, wrap=lambda encode_image: encode_image):
    encode_image = wrap(clip.attack_encoder("bf16" if bf16 else "fp32"))
    attack = common.Attack(EPS, ALPHA, steps)
    return lambda: common.pgd(lambda x: -(encode_image(x) * text_features).sum(-1), images, attack)[0]


@torch.no_grad()
def mean_cosine(clip, images, text_features):
    return (clip.encode_image(images) * text_features).sum(-1).mean().item()


def build_pgd(arch, batch, steps, names, args):
    clip, steps = make_clip(arch, "cpu", args.small), 1 if args.small else steps
    images, text_features = torch.rand(batch, 3, 224, 224), clip.encode_text(captions(batch))
    module, contestants = OwnCaption(clip, text_features).eval(), {}
    for name in names:
        bf16 = name == "ours bf16"
        ours = name.startswith("ours") and make_ours(clip, bf16, images, text_features, steps)
        contestants[name] = ours or make_peer(name, module, images, steps)

    def compare(*results):
        cosines = [mean_cosine(clip, result, text_features) for result in results]
        return "final cosine", cosines, abs(cosines[0] - cosines[1])

    return contestants, compare


def make_training(clip, images, twins):
    """Functions that make one training step on images and their twins; all train the same weights."""
    model, visual, texts = clip.model.train(), clip.model.visual, captions(len(images))
    scale = clip.model.logit_scale.detach().exp()
    against = clip.encode_text(texts), scale

    ours_optimizer = torch.optim.AdamW(visual.parameters(), lr=1e-6, fused=True)

    def ours():  # the step of both trainings
        clip.precision = "bf16"
        model.requires_grad_(False)
        visual.requires_grad_(True)
        halves = clip.encode_image(torch.cat([images, twins])).chunk(2)
        loss = sum(common.contrastive_loss(features, *against) for features in halves) / 2
        ours_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        ours_optimizer.step()

    optimizer, loss_fn = (
        torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=False, fused=False),
        open_clip.ClipLoss(),
    )

    def naive():
        model.requires_grad_(True)
        tokens = clip.tokenizer(texts).to(images.device)
        loss = sum(loss_fn(*model((half - clip.mean) / clip.std, tokens)) for half in (images, twins)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return {"ours bf16": ours, "naive": naive}


def build_training(names, args):
    steps = make_training(make_clip("ViT-B-32-quickgelu", "cpu", args.small), *torch.rand(2, 8, 3, 224, 224))
    return {name: steps[name] for name in names}, None


def build_products(names, args):
    """Ten products of the size of ViT-B/32's largest at batch 4, 9.4 GFLOP: what no attack here can outrun."""
    x, weight = torch.randn(200, 768), torch.randn(3072, 768)
    pairs = {name: (x.to(dtype), weight.to(dtype)) for name, dtype in (("bf16", torch.bfloat16), ("fp32", x.dtype))}
    return {name: lambda pair=pairs[name]: [F.linear(*pair) for _ in range(10)][-1] for name in names}, None


GROUPS = [
    ([Row("10 products 200x768x3072 bf16 : fp32", "bf16", "fp32", None)], build_products),
    ([
        Row("PGD ViT-B/32 x4 fp32 : torchattacks", "ours fp32", "torchattacks", 1.8, 1e-4),
        Row("PGD ViT-B/32 x4 bf16 : torchattacks", "ours bf16", "torchattacks", 3.0, 2e-3),
        Row("PGD ViT-B/32 x4 fp32 : foolbox", "ours fp32", "foolbox", 2.3, 1e-4),
        Row("PGD ViT-B/32 x4 fp32 : ART", "ours fp32", "ART", 4.5, 1e-4),
        Row("PGD ViT-B/32 x4 fp32 : cleverhans", "ours fp32", "cleverhans", 2.3, 1e-4),
    ], lambda *given: build_pgd("ViT-B-32-quickgelu", 4, 20, *given)),
    ([
        Row("PGD ViT-L/14 x1 fp32 : torchattacks", "ours fp32", "torchattacks", 1.7, 1e-4),
        Row("PGD ViT-L/14 x1 bf16 : torchattacks", "ours bf16", "torchattacks", 2.8, 2e-3),
    ], lambda *given: build_pgd("ViT-L-14-quickgelu", 1, 3, *given)),
    ([Row("train ViT-B/32 8+8 bf16 : naive", "ours bf16", "naive", 5.0)], build_training),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# CPU


def out_of_time(*_):
    raise TimeoutError


def race(contestants, args):
    """Each in turn, --repeats times: {name: seconds of each sample, or why there are none}, {name: last result}."""
    samples, results = {name: [] if run else NOT_INSTALLED for name, run in contestants.items()}, {}
    signal.signal(signal.SIGALRM, out_of_time)
    bar = tqdm(list(contestants) * args.repeats, unit="sample", leave=False)
    for name in bar:
        bar.set_description(name)
        if isinstance(samples[name], list):
            signal.setitimer(signal.ITIMER_REAL, args.row_limit)
            try:
                began = time.perf_counter()
                results[name] = contestants[name]()
                samples[name].append(time.perf_counter() - began)
            except TimeoutError:
                samples[name] = f"stopped: one sample took more than {args.row_limit:g} s (--row_limit)"
            signal.setitimer(signal.ITIMER_REAL, 0)
    return samples, results


def report(row, samples, results, compare):
    """Print a row; returns what the JSON says of it."""
    record = row._asdict() | {"samples": [samples[row.ours], samples[row.peer]]}
    for name in (row.ours, row.peer):
        if isinstance(samples[name], str):
            print(f"{row.name}\n    {name}: {samples[name]}")
            return record
    ours, peer = map(median, record["samples"])
    record |= {"ratio": peer / ours, "met": row.target and peer / ours >= row.target}
    target = f"{row.target:>6.1f}x  {'yes' if record['met'] else 'NO'}" if row.target else f"{'-':>7}"
    print(f"{row.name:<39}{ours:>9.3f}{peer:>9.3f}{peer / ours:>7.2f}x{target}")
    if compare:
        what, values, apart = compare(results[row.ours], results[row.peer])
        record["compared"] = {"what": what, "values": values, "apart": apart}
        verdict = "ok" if apart <= row.tolerance else "NOT OK"
        print(f"    {what} {values[0]:.5f}, {values[1]:.5f}: apart {apart:.1e} <= {row.tolerance:g} {verdict}")
    return record


def run_rows(args):
    """Print the rows group by group; yields the records of each."""
    print(f"{'ours : peer':<39}{'ours, s':>9}{'peer, s':>9}{'ratio':>8}{'target':>7}  met")
    for rows, build in GROUPS:
        rows = [row for row in rows if any(text in row.name for text in args.only)]
        if rows:
            torch.manual_seed(0)
            contestants, compare = build(list(dict.fromkeys(name for row in rows for name in row[1:3])), args)
            samples, results = race(contestants, args)
            yield [report(row, samples, results, compare) for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# GPU: ViT-L/14 in bf16

PGD_FLOP, TRAIN_FLOP = 330e9, 486e9  # of an image: forward and pixel gradient; forward and full backward


def run_gpu(args, device="cuda"):
    """Print and return {name: figures}; shares are of the card's own rate at large bf16 products."""
    batch, few, steps, size = (4, 2, 2, 1024) if args.small else (64, 16, 20, 8192)
    record = {}
    print(f"{torch.cuda.get_device_name()}, ViT-L/14 in bf16; /s: products, images or image-steps")
    print(f"{'':<30}{'s':>8}{'/s':>9}{'TFLOP/s':>10}{'share':>8}{'peak GB':>10}")

    def measure(name, make, count, flop):
        """Time make() by the device's clock, after two runs that warm up; one run is count units of so many flop."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        samples = []
        try:
            run = make()
            for _ in range(args.repeats + 2):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                torch.cuda.synchronize()
                samples.append(start.elapsed_time(end) / 1000)
        except Exception as error:  # compilers and libraries fail in too many ways to list
            record[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(f"{name:<30} {record[name]['failed'].splitlines()[0][:48]}")
            return
        seconds, peak = median(samples[2:]), torch.cuda.max_memory_allocated() / 1e9
        rate = count * flop / seconds
        record[name] = {"samples": samples[2:], "flops": rate, "per_s": count / seconds, "peak_gigabytes": peak}
        shares = f"{rate / 1e12:>10.1f}{rate / record['product']['flops']:>8.0%}"
        print(f"{name:<30}{seconds:>8.3f}{count / seconds:>9.1f}{shares}{peak:>10.1f}", flush=True)

    def compiled(**options):
        clip.model.requires_grad_(False)  # it would differentiate every input that asks for it
        return lambda encode_image: torch.compile(encode_image, **options)

    def graphed(encode_image):
        return torch.cuda.make_graphed_callables(encode_image, (images.clone().requires_grad_(),))

    def autocast_torchattacks():
        attack = make_peer("torchattacks", OwnCaption(clip, text_features).eval(), images, steps)
        return torch.autocast(device, torch.bfloat16)(attack)

    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    measure("product", lambda: lambda: [a @ a for _ in range(10)], 10, 2 * size**3)
    images, twins = torch.rand(2, batch, 3, 224, 224, device=device)
    training = make_training(make_clip("ViT-L-14-quickgelu", device, args.small), images[:few], twins[:few])
    for name in ("ours bf16", "naive"):
        measure(f"train {few}+{few}, {name}", lambda step=training[name]: step, 2 * few, TRAIN_FLOP)
    del training
    clip = make_clip("ViT-L-14-quickgelu", device, args.small)
    text_features = clip.encode_text(captions(batch))
    given = images[:few], text_features[:few], steps
    measure(f"PGD of {few}", lambda: make_ours(clip, True, *given), few * steps, PGD_FLOP)
    given, work = (images, text_features, steps), (batch * steps, PGD_FLOP)
    measure(f"PGD of {batch}", lambda: make_ours(clip, True, *given), *work)
    measure(f"PGD of {batch}, torchattacks autocast", autocast_torchattacks, *work)
    cosines = [mean_cosine(clip, make_ours(clip, bf16, *given)(), text_features) for bf16 in (True, False)]
    variants = {"CUDA graph": graphed, "compile": compiled(), "compile, graphs": compiled(mode="reduce-overhead")}
    for name, wrap in variants.items():
        measure(f"PGD of {batch}, {name}", lambda wrap=wrap: make_ours(clip, True, *given, wrap), *work)
    base = record[f"PGD of {batch}"].get("per_s")
    for name in ("torchattacks autocast", *variants):
        speed = record[f"PGD of {batch}, {name}"].get("per_s")
        if base and speed:
            print(f"ours is {base / speed:.2f}x as fast as {name}")
    verdict = "ok" if abs(cosines[0] - cosines[1]) <= 0.002 else "NOT OK"
    print(f"final cosine {cosines[0]:.4f} in bf16, {cosines[1]:.4f} in fp32: within 0.002 {verdict}")
    return record | {"cosines": cosines}


# ---------------------------------------------------------------------------------------------------------------------


def machine():
    """What the figures depend on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = dict(re.findall(r"^(model name|flags)\s*:\s*(.*)", info, re.M))
    installed = {distribution.name.lower(): distribution.version for distribution in distributions()}
    return {
        "kind": platform.machine(),
        "cpu": found.get("model name", platform.processor()),
        "cpu_flags": re.findall(r"\b(?:avx|amx|fma|f16c)\w*", found.get("flags", "")),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: installed.get(name.lower()) for name in PACKAGES},
        "commit": common.git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="TEXT", help="rows whose name holds it; repeatable (all)")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--row_limit", type=float, default=600, help="seconds of one sample (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="a smoke test: two blocks, one step, one sample")
    parser.add_argument("--json", type=Path, metavar="PATH", help="every sample and the machine go there (nowhere)")
    args = parser.parse_args(argv)
    args.only = args.only or [""]
    if args.small:
        args.repeats, args.row_limit = 1, min(args.row_limit, 3)
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    record = machine()
    print(f"{record['cpu']} ({record['capability']}), threads: {args.threads}, torch {torch.__version__}")
    print(f"{record['date']}, medians of {args.repeats}{', --small: ratios mean nothing' if args.small else ''}")
    if not {"avx512_bf16", "amx_bf16"} & set(record["cpu_flags"]):
        print("this CPU has no bf16 products: the bf16 rows emulate them")
    record["rows"] = []
    for rows in run_rows(args):
        record["rows"] += rows
        if args.json:
            common.save(args.json, record)
    if any(text in "GPU" for text in args.only):
        if torch.cuda.is_available():
            record["gpu_figures"] = run_gpu(args)
        else:
            print("no GPU here: not measured")
    if args.json:
        common.save(args.json, record)


if __name__ == "__main__":
    main()
