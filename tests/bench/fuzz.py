"""The properties of tests/test_fuzz.py on fresh random examples, for as long as one likes.

    pip install -r tests/requirements.txt
    python tests/bench/fuzz.py --minutes 60
    python tests/bench/fuzz.py --only rows --seed 7 --rounds 1 --shrink     # a failure again, made small

Each round plays every property --examples times with the seed --seed, then --seed + 1, and so on; without --seed, from
one drawn at random. Prints examples, refusals and successes, and of each failure how to have it again;
exit code 1 if there was one.
"""

import argparse
import random
import sys
import time
import traceback
from pathlib import Path

from hypothesis import Phase, seed, settings

sys.path[:0] = map(str, [Path(__file__).resolve().parents[2], Path(__file__).resolve().parents[1]])
import test_fuzz  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="start no further property after so long (60)")
    parser.add_argument("--rounds", type=int, help="at most so many rounds (no limit)")
    parser.add_argument("--examples", type=int, default=100, help="of a property in a round (100)")
    parser.add_argument("--seed", type=int, help="of the first round (random)")
    parser.add_argument("--only", action="append", default=[], help="only properties whose name holds this (all)")
    parser.add_argument("--shrink", action="store_true", help="make failing examples small, which takes minutes")
    return parser.parse_args()


def leaves(error):
    return [leaf for part in error.exceptions for leaf in leaves(part)] if hasattr(error, "exceptions") else [error]


def main(args):
    began, first = time.monotonic(), random.randrange(10**6) if args.seed is None else args.seed
    phases = [Phase.explicit, Phase.generate, *([Phase.shrink] if args.shrink else [])]
    suite = settings.get_profile("suite")
    fresh = settings(suite, max_examples=args.examples, derandomize=False, print_blob=True, phases=phases)
    properties = {
        name: fresh(test)
        for name, test in vars(test_fuzz).items()
        if name.startswith("test_") and hasattr(test, "hypothesis") and all(word in name for word in args.only)
    }
    test_fuzz.ground()
    failed, number = {}, first
    while time.monotonic() - began < 60 * args.minutes and (not args.rounds or number < first + args.rounds):
        for name, test in properties.items():
            if time.monotonic() - began >= 60 * args.minutes:
                break
            try:
                seed(number)(test)()
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                replay = (
                    f"python tests/bench/fuzz.py --only {name} --seed {number} --rounds 1 --examples {args.examples}"
                )
                for leaf in leaves(error):
                    last = traceback.extract_tb(leaf.__traceback__)[-1]
                    kind = type(leaf).__name__, Path(last.filename).name, last.lineno
                    if kind not in failed:
                        failed[kind] = name
                        print(f"FAILED {name}: {kind}\n  replay: {replay}", flush=True)
                        print("".join(traceback.format_exception(leaf))[-6000:], flush=True)
        number += 1
    ended = test_fuzz.ENDED
    print(f"{'damaged':16}{'examples':>10}{'refused':>10}{'coped':>10}{'failed':>10}")
    for name in dict.fromkeys(name for name, _ in ended):
        refused, coped, other = (ended[name, how] for how in ("refuses", "copes", "fails"))
        print(f"{name:16}{refused + coped + other:10}{refused:10}{coped:10}{other:10}")
    minutes = (time.monotonic() - began) / 60
    print(
        f"{sum(ended.values())} examples in {minutes:.1f} min, seeds {first} to {max(first, number - 1)}: "
        f"{len(failed)} different failure(s)"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(parse_args()))
