"""Command lines and the errors a user can mend: one clear line, exit status 2, no traceback."""

import argparse
import errno
import os
import sys
import time

# What a full, read-only or forbidden disk raises; anything else is a bug and keeps its traceback.
_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ESTALE),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
}


class UserError(Exception):
    """Something the user can mend. The message names the flag or file, what was found and what was expected."""


def not_finite(step, last_path):
    """The UserError of a training step whose loss, gradient or weights are not finite."""
    message = f"step {step}: loss, gradient or weights not finite; the last good step, if any, is in {last_path}. Try a lower --lr"
    return UserError(message)


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line and whose help shows every default."""

    def __init__(self, description, **kwargs):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Formatter, **kwargs)

    def parse_with_presets(self, argv, recipe, presets, model_presets):
        """parse_args with the defaults recipe | presets[--dataset] | model_presets[family of --model], such as "vit" of vit-b-2.

        A flag given on the command line wins; --help shows the defaults that hold for its --dataset and --model.
        """
        first = Parser(None, add_help=False)
        first.add_argument("--dataset", default=self.get_default("dataset"))
        first.add_argument("--model")
        given = first.parse_known_args(argv)[0]
        defaults = recipe | presets.get(given.dataset, {})
        family = (given.model or defaults["model"]).split("-")[0]
        self.set_defaults(**defaults | model_presets.get(family, {}))
        return self.parse_args(argv)

    def refuse_unused(self, argv, uses):
        """End with an error where a flag stands on the command line and does nothing. uses: flag -> (what needs it, whether that is on)."""
        given = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
        for flag, (what, on) in uses.items():
            if flag in given and not on:
                self.error(f"argument {flag}: does nothing here, it goes with {what}")

    def refuse_others(self, argv, flag):
        """End with an error where any other flag than `flag` stands on the command line."""
        others = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv) if word.startswith("--")} - {flag}
        if others:
            self.error(f"argument {flag}: takes no other flag, given {', '.join(sorted(others))}")

    def error(self, message):
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the module docstring's lines and appends the defaults, where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def ratio(text):
    """argparse type: a finite number written as `0.031` or `8/255`."""
    try:
        top, _, bottom = text.partition("/")
        value = float(top) / float(bottom) if bottom else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a number such as 0.15 or 8/255, got '{text}'") from None
    if not -1e30 < value < 1e30:
        raise argparse.ArgumentTypeError(f"expected a finite number, got '{text}'")
    return value


def positive(text):
    """argparse type: a number (or ratio) above 0."""
    return _checked(ratio(text), lambda v: v > 0, "a number above 0", text)


def non_negative(text):
    """argparse type: a number (or ratio) of at least 0."""
    return _checked(ratio(text), lambda v: v >= 0, "a number of at least 0", text)


def fraction(text):
    """argparse type: a number in [0, 1]."""
    return _checked(ratio(text), lambda v: 0 <= v <= 1, "a number between 0 and 1", text)


def count(text):
    """argparse type: a whole number of at least 1."""
    return _checked(_whole(text), lambda v: v >= 1, "a whole number of at least 1", text)


def count0(text):
    """argparse type: a whole number of at least 0."""
    return _checked(_whole(text), lambda v: v >= 0, "a whole number of at least 0", text)


def seed(text):
    """argparse type: a whole number of at least 0 and below 2^32, what every library takes as a seed."""
    return _checked(_whole(text), lambda v: 0 <= v < 2**32, "a whole number from 0 to 4294967295", text)


def _whole(text):
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got '{text}'") from None


def _checked(value, holds, expected, text):
    if not holds(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'")
    return value


def run(main, args):
    """Run a script's main(args); end a UserError or a disk that is full, read-only or gone with one line and status 2."""
    try:
        main(args)
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        message = f"{error.filename or 'output'}: {error.strerror}"
    except RuntimeError as error:  # gloo has no type of its own for this
        if not any(words in str(error) for words in ("Timed out waiting", "onnection closed by peer", "Connection reset by peer")):
            raise
        message = "another process is gone, or did not answer within RANK_TIMEOUT_MINUTES (a day without it)"
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    else:
        return
    rank = os.environ.get("RANK", "0")
    if rank != "0":  # mostly rank 0 has found the same and ends all; what another rank alone has found must not be lost
        time.sleep(2)
        print(f"[rank {rank}] ", end="", file=sys.stderr)
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)  # it may quote what a file holds
    print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr)
    raise SystemExit(2)
