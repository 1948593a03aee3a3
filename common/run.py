"""A run: its processes, its directory, the state that must survive, its log and its progress bar.

What is trained, and how, stands in the scripts. Nothing here calls a model.
"""

import copy
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import ArgumentTypeError
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from common import UserError, files
from common.cli import positive, printable

# ----------------------------------------------------------------------------------- processes

_patient = None  # the process group of `barrier`, which waits for a day


def start_processes(precision, deterministic=None):
    """Join torchrun's process group, if torchrun started us. Returns (rank, world_size, device).

    GPUs talk over NCCL, CPUs over gloo. TF32 is used with precision "tf32" alone. deterministic, on
    a GPU: True, equal runs are equal to the bit, and PyTorch raises an error where it cannot do
    that; None, it warns there; False, cuDNN times its kernels and takes the fastest.
    """
    global _patient
    rank, world_size, local_rank = _launched()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            message = f"process {local_rank + 1} of this node has no GPU"
            raise UserError(f"--nproc_per_node: {message}, torch sees {torch.cuda.device_count()}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.benchmark = deterministic is False
        if deterministic is not False:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=deterministic is None)
            torch.utils.deterministic.fill_uninitialized_memory = False  # a check for bugs, slow
    if world_size > 1:
        on_gpu = device.type == "cuda"
        timeout = _timeout()
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                timeout=timeout,
                device_id=device if on_gpu else None,
            )
        except (RuntimeError, ValueError) as error:  # no such host, a port that is taken, ...
            place = (
                f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
            )
            reason = files.first_line(error)
            raise UserError(f"{place}: the processes could not meet ({reason})") from error
        _patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    return rank, world_size, device


def _launched():
    """(rank, world_size, local rank) of this process, by the environment variables of torchrun.

    Raises UserError where only some of them are set, or one makes no sense.
    """
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
    given = [name for name in names if name in os.environ]
    if not given:
        return 0, 1, 0
    if os.environ.get("WORLD_SIZE") != "1":
        names += ["MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in names if not os.environ.get(name)]
    told = ", ".join(f"{name}={os.environ[name]}" for name in given)
    remedy = "start with torchrun, which sets all, or unset them"
    if missing:
        raise UserError(f"environment: {told} without {', '.join(missing)}; {remedy}")
    numbers = [os.environ[name] for name in names[:3]]
    if not all(re.fullmatch(r"\d{1,6}", number) for number in numbers):
        raise UserError(f"environment: {told}, expected whole numbers; {remedy}")
    rank, world_size, local_rank = map(int, numbers)
    if rank >= world_size or local_rank > rank:
        raise UserError(f"environment: {told}, expected LOCAL_RANK <= RANK < WORLD_SIZE; {remedy}")
    return rank, world_size, local_rank


def autocast(device, precision):
    """A context in which convolutions and matrix products compute in bf16, where asked for."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


def check_compiler(device):
    """Raises UserError where torch.compile does not work, mostly for want of a C++ compiler."""
    number = os.getpid()  # so that no kernel of another process will do
    try:
        torch.compile(lambda x: x * number)(torch.ones(8, device=device))
    except Exception as error:  # torch's, the compiler's and the file system's errors
        remedy = "leave it out, or install a C++ compiler"
        raise UserError(f"--compile: {files.first_line(error)}; {remedy}") from error


def _timeout():
    """How long a rank waits for another one inside a step. A barrier has the time of a day."""
    text = os.environ.get("RANK_TIMEOUT_MINUTES", "10")
    try:
        return timedelta(minutes=positive(text))
    except ArgumentTypeError as error:
        raise UserError(f"RANK_TIMEOUT_MINUTES: {error}") from error
    except OverflowError as error:
        raise UserError(f"RANK_TIMEOUT_MINUTES: {text} is too large") from error


def end_processes():
    """Leave the process group, if there is one. SIGTERM ends the process again."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    """Wait for all ranks, for hours if need be: while one unpacks a data set, for example."""
    if dist.is_initialized():
        dist.barrier(group=_patient)


def once(function, *args):
    """function(*args), called on rank 0 alone. All ranks get what it returns, and wait for it."""
    if not dist.is_initialized():
        return function(*args)
    values = [function(*args) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(values, src=0, group=_patient)
    return values[0]


def read_once(load, spec, *args):
    """load(spec, *args). Where the images of the data set `spec` are files, rank 0 alone calls it.

    So a million files are listed, or hashed, once for all ranks. Elsewhere see rank_0_first.
    """
    return once(load, spec, *args) if spec.files else rank_0_first(load, spec, *args)


def rank_0_first(load, *args):
    """load(*args) on every rank; the others wait for rank 0, which may fill the cache for them.

    On several nodes each may have a cache of its own, so that all wait for all in the end.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    if not first:
        barrier()
    loaded = load(*args)
    if first:
        barrier()
    barrier()
    return loaded


def sum_over_ranks(tensor):
    """Sum a tensor over ranks, in place, and return it.

    Accuracies are sums and counts over ranks, never means of means.
    """
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value):
    """A list of every rank's small picklable value, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_patient)
    return values


def wrap(module):
    """The module with gradients averaged over ranks (DDP); the module itself on one process.

    Buffers are not broadcast: two forward passes come before one backward pass, and a broadcast
    between them would break autograd.
    """
    if not dist.is_initialized():
        return module
    with warnings.catch_warnings():
        # The flag's successor is unknown to older releases of PyTorch.
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        return DistributedDataParallel(
            module,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def no_sync(module, when):
    """A context in whose backward passes gradients stay on their rank and add up, if `when`."""
    if when and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


@torch.no_grad()
def average_batchnorm(*models):
    """Give all ranks the mean of their BatchNorm running statistics, so that their models agree.

    Between two calls each rank's statistics are those of its own images.
    """
    running = ("running_mean", "running_var")
    buffers = []
    for model in models:
        buffers += [buffer for name, buffer in model.named_buffers() if name.endswith(running)]
    if not buffers or not dist.is_initialized():
        return
    flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
    mean = sum_over_ranks(flat) / dist.get_world_size()
    parts = mean.split([buffer.numel() for buffer in buffers])
    for buffer, part in zip(buffers, parts):
        buffer.copy_(part.view_as(buffer))


# ------------------------------------------------------------------------------ averaged model


def check_shared(path):
    """Wait for rank 0, which has written the file `path`. All ranks call it.

    Raises UserError where one of them does not see it: its node has a directory of its own.
    """
    barrier()
    deadline = time.time() + SEEN_WITHIN
    while not os.path.exists(path) and time.time() < deadline:
        time.sleep(0.5)
    if not all(gather_objects(os.path.exists(path))):
        raise UserError(f"{path}: not all processes see it; they need one file system for it")


def make_average(model):
    """A frozen copy of a model, in eval mode, for update_average to move."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average, model, decay):
    """Parameters: average <- decay * average + (1 - decay) * model. Buffers are copied.

    Decay 0 is a plain copy. BatchNorm's statistics are the model's own, never shared storage.
    """
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    pairs = list(zip(average.buffers(), model.buffers()))
    for dtype in {mine.dtype for mine, _ in pairs}:  # lists of one type are copied at once
        torch._foreach_copy_(*zip(*[pair for pair in pairs if pair[0].dtype == dtype]))


# ----------------------------------------------------------------------------------- directory

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of the project

SEEN_WITHIN = 60  # seconds until a network file system shows a new file to other nodes

_locks = {}  # real path of a directory -> file descriptor, locked until this process ends


def claim_directory(
    path,
    identity,
    name="args.json",
    not_compared=(),
    flag="--out-dir",
    remedy="choose another directory",
):
    """Take a directory for what `identity` describes, on rank 0 alone; the same may take it again.

    identity: a dict, kept as the JSON file `name`, whose entries but for the keys `not_compared`
    must be the same from then on. flag, remedy: what errors name. Nothing is ever deleted.
    Raises UserError where the directory holds something else or another process works there.
    """
    files.make_directory(path, f"{flag} {path}")
    _lock(path, flag)
    file = os.path.join(path, name)
    identity = json.loads(json.dumps(identity))  # tuples become lists, as in the file
    if os.path.exists(file):
        other = files.read_json(file)
        for key in sorted((identity.keys() | other.keys()) - set(not_compared)):
            if identity.get(key) != other.get(key):
                difference = f"{key} is {other.get(key)} there, {identity.get(key)} here"
                if key.endswith("_sha256"):
                    difference = f"{key}: that input has changed since"
                message = f"holds another run ({difference}); {remedy}"
                raise UserError(f"{flag} {path}: {message}")
        return
    left_by_a_kill = {entry for entry in os.listdir(path) if entry.endswith(".writing")}
    if set(os.listdir(path)) - left_by_a_kill - {"env.json"}:
        raise UserError(f"{flag} {path}: not empty and without {name}; {remedy}")
    files.write_json(environment(), os.path.join(path, "env.json"))
    files.write_json(identity, file)


def _lock(path, flag):
    """Keep other processes out. A kill frees the directory."""
    key = os.path.realpath(path)
    if key in _locks:
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(f"{flag} {path}: another process is at work there") from error
    except OSError:
        pass  # a file system that cannot lock is used without
    _locks[key] = handle


def environment():
    """What a number depends on besides the run's arguments: versions, device, commit, command."""
    packages = ("torchvision", "diffusers", "numpy", "scipy", "scikit-learn")
    commit = _git("rev-parse", "HEAD").strip() or None
    # Whether the code is another than the commit's: a script may be new, or all of it a copy.
    new_scripts = _git("ls-files", "--others", "--exclude-standard", "--", "*.py")
    is_a_copy = not _git("ls-files", "--", "common/run.py")
    dirty = bool(_git("diff", "HEAD") or new_scripts or is_a_copy)
    return {
        "commit": commit,
        "dirty": dirty if commit else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "threads": torch.get_num_threads(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "command": [_script(), *sys.argv[1:]],
    }


def _version(package):
    """Its version; None where it is not there: train_at.py alone needs neither of some."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _script():
    """The script's path in the project, wherever the project lies; its name if it is another's."""
    path = os.path.abspath(sys.argv[0])
    if path.startswith(ROOT + os.sep):
        return os.path.relpath(path, ROOT)
    return os.path.basename(path)


def _git(*command):
    """What git prints about this project; "" where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *command], capture_output=True, cwd=ROOT)
    except OSError:
        return ""
    # A diff has the letters of the files that differ, in whatever encoding.
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def _cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith("model name")]
    except OSError:  # not Linux
        lines = []
    if lines:
        return lines[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ----------------------------------------------------------------------------------------- run

CHECK_STEPS = 3  # of --check
AGREE_EVERY = 10  # steps after which ranks ask one another whether to stop

# Where inputs lie is no part of a run: their content is, by hash.
NOT_COMPARED = ("out_dir", "workers", "data_dir", "download", "ignore_checksum", "check")
NOT_COMPARED += ("synthetic", "teacher", "init")


class Run:
    """One training run: all that must survive an interruption, its directory and its log.

    step: finished training steps. best: the highest score so far, a list of numbers. seconds: of
    training, over all restarts. `track` names what else is saved and loaded.
    """

    def __init__(self, script, args, inputs, rank, device):
        """Claim args.out_dir. script: its path. inputs: dict of what else the weights depend on.

        Raises UserError where the directory holds another run.
        """
        self.out_dir = args.out_dir
        self.rank = rank
        self.device = device
        self.last_path = os.path.join(self.out_dir, "last.pt")  # --check reads it, and writes none
        self.checking = args.check
        self.marks = []  # of --check: times at which steps ended
        self.teaching = []  # of --check: seconds of the teacher in each step
        self.saved_at = 0.0  # of --check: when the last validation ended
        self.step = 0
        self.best = []
        self.seconds = 0.0
        self.tracked = {}
        self.saved = 0  # the step of the last checkpoint
        if rank == 0:
            name = os.path.basename(script)
            identity = {"script": name} | dict(sorted(vars(args).items())) | inputs
            if not args.check or (os.path.isdir(self.out_dir) and os.listdir(self.out_dir)):
                claim_directory(self.out_dir, identity, not_compared=NOT_COMPARED)
            if args.check:  # all is written, to where it disturbs nothing
                self._temporary = tempfile.TemporaryDirectory()
                self.out_dir = self._temporary.name
            keep_code(script, self.out_dir)
        if args.check:
            barrier()
        else:
            check_shared(self.path("args.json"))
        self._terminated = False

    def track(self, **parts):
        """Name modules and optimisers whose state is saved and loaded with the run."""
        self.tracked |= parts

    def load(self, train_steps):
        """Take up the state of last.pt, if there is one.

        Raises UserError where it is damaged, or where not all ranks see the same.
        """
        if os.path.exists(self.last_path):
            self._load(train_steps)
        steps = gather_objects(self.step)
        if len(set(steps)) > 1:
            seen = ", ".join(map(str, steps))
            raise UserError(f"{self.last_path}: processes see it at steps {seen}; start again")

    def _load(self, train_steps):
        entries = {"step": int, "best": list, "seconds": float}
        entries |= dict.fromkeys(self.tracked, dict)
        state = files.load(self.last_path, entries, self.device)
        for name, part in self.tracked.items():
            files.load_state(part, state[name], self.last_path)
        self.step = self.saved = state["step"]
        self.best = state["best"]
        self.seconds = state["seconds"]
        numbers = all(type(number) is float for number in [self.seconds, *self.best])
        if type(self.step) is not int or not 0 <= self.step <= train_steps or not numbers:
            raise UserError(f"{self.last_path}: damaged, its step, best or seconds cannot be")

    def save(self, **also):
        """Write last.pt; all ranks call it. also: entries for those who read the file elsewhere."""
        self.saved_at = time.time()
        if self.rank == 0:
            state = {
                **also,
                "step": self.step,
                "best": self.best,
                "seconds": self.elapsed(),
                **{name: part.state_dict() for name, part in self.tracked.items()},
            }
            files.save(state, self.path("last.pt"))
        sum_over_ranks(torch.zeros(1))  # all wait for the file, no longer than for a step
        self.saved = self.step
        self._since = time.time()

    def path(self, name):
        """The path of a file in the run's directory."""
        return os.path.join(self.out_dir, name)

    def stopped_message(self, train_steps):
        """What to print of a run that SIGTERM ended."""
        done = f"stopped by SIGTERM after step {self.step} of {train_steps}"
        return f"{self.out_dir}: {done}; the same command goes on"

    def start(self, train_steps):
        """Begin to log, and finish the present step when SIGTERM comes (--check just ends)."""
        self._clock = self._since = time.time()
        self._mark()
        if not self.checking:
            signal.signal(signal.SIGTERM, self._on_sigterm)
        if self.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            self._log = open_log(self.path("log.jsonl"), self.step)
            self._board = SummaryWriter(self.out_dir, purge_step=self.step + 1)
        title = os.path.basename(self.out_dir)
        self.bar = progress(rank=self.rank, desc=title, initial=self.step, total=train_steps)

    def elapsed(self):
        """Seconds of training, over all restarts."""
        return self.seconds + time.time() - self._clock

    def log(self, **metrics):
        """One line of log.jsonl, and one TensorBoard scalar per metric; on rank 0."""
        if self.rank:
            return
        line = {"step": self.step, **metrics, "seconds": round(self.elapsed(), 1)}
        self._log.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if name != "step":
                self._board.add_scalar(name, value, self.step)

    def interval(self):
        """(steps, seconds) since the last checkpoint or the start: validation does not count."""
        return self.step - self.saved, time.time() - self._since

    def advance(self):
        """Count a finished step."""
        self.step += 1
        self.bar.update()
        self._mark()

    def timed(self, function, *args):
        """function(*args), the teacher's pass; --check tells its share of a step."""
        if not self.checking:
            return function(*args)
        begin = self._now()
        result = function(*args)
        self.teaching[-1] += self._now() - begin
        return result

    def _mark(self):
        if self.checking:
            self.marks.append(self._now())
            self.teaching.append(0.0)

    def _now(self):
        """The time when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.time()

    def check_is_done(self):
        """Whether this is --check, and its steps are done: the first warms up, others are timed."""
        return self.checking and len(self.marks) > CHECK_STEPS

    def print_check(self, spec, n_images, train_steps, n_passes):
        """Print what --check has found.

        n_images: (to train, held out, to test, synthetic). n_passes: batches of validation, in all.
        """
        times = [end - begin for begin, end in zip(self.marks, self.marks[1:])]
        step_seconds = min(times)  # the first one warms up, another may hold a validation
        teaching = self.teaching[times.index(step_seconds)] / step_seconds
        of_teacher = f", of which the teacher takes {teaching:.0%}" if teaching else ""
        seconds = (train_steps - self.step) * step_seconds
        seconds += n_passes * (self.saved_at - self.marks[-1])
        to_train, held_out, to_test, synthetic = n_images
        images = f"{to_train:,} images to train, {held_out:,} to validate, {to_test:,} to test"
        print(f"data      {images}, {synthetic:,} synthetic")
        print(f"classes   {describe_classes(spec)}")
        print(f"steps     {train_steps:,}, {step_seconds:.3g} s each{of_teacher}")
        print(f"memory    {peak_memory(self.device)}")
        print(f"time      about {in_words(seconds)}, with {n_passes:,} batches of validation")
        print("nothing is wrong, and nothing was written but the cache")

    def is_sync_step(self):
        """Whether this is a step after which ranks agree on what else each has for itself."""
        return self.step % AGREE_EVERY == 0

    def should_stop(self):
        """Has SIGTERM, a scheduler's notice, come to any rank? All ranks call it after each step.

        Several ranks ask one another every AGREE_EVERY steps. The answer comes over the CPU, so
        that no GPU is waited for.
        """
        if self.check_is_done():
            return True
        if not dist.is_initialized():
            return self._terminated
        return self.is_sync_step() and bool(sum_over_ranks(torch.tensor(int(self._terminated))))

    def _on_sigterm(self, *_):
        self._terminated = True

    def check_finite(self, **metrics):
        """Raises UserError where a metric or a tracked weight is not finite.

        To be called before anything is written. A step is not checked by itself, because a GPU
        would be waited for: what went wrong did so after the last checkpoint.
        """
        weights = []
        for part in self.tracked.values():
            if isinstance(part, torch.nn.Module):
                weights += part.state_dict().values()
        finite = torch.stack([tensor.isfinite().all() for tensor in weights])
        if all(math.isfinite(value) for value in metrics.values()) and finite.all():
            return
        steps = f"steps {self.saved + 1} to {self.step}"
        last = f"the last good step, if any, is in {self.last_path}"
        message = f"{steps}: loss, gradient or weights not finite; {last}"
        raise UserError(f"{message}. Try a lower learning rate")

    def close(self):
        """End the log and the bar."""
        self.bar.close()
        if self.rank == 0:
            self._log.close()
            self._board.close()


def describe_classes(spec):
    """The number of a data set's classes, and the names of the first ones."""
    if not spec.classes:
        return f"{spec.num_classes:,}"
    more = ", ..." if len(spec.classes) > 10 else ""
    return f"{spec.num_classes:,}: {printable(', '.join(spec.classes[:10]))}{more}"


def peak_memory(device):
    """The most memory that was in use, in words: of the GPU, or of this process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of this GPU at the peak"
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # bytes there
        kib /= 1024
    return f"{kib / 2**20:.1f} GiB of this process at the peak"


def in_words(seconds):
    """A time in the unit that fits."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def keep_code(script, out_dir):
    """Copy the script and `git diff` into the run's directory: what ran may be an edited copy."""
    with open(script, "rb") as file:
        code = file.read()
    copied = os.path.join(out_dir, os.path.basename(script))
    if not os.path.exists(copied):
        files.write_text(_git("diff", "HEAD"), os.path.join(out_dir, "git.diff"))
        with files.atomic(copied) as file:
            file.write(code)
        return
    with open(copied, "rb") as file:
        if file.read() != code:
            print(f"note: {script} is not the code this run began with, {copied}; see --out-dir")


def open_log(path, step):
    """Open log.jsonl for appending. Raises UserError where a line is no object with a step.

    Lines of later steps, work that was lost, are cut off, and so is half a line that a kill left:
    the log of an interrupted run reads as if it had not been interrupted, but for the means of
    the line after a SIGTERM.
    """
    if os.path.exists(path):
        lines = files.read_text(path, "a log of a run").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        with files.reading(path, "a log of JSON objects, each with a step"):
            kept = [line for line in whole if int(json.loads(line)["step"]) <= step]
        files.write_text("".join(kept), path)
    return open(path, "a", buffering=1)


class Meters:
    """Means of what a run logs, over steps and ranks, since they were last read."""

    def __init__(self):
        self.sums = {}
        self.counts = {}

    def update(self, **values):
        """Count one value of each name, tensors without dimension that stay on their device."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self):
        """Dict of name: mean over the updates of all ranks. Starts afresh; all ranks call it."""
        if not self.sums:
            return {}
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        sums = sum_over_ranks(torch.stack(list(self.sums.values()))).tolist()
        means = {}
        for name, total in zip(self.sums, sums):
            means[name] = total / (self.counts[name] * world_size)
        self.sums, self.counts = {}, {}
        return means


def progress(iterable=None, rank=0, **kwargs):
    """tqdm, with rate and time left; silent on other ranks and where stderr is no terminal."""
    return tqdm(iterable, disable=True if rank else None, dynamic_ncols=True, **kwargs)


def save_images(x, path, columns):
    """Write a grid of images x (N, C, H, W) in [0, 1], row by row, as a PNG.

    Pixels of small images are enlarged to 4 x 4.
    """
    scale = 4 if x.shape[-1] <= 32 else 1
    grid = make_grid(x.clamp(0, 1), nrow=columns, padding=1, pad_value=0.5)
    grid = grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    with files.atomic(path) as file:
        save_image(grid, file, format="png")
