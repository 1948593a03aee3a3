"""Shared fixtures: one thread; a diffusion model of three steps, a synthetic set of 64 images and a
tiny DiT, made once per session.
"""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

# On the CPU also where there is a GPU: golden losses and two processes want it.
# CUDA_VISIBLE_DEVICES=0 make test runs the rest there.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# The cache of decoded images, of this process and of the scripts that it starts.
CACHE = tempfile.mkdtemp(prefix="dra-cache-")
os.environ["XDG_CACHE_HOME"] = CACHE
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import generate_synthetic  # noqa: E402
import train_diffusion  # noqa: E402
from published.datasets import DATASETS  # noqa: E402

torch.set_num_threads(1)
DIGITS = DATASETS["digits"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache directory for this test alone, which is made when something is put there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dra"


@pytest.fixture(scope="session")
def diffusion_dir(tmp_path_factory):
    """A directory of train_diffusion.py after three steps: untrained for all purposes, but of the
    real format.
    """
    path = tmp_path_factory.mktemp("made") / "diffusion"
    train_diffusion.main(
        train_diffusion.parse_args(
            ["--train-steps", "3", "--channels", "8", "16", "--out-dir", str(path)]
        )
    )
    return str(path)


@pytest.fixture(scope="session")
def synthetic_dir(tmp_path_factory, diffusion_dir):
    """Three shards, 64 images."""
    path = tmp_path_factory.mktemp("made") / "synthetic"
    argv = [
        "--diffusion",
        diffusion_dir,
        *"--n-images 64 --shard-size 24 --n-steps 3 --batch-size 16 --out-dir".split(),
        str(path),
    ]
    generate_synthetic.main(generate_synthetic.parse_args(argv))
    return str(path)


@pytest.fixture(scope="session")
def dit_dir(tmp_path_factory):
    """The kind of facebook/DiT-XL-2-256, tiny: 4 blocks, 64 pixels, latents of 8 x 8."""
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    for parameter in net.parameters():  # diffusers starts the last layers with zeros
        torch.nn.init.normal_(parameter, std=0.2)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8] * 4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.18215,
    )
    scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    path = tmp_path_factory.mktemp("dit")
    diffusers.DiTPipeline(net, vae, scheduler).save_pretrained(path)
    return str(path)


@pytest.fixture
def nvlabs(monkeypatch, tmp_path):
    """Stand-ins for NVlabs' modules while a test writes pickles; `marker` exists once any code of a
    pickle has run.
    """
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    marker = tmp_path / "ran"

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("called")

    class EasyDict(dict):
        def __getattr__(self, name):
            try:
                return self[name]
            except KeyError:
                raise AttributeError(name) from None

    class Persistent(nn.Module):
        def __reduce__(self):
            state = dict(self.__dict__)
            meta = dict(
                type="class",
                version=6,
                module_src=f"open({str(marker)!r}, 'w')",
                class_name=state.pop("name"),
                state=state,
            )
            return _reconstruct_persistent_obj, (meta,)

    for module, thing in ((persistence, _reconstruct_persistent_obj), (util, EasyDict)):
        thing.__module__, thing.__qualname__ = module.__name__, thing.__name__
        setattr(module, thing.__name__, thing)
        monkeypatch.setitem(
            sys.modules,
            module.__name__.split(".")[0],
            types.ModuleType(module.__name__.split(".")[0]),
        )
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def wrap(module, **attributes):
        """A module of ours as NVlabs' persistent object with real parameters inside; ModuleDicts
        stay torch's own.
        """
        if isinstance(module, nn.ModuleDict):
            return nn.ModuleDict({key: wrap(child) for key, child in module.items()})
        copy = Persistent()
        copy.name, copy._init_args, copy._init_kwargs = type(module).__name__, (), {}
        for key, value in attributes.items():
            setattr(copy, key, value)
        for key, value in module._parameters.items():
            copy.register_parameter(key, value)
        for key, value in module._buffers.items():
            copy.register_buffer(key, value)
        if isinstance(module, nn.Conv2d) and not module._buffers:
            copy.register_buffer("resample_filter", None)
        for key, child in module._modules.items():
            copy.register_module(key, child and wrap(child))
        return copy

    def content(net, config, **changes):
        init = dict(config["init"])
        args = [init.pop("img_resolution"), init.pop("img_channels")]
        init = EasyDict(init)
        ema = wrap(
            net, name=config["precond"], _init_args=tuple(args), _init_kwargs=init, **changes
        )
        loss, augment = (
            wrap(nn.Module(), name="EDMLoss", P_mean=np.float64(-1.2)),
            wrap(nn.Module(), name="AugmentPipe", p=0.12),
        )
        return {
            "ema": ema,
            "loss_fn": loss,
            "augment_pipe": augment,
            "dataset_kwargs": EasyDict(path="cifar10.zip", max_size=np.int64(5)),
        }

    return types.SimpleNamespace(
        content=content,
        marker=marker,
        EasyDict=EasyDict,
        Persistent=Persistent,
        wrap=wrap,
        path=tmp_path / "x.pkl",
    )


_fork_server = None


def python(*command, expect=0, ranks=1, env=None, real=False):
    """Run `python command` (under torchrun with several ranks) in the project's root; returns the
    finished process.

    A script runs in a fork of a process that has imported torch (fork_server.py). real: in a
    process of its own, started by torchrun itself, as `-c` and `-m` are always.
    """
    command = [str(word) for word in command]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    if real or not command[0].endswith(".py"):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        launcher = [sys.executable] + (torchrun if ranks > 1 else [])
        options = {"cwd": ROOT, "env": env, "capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run(launcher + command, **options)
    else:
        done = _forked(command, ranks, env)
    assert done.returncode == expect, (
        f"{command}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done


def _forked(command, ranks, env):
    global _fork_server
    if _fork_server is None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        server = [sys.executable, str(ROOT / "tests" / "fork_server.py")]
        _fork_server = subprocess.Popen(server, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("stdout", "stderr"):
            Path(folder, name).touch()
        job = {"command": command, "ranks": ranks, "env": env, "folder": folder}
        _fork_server.stdin.write(json.dumps(job) + "\n")
        _fork_server.stdin.flush()
        status = int(_fork_server.stdout.readline())
        texts = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(command, status, *texts)


def read_log(run_dir, drop=("images_per_s", "data_wait", "seconds")):
    """The run's log lines, without what is time."""
    lines = (Path(run_dir) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in lines]


def assert_equal_states(a, b, ignore=("seconds",)):
    """Two checkpoints hold the same entries, tensors bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key not in ignore:
                assert_equal_states(a[key], b[key], ignore)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for left, right in zip(a, b):
            assert_equal_states(left, right, ignore)
    elif torch.is_tensor(a):
        assert torch.equal(a, b)
    else:
        assert a == b
