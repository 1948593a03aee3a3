"""Processes: one on a laptop, many under torchrun (gloo on CPU, NCCL on GPU). The launcher's environment decides."""

import os
import signal
import warnings
from argparse import ArgumentTypeError
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.cli import UserError, positive


def setup():
    """Join the process group if torchrun started us; float32 is float32 from here on. Returns (rank, world_size, device)."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank, n_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise UserError(f"--nproc_per_node: process {local_rank + 1} of this node has no GPU, torch sees {n_gpus}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # on by default: convolutions with 10 bits of mantissa
        torch.backends.cudnn.deterministic = True  # or two equal runs differ, and resume with them; no cost was seen on digits
    if world_size > 1:
        # A day: ranks wait for the one that unpacks data, has a shard more to generate or a chunk more to attack. NCCL's ten minutes
        # would end such work, on every rerun too. Where nothing of the kind is to be done, a hanging rank shows earlier with less.
        try:
            minutes = positive(os.environ.get("RANK_TIMEOUT_MINUTES", "1440"))
        except ArgumentTypeError as error:
            raise UserError(f"RANK_TIMEOUT_MINUTES: {error}") from None
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=minutes))
    return rank, world_size, device


def teardown():
    """Leave the process group, if there is one; SIGTERM ends the process again."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if dist.is_initialized():
        dist.destroy_process_group()


def catch_sigterm(device):
    """SIGTERM, a scheduler's notice, ends nothing by itself from here on. Returns a function, called on all ranks: has it come to any?"""
    came = []
    signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    if not dist.is_initialized():
        return lambda: bool(came)
    return lambda: bool(sum_over_ranks(torch.tensor(float(len(came)), device=device)))


def wrap(module):
    """The module whose gradients are averaged over ranks; the module itself on one process.

    Buffers are not broadcast: two passes come before one backward, and a broadcast between them would break autograd.
    """
    if not dist.is_initialized():
        return module
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # its successor is unknown to older releases
        return DistributedDataParallel(module, broadcast_buffers=False)


@contextmanager
def no_sync(modules, when):
    """In backward passes of this block, if `when`, gradients stay on their rank and add up: all but the last of an accumulation."""
    with ExitStack() as stack:
        for module in modules:
            if when and isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


def barrier():
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(tensor):
    """`tensor` summed over ranks, in place; returned for chaining. Accuracies are sums and counts, never means of means."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value):
    """A list of every rank's small picklable `value`, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def average_bn_statistics(model):
    """Give all ranks the mean of their BatchNorm running statistics, so that their checkpoints are one and the same.

    Only where BatchNorm is not SyncBatchNorm (CPU), and DDP broadcasts no buffers.
    """
    if not dist.is_initialized():
        return
    buffers = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    if buffers:
        flat = torch.cat([b.reshape(-1) for b in buffers])
        dist.all_reduce(flat)
        for buffer, mean in zip(buffers, (flat / dist.get_world_size()).split([b.numel() for b in buffers])):
            buffer.copy_(mean.view_as(buffer))
