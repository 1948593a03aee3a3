"""What people bring as a diffusion model: other schedules, other weights, other paths.

Alone: python -m pytest tests/teachers/test_opening.py
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import safetensors.torch
import torch
from diffusers_helper import tiny_ddpm, tiny_dit, tiny_unet
from edm_helper import EDM_CONFIGS, SONG, edm_config, random_edm

import train_at_aux
import train_diffusion
from common import UserError, cli, files
from published.datasets import DATASETS
from runs import keep_teacher
from teachers import edm
from teachers.load import load_diffusion

NAME = "diffusion_pytorch_model"


@pytest.mark.parametrize("form", ["directory", "pickle"])
def test_attention_without_end_is_one_line(form, tmp_path, nvlabs):
    """Over 256 x 256 places. A small file can ask for it; one pass would take minutes or hours."""
    path = nvlabs.path
    if form == "directory":
        path = tmp_path / "net"
        blocks = dict(down_block_types=["AttnDownBlock2D", "DownBlock2D"])
        tiny_ddpm(path, tiny_unet(sample_size=256, **blocks))
    else:
        config = edm_config("EDMPrecond", **SONG | {"attn_resolutions": [256]}, img_resolution=256)
        path.write_bytes(pickle.dumps(nvlabs.content(edm.build(config), config)))
    with pytest.raises(UserError, match="attention over 65,536 places, expected at most 16,384"):
        load_diffusion(str(path), "cpu")


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    """A folder with ddpm/ and dit/. Its models are copied before they are changed."""
    folder = tmp_path_factory.mktemp("models")
    tiny_ddpm(folder / "ddpm", variance_type="learned_range")
    tiny_dit(folder / "dit")
    return folder


def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(path, **changes):
    """Change entries of a JSON file; None removes one."""
    entries = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))


def refusal(path):
    with pytest.raises(UserError) as info:
        load_diffusion(str(path), "cpu")
    said = str(info.value)
    assert "\n" not in said and len(said) < 400
    return said


# ------------------------------------------------------------------------ what the networks compute


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("family", ["ddpm", "dit"])
def test_all_predictions_are_those_of_diffusers(family, predicts, dirs, tmp_path):
    """Our D is the clean image of diffusers' scheduler, in float64."""
    folder = copied(dirs / family, tmp_path)
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type=predicts)
    model = load_diffusion(str(folder), "cpu")
    model.net.double()
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler", clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    x_t = torch.randn(2, *model.noise_shape, dtype=torch.float64)
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        for t in (0, 500, 999):
            sigma = model.levels[t].item()
            output = model.net(x_t, torch.tensor([t, t]), class_labels=labels).sample
            assert output.shape[1] == 2 * x_t.shape[1]
            step = scheduler.step(output[:, : x_t.shape[1]], t, x_t)
            denoised = model.denoise(x_t * (1 + sigma**2) ** 0.5, sigma, labels)
            expected = step.pred_original_sample
            assert torch.allclose(denoised, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_ddpm_of_learned_variance_gives_its_noise_first(channels, tmp_path):
    net = tiny_unet(in_channels=channels, out_channels=2 * channels, num_class_embeds=None)
    tiny_ddpm(tmp_path / "m", net, variance_type="learned_range")
    model = load_diffusion(str(tmp_path / "m"), "cpu")
    noisy = torch.randn(2, channels, 8, 8)
    with torch.no_grad():
        sigma = model.levels[300].item()
        x_t = noisy / (1 + sigma**2) ** 0.5
        noise = net(x_t, torch.tensor([300, 300])).sample[:, :channels]
        assert torch.allclose(model.denoise(noisy, sigma), noisy - sigma * noise, atol=1e-4)


def test_other_numbers_of_channels_are_one_line(dirs, diffusion_dir, tmp_path):
    tiny_ddpm(tmp_path / "three", tiny_unet(out_channels=3))
    assert "out_channels is 3, expected 1 or 2" in refusal(tmp_path / "three")
    tiny_unet(out_channels=2).save_pretrained(tmp_path / "edm")
    entries = json.loads((Path(diffusion_dir) / "config.json").read_text())
    ours = {name: entries[name] for name in ("sigma_data", "label_dropout")}
    edit(tmp_path / "edm" / "config.json", **ours)
    assert "out_channels is 2, expected 1" in refusal(tmp_path / "edm")
    dit = copied(dirs / "dit", tmp_path)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[4], norm_num_groups=2, latent_channels=3, sample_size=8
    )
    vae.save_pretrained(dit / "vae")
    said = refusal(dit)
    assert "vae/config.json: latent_channels is 3, expected 4" in said
    net = diffusers.DiTTransformer2DModel(
        2, 4, out_channels=5, num_layers=1, sample_size=4, num_embeds_ada_norm=5
    )
    net.save_pretrained(dit / "transformer")
    assert "transformer/config.json: out_channels is 5, expected 4 or 8" in refusal(dit)


def test_a_network_without_a_middle_block(tmp_path):
    tiny_ddpm(tmp_path / "m", tiny_unet(mid_block_type=None))
    model = load_diffusion(str(tmp_path / "m"), "cpu")
    assert "mid_block" not in model.blocks
    x, noise = torch.rand(1, 1, 8, 8), torch.randn(1, 1, 8, 8)
    y = torch.zeros(1, dtype=torch.long)
    features = model.features(x, 1.0, y, model.blocks, noise)
    assert len(features) == len(model.blocks)


@pytest.mark.parametrize("kind", ["timestep", "identity"])
def test_embeddings_of_classes(kind, tmp_path):
    """A class as a number is read; a class as a vector is what nobody gives."""
    tiny_ddpm(tmp_path / "m", tiny_unet(class_embed_type=kind))
    if kind == "timestep":
        assert load_diffusion(str(tmp_path / "m"), "cpu").num_classes == 3
        edit(tmp_path / "m" / "unet" / "config.json", num_class_embeds=None)
    assert f"class_embed_type is '{kind}'" in refusal(tmp_path / "m")


@pytest.mark.parametrize("part", ["unet", "transformer", "vae"])
def test_a_pair_of_sizes(part, dirs, tmp_path):
    folder = copied(dirs / ("ddpm" if part == "unet" else "dit"), tmp_path)
    path = folder / part / "config.json"
    whole = load_diffusion(str(folder), "cpu")
    side = json.loads(path.read_text())["sample_size"]
    edit(path, sample_size=[side, side])
    model = load_diffusion(str(folder), "cpu")
    assert (model.image_size, model.noise_shape) == (whole.image_size, whole.noise_shape)
    for size in ([side, 2 * side], [side], [side] * 3, [], "8", 0, 10**6, 8.0):
        edit(path, sample_size=size)
        assert f"{part}/config.json: sample_size is" in refusal(folder)
    edit(path, sample_size=None)
    if part == "vae":  # which is of any size
        load_diffusion(str(folder), "cpu")
    else:
        assert f"{part}/config.json: sample_size is None" in refusal(folder)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "a ScoreSdeVeScheduler, expected a DDPM's"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "expected a DDPM's"),
        ({"_class_name": "x" * 999}, "expected a DDPM's"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ({"rescale_betas_zero_snr": True}, "not finite and increasing"),
        ({"beta_start": "low"}, "schedule that cannot be ('beta_start' is 'low')"),
    ],
)
def test_schedules_that_are_no_ddpms(changes, words, dirs, tmp_path):
    folder = copied(dirs / "ddpm", tmp_path)
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    said = refusal(folder)
    assert "scheduler/scheduler_config.json: " in said and words in said


def test_an_entry_that_cannot_be_is_named(dirs, tmp_path):
    folder = copied(dirs / "ddpm", tmp_path)
    path = folder / "unet" / "config.json"
    whole = path.read_bytes()
    for name, value, word in (
        ("layers_per_block", "2", "built ('layers_per_block' is '2')"),
        ("layers_per_block", 10**9, "layers_per_block is 1000000000, expected at most 1000"),
        ("freq_shift", "0", "run ('freq_shift' is '0')"),
        ("block_out_channels", [8], "built (Must provide the same number of"),
        ("block_out_channels", [10**9, 10**9], "cannot be built"),
    ):
        edit(path, **{name: value})
        assert word in refusal(folder)
        path.write_bytes(whole)


# ----------------------------------------------------------------------------------------- weights


def as_variant(folder, variant, bin=False):
    """Leave only a variant of the weights of a folder."""
    for path in folder.rglob(f"{NAME}.safetensors"):
        tensors = safetensors.torch.load_file(path)
        path.unlink()
        if bin:
            torch.save(tensors, path.with_name(f"{NAME}.{variant}.bin"))
        else:
            safetensors.torch.save_file(tensors, path.with_name(f"{NAME}.{variant}.safetensors"))


def denoised(folder):
    model = load_diffusion(str(folder), "cpu")
    assert {p.dtype for m in model.modules for p in m.parameters()} == {torch.float32}
    noisy = torch.ones(1, *model.noise_shape)
    with torch.no_grad():
        return model.denoise(noisy, 1.0, torch.tensor([0]))


@pytest.mark.parametrize("family", ["ddpm", "dit"])
@pytest.mark.parametrize("bin", [False, True])
def test_a_variant_alone_is_read(family, bin, dirs, tmp_path, capfd):
    expected = denoised(dirs / family)
    for variant in ("fp16", "non_ema", "bf16.ema"):
        folder = copied(dirs / family, tmp_path / variant)
        as_variant(folder, variant, bin)
        assert torch.equal(denoised(folder), expected)
    assert capfd.readouterr() == ("", "")


def test_plain_weights_win_and_then_fp16(dirs, tmp_path):
    folder = copied(dirs / "ddpm", tmp_path)
    before = denoised(folder)
    sha256 = load_diffusion(str(folder), "cpu").sha256
    unet = folder / "unet"
    tensors = safetensors.torch.load_file(unet / f"{NAME}.safetensors")
    tensors["conv_out.bias"] += 1
    for variant in ("ema", "fp16"):
        safetensors.torch.save_file(tensors, unet / f"{NAME}.{variant}.safetensors")
    torch.save(tensors, unet / f"{NAME}.bin")
    assert torch.equal(denoised(folder), before)
    assert load_diffusion(str(folder), "cpu").sha256 == sha256  # of what is read, no more

    (unet / f"{NAME}.safetensors").unlink()
    (unet / f"{NAME}.ema.safetensors").write_bytes(b"not read")
    assert not torch.equal(denoised(folder), before)  # the plain .bin
    (unet / f"{NAME}.bin").unlink()
    assert not torch.equal(denoised(folder), before)  # fp16
    of_fp16 = load_diffusion(str(folder), "cpu").sha256
    (unet / f"{NAME}.ema.safetensors").write_bytes(b"nor hashed")
    assert load_diffusion(str(folder), "cpu").sha256 == of_fp16
    (unet / f"{NAME}.fp16.safetensors").rename(unet / f"{NAME}.non_ema.safetensors")
    said = refusal(folder)
    assert f"{NAME}.ema.safetensors, {NAME}.non_ema.safetensors" in said and "several" in said


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
@pytest.mark.parametrize("safe", [True, False])
def test_weights_in_several_files(variant, safe, dirs, tmp_path, capfd):
    """As diffusers writes them; without their index, one line."""
    folder = copied(dirs / "ddpm", tmp_path)
    expected = denoised(folder)
    net = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    shutil.rmtree(folder / "unet")
    options = {"variant": variant, "safe_serialization": safe, "max_shard_size": "10KB"}
    net.save_pretrained(folder / "unet", **options)
    assert len(list((folder / "unet").glob("*-of-*"))) > 1
    capfd.readouterr()
    assert torch.equal(denoised(folder), expected)
    assert capfd.readouterr() == ("", "")
    (index,) = (folder / "unet").glob("*index*")
    before = load_diffusion(str(folder), "cpu").sha256
    part = sorted((folder / "unet").glob("*-of-*"))[0]
    if safe:
        flipped = bytearray(part.read_bytes())
        flipped[-1] ^= 1
        part.write_bytes(flipped)
        assert load_diffusion(str(folder), "cpu").sha256 != before
    edit(index, weight_map={"conv_in.bias": "../../secret.bin"})
    assert "not an index of weights" in refusal(folder)
    index.unlink()
    assert "without an index" in refusal(folder)


def test_bin_weights_alone_are_read_in_silence(dirs, tmp_path, capfd):
    for family in ("ddpm", "dit"):
        folder = copied(dirs / family, tmp_path / family)
        expected = denoised(folder)
        for path in folder.rglob(f"{NAME}.safetensors"):
            torch.save(safetensors.torch.load_file(path), path.with_suffix(".bin"))
            path.unlink()
        assert torch.equal(denoised(folder), expected)
    assert capfd.readouterr() == ("", "")


def test_old_names_of_attention_and_of_the_first_dits(dirs, tmp_path):
    for family in ("ddpm", "dit"):
        folder = copied(dirs / family, tmp_path / family)
        expected = denoised(folder)
        part = "unet" if family == "ddpm" else "vae"
        path = folder / part / f"{NAME}.safetensors"
        tensors = safetensors.torch.load_file(path)
        for new, old in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            tensors = {name.replace(f".{new}.", f".{old}."): t for name, t in tensors.items()}
        assert any("proj_attn" in name for name in tensors)
        safetensors.torch.save_file(tensors, path)
        if family == "dit":
            edit(folder / "transformer" / "config.json", _class_name="Transformer2DModel")
        assert torch.equal(denoised(folder), expected)


def test_opening_draws_no_random_numbers(dirs):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_diffusion(str(dirs / "ddpm"), "cpu")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("conv_out.bias"), "missing keys: conv_out.bias"),
        (lambda t: t.update(more=torch.ones(1)), "unexpected keys: more"),
        (lambda t: t.update({"conv_out.bias": torch.ones(5)}), "conv_out.bias is 5, expected 2"),
        (lambda t: t.update({"conv_out.bias": torch.ones(2).long()}), "not of floating-point"),
    ],
)
def test_weights_of_another_network(change, words, dirs, tmp_path):
    folder = copied(dirs / "ddpm", tmp_path)
    path = folder / "unet" / f"{NAME}.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    assert words in refusal(folder)


def test_a_pointer_of_git_lfs(dirs, tmp_path):
    folder = copied(dirs / "ddpm", tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (folder / "unet" / f"{NAME}.safetensors").write_text(pointer)
    assert "git lfs pull" in refusal(folder)


# ------------------------------------------------------------------------------------------- paths


def test_ways_to_write_a_path(dirs, tmp_path, monkeypatch):
    sha256 = load_diffusion(str(dirs / "ddpm"), "cpu").sha256
    monkeypatch.setenv("HOME", str(dirs))
    (tmp_path / "link").symlink_to(dirs / "ddpm")
    for path in (f"{dirs}/ddpm/", f"{dirs}/ddpm//", "~/ddpm", "~/ddpm/", tmp_path / "link"):
        assert load_diffusion(str(path), "cpu").sha256 == sha256


def test_an_nvlabs_pickle_in_capitals(nvlabs, tmp_path):
    config = EDM_CONFIGS["vp"]
    path = tmp_path / "NET.PKL"
    content = nvlabs.content(random_edm("vp", torch.float32), config)
    path.write_bytes(pickle.dumps(content))
    assert load_diffusion(str(path), "cpu").num_classes == 3


def test_a_file_of_a_good_directory(dirs, diffusion_dir):
    for path, folder in (
        (dirs / "ddpm" / "model_index.json", dirs / "ddpm"),
        (dirs / "ddpm" / "unet" / "config.json", dirs / "ddpm"),
        (dirs / "dit" / "vae" / f"{NAME}.safetensors", dirs / "dit"),
        (f"{diffusion_dir}/{NAME}.safetensors", diffusion_dir),
        (f"{diffusion_dir}/last.pt", diffusion_dir),
    ):
        said = refusal(path)
        assert said == f"{path}: a file of a model, expected its directory: {folder}"


def test_a_part_of_a_pipeline(dirs):
    for family, part in (("ddpm", "unet"), ("dit", "vae"), ("dit", "transformer")):
        said = refusal(dirs / family / part)
        assert f"; it is a part of {dirs / family}, give that directory" in said
    assert "part of" in refusal(dirs / "ddpm" / "scheduler")


@pytest.mark.parametrize(
    "name, words",
    [
        ("training-state-001000.pt", "a training state of NVlabs' EDM"),
        ("DiT-XL-2-256x256.pt", "hub:facebook/DiT-XL-2-256"),
        ("v1-5-pruned.ckpt", "weights alone"),
        ("model.safetensors", "weights alone"),
        ("pytorch_lora_weights.safetensors", "a LoRA"),
        ("notes.txt", "a file that is no diffusion model"),
        ("random_states_0.pkl", "a zip file of weights, expected NVlabs' .pkl"),
    ],
)
def test_files_that_are_no_model(name, words, tmp_path):
    path = tmp_path / name
    torch.save({"a": torch.ones(1)}, path)
    said = refusal(path)
    assert words in said and said.startswith(f"{path}: ") and "no such file" not in said


@pytest.mark.parametrize(
    "names, words",
    [
        ([], "an empty directory, expected"),
        (["pytorch_lora_weights.safetensors"], "a LoRA"),
        (["adapter_config.json", "adapter_model.safetensors"], "a LoRA"),
        (["network-snapshot-000010.pkl", "log.txt"], "network-snapshot-000010.pkl: give that"),
        (["optimizer.bin", "random_states_0.pkl", "scheduler.bin"], "a directory of optimizer.bin"),
        (["args.json", "env.json", "last.pt"], "a run that is not finished"),
        ([f"{NAME}.safetensors"], "weights without their config.json"),
        (["a/config.json", "b/model_index.json"], "a, b in it may be one"),
        (["unet_ema/config.json", "optimizer.bin"], "unet_ema in it may be one"),
    ],
)
def test_directories_that_are_no_model(names, words, tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    said = refusal(folder)
    assert words in said and said.startswith(f"{folder}: ") and "no such file" not in said


def test_a_checkpoint_of_a_training(dirs, diffusion_dir, tmp_path):
    """accelerate's layout: unet/ without a scheduler. With one, or with EDM's entries, it opens."""
    folder = tmp_path / "checkpoint-500"
    shutil.copytree(dirs / "ddpm" / "unet", folder / "unet")
    (folder / "optimizer.bin").write_text("")
    said = refusal(folder)
    assert f"no scheduler_config.json in {folder} or its scheduler/" in said
    assert "a checkpoint of a training has none, the finished pipeline has" in said
    shutil.copytree(dirs / "ddpm" / "scheduler", folder / "scheduler")
    assert torch.equal(denoised(folder), denoised(dirs / "ddpm"))
    shutil.rmtree(folder)
    (folder / "unet").mkdir(parents=True)
    for name in ("config.json", f"{NAME}.safetensors"):
        shutil.copy(f"{diffusion_dir}/{name}", folder / "unet")
    assert load_diffusion(str(folder), "cpu").num_classes == 10


@pytest.mark.parametrize(
    "pipeline, words",
    [
        (
            {
                "_class_name": "StableDiffusionPipeline",
                "unet": ["diffusers", "U"],
                "vae": ["d", "A"],
            },
            "a StableDiffusionPipeline with vae, expected a UNet2DModel, a DiTPipeline",
        ),
        ({"_class_name": "FluxPipeline", "transformer": ["d", "F"]}, "a FluxPipeline with"),
        ({"_class_name": "LDMPipeline", "unet": ["d", "U"], "vqvae": ["d", "V"]}, "with vqvae"),
        ({"_class_name": "DDPMPipeline", "unet": ["d", "U"]}, "unet/config.json: no such file"),
    ],
)
def test_other_pipelines(pipeline, words, dirs, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(pipeline))
    if "Stable" in words or "vqvae" in words:
        shutil.copytree(dirs / "ddpm" / "unet", tmp_path / "unet")
    assert words in refusal(tmp_path)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "UNet1DModel", "UNet3DConditionModel"])
def test_networks_that_take_other_inputs(name, dirs, tmp_path):
    folder = copied(dirs / "ddpm", tmp_path)
    edit(folder / "unet" / "config.json", _class_name=name)
    assert f"unet/config.json: a {name}, expected a UNet2DModel" in refusal(folder)
    edit(folder / "unet" / "config.json", _class_name=["x"])
    assert "a ['x'], expected" in refusal(folder)


def test_paths_that_do_not_exist(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert refusal("google/ddpm-cifar10-32").endswith("is written hub:google/ddpm-cifar10-32")
    assert "a link to nothing" in refusal("link")
    assert "an address" in refusal("https://huggingface.co/google/ddpm-cifar10-32")
    for path in ("runs/teacher", "nowhere", "/a/b", "a/b.safetensors", "a/b/c", "~/a"):
        said = refusal(path)
        assert "no such file or directory, expected a directory with" in said
        assert "written" not in said
    for name in ("digits", "cifar10", "tiny-imagenet"):
        for path in (f"out/diffusion-{name}", f"{tmp_path}/out/diffusion-{name}/"):
            assert refusal(path).endswith(f"run train_diffusion.py --dataset {name} first")


def test_the_first_command_of_a_beginner(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as info:
        cli.run_script(train_at_aux.main, train_at_aux.parse_args([]))
    printed = capsys.readouterr().err.strip().splitlines()
    assert info.value.code == 2 and len(printed) == 1
    said = "out/diffusion-digits: no such directory; run train_diffusion.py --dataset digits first"
    assert printed[0].endswith(said)


def test_hub_names_that_cannot_be(monkeypatch, tmp_path):
    for name in ("hub:", "hub:ddpm", "hub:a/b/c", "hub:/a", "hub:a/", "hub:a b/c", "hub:https://x"):
        assert "expected hub:OWNER/NAME" in refusal(name)
    (tmp_path / "README.md").write_text("")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **kwargs: str(tmp_path))
    assert refusal("hub:a/b").startswith("hub:a/b: a directory of README.md, expected")
    (tmp_path / "config.json").write_text("{}")
    assert refusal("hub:a/b").startswith("hub:a/b/config.json: no diffusers network")


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_written_networks_follow_the_umask(umask, nvlabs, tmp_path):
    """teachers.edm's conversion, and what train_diffusion.py saves."""
    content = nvlabs.content(random_edm("vp", torch.float32), EDM_CONFIGS["vp"])
    nvlabs.path.write_bytes(pickle.dumps(content))
    args = train_diffusion.parse_args(["--channels", "8"])
    net = train_diffusion.build_network(DATASETS["digits"], args)

    class Run:
        def path(self, name):
            return os.path.join(tmp_path, name)

    before = os.umask(umask)
    try:
        edm.convert(str(nvlabs.path), str(tmp_path / "converted"))
        train_diffusion.save_diffusers(net, Run())
    finally:
        os.umask(before)
    written = [tmp_path / n for n in ("config.json", f"{NAME}.safetensors")]
    written += [tmp_path / "converted" / n for n in ("config.json", "model.safetensors")]
    assert {path.stat().st_mode & 0o777 for path in written} == {0o666 & ~umask}


def test_a_network_kept_in_bf16(diffusion_dir, tmp_path, capsys):
    """runs/keep_teacher.py: half the bytes; opened in fp32 it computes with rounded weights."""
    kept = tmp_path / "kept"
    keep_teacher.main(keep_teacher.parse_args([diffusion_dir, str(kept)]))
    weights = kept / f"{NAME}.safetensors"
    assert weights.stat().st_size < 0.6 * Path(diffusion_dir, weights.name).stat().st_size
    assert files.sha256(str(weights)) in capsys.readouterr().out
    original, copy = load_diffusion(diffusion_dir, "cpu"), load_diffusion(str(kept), "cpu")
    assert copy.label_dropout == original.label_dropout and copy.val_size == original.val_size
    for parameter, rounded in zip(original.net.parameters(), copy.net.parameters()):
        assert rounded.dtype == torch.float32
        assert torch.equal(parameter.bfloat16().float(), rounded)
