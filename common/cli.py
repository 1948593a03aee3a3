"""Command lines: the parser, argument types, the flags that scripts share, and how a script ends.

Flags of one script alone stand in that script.
"""

import argparse
import os
import re
import sys
import time
from errno import EACCES, EDQUOT, EFBIG, EIO, ELOOP, ENAMETOOLONG, ENOSPC, EPERM, EROFS, ESTALE

import torch

from common import UserError

# What a full, read-only or forbidden disk raises. Any other OSError is a bug of ours and keeps its
# traceback.
DISK_ERRORS = {EACCES, EDQUOT, EFBIG, EIO, ELOOP, ENAMETOOLONG, ENOSPC, EPERM, EROFS, ESTALE}

# What gloo says when another process has ended or does not answer. It has no exception of its own.
LOST_PROCESS = ("Timed out waiting", "onnection closed by peer", "Connection reset by peer")

# ------------------------------------------------------------------------------------ the parser


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line and whose --help shows every default."""

    def __init__(self, description, **kwargs):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=_Formatter,
            **kwargs,
        )

    def parse_with_presets(self, argv, recipe, presets, model_presets, fast):
        """Parse with defaults from three dicts, of which the later one wins.

        recipe: {name: default}. presets: {--dataset: {name: default}}. model_presets: {family of
        --model, such as "vit" of vit-b-2: {name: default}}, left out where the data set's preset
        has an optimiser of its own. fast: a function of all of them, that changes some for --recipe
        fast. A flag on the command line wins over all; --help shows the defaults for the --dataset,
        --model and --recipe beside it.
        """
        first = Parser(None, add_help=False)
        first.add_argument("--dataset", default=self.get_default("dataset"))
        first.add_argument("--model")
        first.add_argument("--recipe")
        given, _ = first.parse_known_args(argv)
        defaults = recipe | presets.get(given.dataset, {})
        if "optimizer" not in presets.get(given.dataset, {}):
            family = re.match("[a-z]*", given.model or defaults["model"]).group()
            defaults |= model_presets.get(family, {})
        if given.recipe == "fast":
            defaults |= fast(defaults)
        self.set_defaults(**defaults)
        return self.parse_args(argv)

    def refuse_unused(self, argv, uses):
        """End with an error where a flag stands on the command line and does nothing.

        uses: {flag: (what it goes with, whether that is on)}.
        """
        given = flags_given(argv)
        for flag, (what, on) in uses.items():
            if flag in given and not on:
                self.error(f"argument {flag}: does nothing here, it goes with {what}")

    def check_alone(self, argv, flag, others=""):
        """End with an error where flags other than `others`, a text, stand beside `flag`."""
        unused = sorted(flags_given(argv) - {flag, *others.split()})
        if unused:
            fits = f"goes with {others} alone" if others else "takes no other flag"
            self.error(f"argument {flag}: {fits}, given {' '.join(unused)}")

    def check_data_flags(self, argv, args):
        """Check the flags of add_data_flags, and give --image-size its default for a folder."""
        with_sums = ("cifar10", "cifar100", "svhn")
        uses = {
            "--image-size": ("--dataset folder", args.dataset == "folder"),
            "--ignore-checksum": (f"--dataset {', '.join(with_sums)}", args.dataset in with_sums),
        }
        self.refuse_unused(argv, uses)
        if args.dataset == "folder" and args.image_size is None:
            args.image_size = 64

    def check_radius(self, flag, value, norm, spec):
        """End with an error where a radius or step is more than two images can be apart.

        spec: the data set, whose x lies in [0, 1]. Such a radius is mostly meant in 255ths.
        """
        n = spec.channels * spec.image_size**2
        largest = {"linf": 1.0, "l2": n**0.5, "l1": float(n)}[norm]
        if value is not None and value > largest:
            expected = f"expected at most {largest:.4g} in {norm}, of x in [0, 1]"
            self.error(f"argument {flag}: {value:g}, {expected}; 8/255 is written so")

    def error(self, message):
        if rank() == "0":
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the module docstring, and appends the defaults where there are some."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def flags_given(argv):
    """The set of flags on a command line, sys.argv where argv is None."""
    words = sys.argv[1:] if argv is None else argv
    return {word.split("=")[0] for word in words if word.startswith("--")}


# --------------------------------------------------------------------------------- shared flags


def add_data_flags(parser, datasets, splits=True):
    """Add the group of flags that say which images a script works on, and return it.

    datasets: {name: common.data.Spec}. splits: with --val-size, --n-train and --imbalance,
    for scripts that read the training images. Scripts call check_data_flags when they have parsed.
    """
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--dataset", choices=datasets, default="digits", help="folder: your own images")
    add("--data-dir", type=path, default="data", help="where data sets lie (digits needs none)")
    add("--image-size", type=count, help="pixels of a folder's images (default: 64)")
    add("--download", action="store_true", help="fetch the data set into --data-dir first")
    add(
        "--ignore-checksum", action="store_true", help="read CIFAR's or SVHN's files though altered"
    )
    if splits:
        add("--val-size", type=count, help="first training images, held out (200, 1024 or a tenth)")
        add("--n-train", type=count, help="use the next so many training images (default: all)")
        what = "long tail: RATIO times as many images of the first class as of the last"
        add("--imbalance", type=at_least_1, metavar="RATIO", help=what)
    return group


def add_check_flag(add):
    """Add --check. add: a group's add_argument."""
    what = "read all inputs, try a batch or three, tell sizes and time, write nothing"
    add("--check", action="store_true", help=what)


def add_precision_flag(add, on_gpu="bf16"):
    """Add --precision. add: a group's add_argument. on_gpu: the default where there is a GPU."""
    default = "fp32"
    # Older GPUs emulate bf16.
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        default = on_gpu
    choices = ["fp32", "tf32", "bf16"]
    add(
        "--precision",
        choices=choices,
        default=default,
        help=f"of networks; {on_gpu} on a GPU that has it",
    )


# -------------------------------------------------------------------------------- argument types


def ratio(text):
    """argparse type: a finite number, written as 0.031 or 8/255."""
    top, slash, bottom = text.partition("/")
    try:
        value = float(top) / float(bottom) if slash else float(text)
    except (ValueError, ZeroDivisionError) as error:
        expected = f"expected a number such as 0.15 or 8/255, got '{text}'"
        raise argparse.ArgumentTypeError(expected) from error
    if not abs(value) < 1e30:
        raise argparse.ArgumentTypeError(f"expected a finite number, got '{text}'")
    return value


def whole(text):
    """argparse type: a whole number."""
    try:
        return int(text)
    except ValueError as error:
        message = f"expected a whole number, got '{text}'"
        raise argparse.ArgumentTypeError(message) from error


def path(text):
    """argparse type: a path; ~ stands for the home directory."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return os.path.expanduser(text)


def _type(read, is_good, expected):
    """An argparse type: read(text), where is_good(its value); else `expected` is told."""

    def parse(text):
        value = read(text)
        if not is_good(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'")
        return value

    return parse


positive = _type(ratio, lambda value: value > 0, "a number above 0")
non_negative = _type(ratio, lambda value: value >= 0, "a number of at least 0")
at_least_1 = _type(ratio, lambda value: value >= 1, "a number of at least 1")
fraction = _type(ratio, lambda value: 0 <= value <= 1, "a number between 0 and 1")
count = _type(whole, lambda value: value >= 1, "a whole number of at least 1")
count0 = _type(whole, lambda value: value >= 0, "a whole number of at least 0")
batch = _type(whole, lambda value: 1 <= value <= 2**20, "a whole number from 1 to 1048576")
# What every library takes as a seed.
seed = _type(whole, lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295")


# -------------------------------------------------------------------------------- running a script


def run_script(main, args):
    """Call main(args). What the user can mend ends with one line and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name of a class may have letters that it lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        main(args)
        return
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        message = f"{error.filename or 'output'}: {error.strerror}"
    except torch.OutOfMemoryError:
        less = "a smaller --batch-size needs less, in training also a larger --accumulate"
        less += ", in evaluation fewer --sanity-images"
        message = f"the memory of the GPU is not enough; {less}"
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST_PROCESS):
            raise
        limit = "RANK_TIMEOUT_MINUTES (10 without it)"
        message = f"another process is gone, or did not answer within {limit}"
    except KeyboardInterrupt as error:
        raise SystemExit(130) from error
    prefix = ""
    own_rank = rank()
    if own_rank != "0":
        # Mostly rank 0 has found the same and ends all; what this rank alone found must be said.
        time.sleep(15)
        prefix = f"[rank {own_rank}] "
    script = os.path.basename(sys.argv[0])
    print(f"{prefix}{script}: error: {printable(message)}", file=sys.stderr)
    raise SystemExit(2)


def rank():
    """This process's rank, as a text; "0" where the launcher's variables are not complete."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return os.environ["RANK"] if all(os.environ.get(name) for name in names) else "0"


def number(value):
    """A number as it is given to a flag: 0.15, or 8/255 where that is what it is."""
    in_255ths = round(255 * value)
    if float(f"{value:.4g}") != value and abs(255 * value - in_255ths) < 1e-6:
        return f"{in_255ths}/255"
    return f"{value:.4g}"


def threat(norm, eps):
    """A norm and a radius in words, as papers write them: linf 8/255, l2 0.5."""
    return f"{norm} {number(eps)}"


def printable(text):
    """One line of a text that may quote what a file holds: control characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
