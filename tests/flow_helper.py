"""Small SiTs and JiTs with random weights, as published files hold them, and what they compute.

For tests of teachers/. The networks are written here a second time, plainly: one image, in NumPy.
"""

import diffusers
import numpy as np
import torch


def random_tensors(shapes):
    """A tensor of each shape, of a size that keeps numbers near 1. Zeros would hide errors."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        if name.endswith("weight") and len(shape) > 1 and "table" not in name:
            tensor *= np.prod(shape[1:]) ** -0.5
        elif name.endswith("weight") and len(shape) == 1:
            tensor = 1 + 0.1 * tensor
        else:
            tensor *= 0.3
        tensors[name] = tensor
    return tensors


def linears(shapes, name, n_in, n_out):
    shapes[f"{name}.weight"] = (n_out, n_in)
    shapes[f"{name}.bias"] = (n_out,)


def common_shapes(size, channels, patch, width, depth, num_classes, out_channels):
    shapes = {"pos_embed": (1, (size // patch) ** 2, width)}
    shapes["y_embedder.embedding_table.weight"] = (num_classes + 1, width)
    linears(shapes, "t_embedder.mlp.0", 256, width)
    linears(shapes, "t_embedder.mlp.2", width, width)
    for i in range(depth):
        linears(shapes, f"blocks.{i}.attn.qkv", width, 3 * width)
        linears(shapes, f"blocks.{i}.attn.proj", width, width)
        linears(shapes, f"blocks.{i}.adaLN_modulation.1", width, 6 * width)
    linears(shapes, "final_layer.linear", width, patch**2 * out_channels)
    linears(shapes, "final_layer.adaLN_modulation.1", width, 2 * width)
    return shapes


def sit_tensors(size=4, channels=4, patch=2, depth=2, num_classes=3, out_channels=8):
    """The state dict of a SiT of width 384, whose heads are 6."""
    width = 384
    shapes = common_shapes(size, channels, patch, width, depth, num_classes, out_channels)
    shapes["x_embedder.proj.weight"] = (width, channels, patch, patch)
    shapes["x_embedder.proj.bias"] = (width,)
    for i in range(depth):
        linears(shapes, f"blocks.{i}.mlp.fc1", width, 4 * width)
        linears(shapes, f"blocks.{i}.mlp.fc2", 4 * width, width)
    return random_tensors(shapes)


def jit_tensors(size=8, channels=1, patch=4, width=24, heads=3, num_classes=10):
    """The state dict of a JiT of 12 blocks, with 5 class tokens and a bottleneck of 7."""
    shapes = common_shapes(size, channels, patch, width, 12, num_classes, channels)
    shapes["x_embedder.proj1.weight"] = (7, channels, patch, patch)
    shapes["x_embedder.proj2.weight"] = (width, 7, 1, 1)
    shapes["x_embedder.proj2.bias"] = (width,)
    shapes["in_context_posemb"] = (1, 5, width)
    shapes["final_layer.norm_final.weight"] = (width,)
    for i in range(12):
        for name in ("norm1", "norm2"):
            shapes[f"blocks.{i}.{name}.weight"] = (width,)
        for name in ("q_norm", "k_norm"):
            shapes[f"blocks.{i}.attn.{name}.weight"] = (width // heads,)
        hidden = width * 8 // 3
        linears(shapes, f"blocks.{i}.mlp.w12", width, 2 * hidden)
        linears(shapes, f"blocks.{i}.mlp.w3", hidden, width)
    return random_tensors(shapes)


def jit_checkpoint(tensors):
    """What the public code's training saves around the average of the weights, in part."""
    named = {f"net.{name}": tensor for name, tensor in tensors.items()}
    others = {name: torch.zeros(1) for name in named}
    return {"model": others, "model_ema1": named, "model_ema2": others, "epoch": 599}


def tiny_vae(folder, channels=3):
    """A VAE that halves images, in a folder."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=[4, 4],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=2,
        sample_size=8,
    )
    vae.save_pretrained(folder)


# ------------------------------------------------------------------------ what they compute


def silu(x):
    return x / (1 + np.exp(-x))


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def rms_norm(x, weight):
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def embedding(w, t):
    """Of a time t in [0, 1], before the label's is added."""
    angles = [t * 10000 ** (-i / 128) for i in range(128)]
    code = np.concatenate([np.cos(angles), np.sin(angles)])
    return linear(w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", code)))


def patches_of(x, patch):
    """Patches (N, C, patch, patch) of an image (C, R, R), row by row."""
    cuts = range(0, x.shape[1], patch)
    return [x[:, i : i + patch, j : j + patch] for i in cuts for j in cuts]


def picture(outputs, patch, side):
    """The image (C, R, R) of outputs (N, patch * patch * C) of patches, row by row."""
    image = np.zeros((outputs.shape[1] // patch**2, side * patch, side * patch))
    for n, output in enumerate(outputs):
        row, column = divmod(n, side)
        for i in range(patch):
            for j in range(patch):
                for c in range(len(image)):
                    value = output.reshape(patch, patch, -1)[i, j, c]
                    image[c, row * patch + i, column * patch + j] = value
    return image


def attention(w, name, x, heads, prepared=None):
    """Head by head. prepared: what is done to the queries or keys of a head."""
    qkv = np.split(linear(w, f"{name}.qkv", x), 3, axis=1)
    outputs = []
    for q, k, v in zip(*(np.split(part, heads, axis=1) for part in qkv)):
        if prepared is not None:
            q, k = prepared(q, "q_norm"), prepared(k, "k_norm")
        scores = np.exp(q @ k.T / np.sqrt(q.shape[1]))
        outputs.append(scores / scores.sum(1, keepdims=True) @ v)
    return linear(w, f"{name}.proj", np.concatenate(outputs, 1))


def sit_reference(tensors, x, t, label):
    """The output (out_channels, R, R) of a SiT for one x_t (C, R, R): its blocks' outputs too."""
    w = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    kernel = w["x_embedder.proj.weight"]
    patch = kernel.shape[2]
    tokens = [np.tensordot(kernel, part, 3) for part in patches_of(x, patch)]
    tokens = np.stack(tokens) + w["x_embedder.proj.bias"] + w["pos_embed"][0]
    c = silu(embedding(w, t) + w["y_embedder.embedding_table.weight"][label])
    blocks = []
    while f"blocks.{len(blocks)}.attn.qkv.weight" in w:
        name = f"blocks.{len(blocks)}"
        parts = np.split(linear(w, f"{name}.adaLN_modulation.1", c), 6)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        h = attention(w, f"{name}.attn", layer_norm(tokens) * (1 + scale1) + shift1, 6)
        tokens = tokens + gate1 * h
        h = linear(w, f"{name}.mlp.fc1", layer_norm(tokens) * (1 + scale2) + shift2)
        h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        tokens = tokens + gate2 * linear(w, f"{name}.mlp.fc2", h)
        blocks.append(tokens)
    shift, scale = np.split(linear(w, "final_layer.adaLN_modulation.1", c), 2)
    outputs = linear(w, "final_layer.linear", layer_norm(tokens) * (1 + scale) + shift)
    return picture(outputs, patch, x.shape[1] // patch), blocks


def turned(x, n_class_tokens, side):
    """Rotary positions, pair by pair: the class tokens stay, the image's turn by row and column."""
    turned = x.copy()
    quarter = x.shape[1] // 4
    for n in range(n_class_tokens, len(x)):
        for i in range(2 * quarter):
            place = divmod(n - n_class_tokens, side)[i // quarter]
            angle = place / 10000 ** ((i % quarter) / quarter)
            number = complex(x[n, 2 * i], x[n, 2 * i + 1]) * np.exp(1j * angle)
            turned[n, 2 * i : 2 * i + 2] = number.real, number.imag
    return turned


def jit_reference(tensors, x, t, label):
    """The clean image (C, R, R) of a JiT for one x_t (C, R, R): its blocks' outputs too."""
    w = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    kernel = w["x_embedder.proj1.weight"]
    patch = kernel.shape[2]
    side = x.shape[1] // patch
    heads = w["pos_embed"].shape[2] // len(w["blocks.0.attn.q_norm.weight"])
    tokens = np.stack([np.tensordot(kernel, part, 3) for part in patches_of(x, patch)])
    tokens = tokens @ w["x_embedder.proj2.weight"][:, :, 0, 0].T + w["x_embedder.proj2.bias"]
    tokens = tokens + w["pos_embed"][0]
    of_label = w["y_embedder.embedding_table.weight"][label]
    c = silu(embedding(w, t) + of_label)
    blocks = []
    n_class_tokens = 0
    for i in range(12):
        if i == 4:
            class_tokens = of_label + w["in_context_posemb"][0]
            n_class_tokens = len(class_tokens)
            tokens = np.concatenate([class_tokens, tokens])
        name = f"blocks.{i}"
        parts = np.split(linear(w, f"{name}.adaLN_modulation.1", c), 6)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts

        def prepared(x, norm, name=name, n_class_tokens=n_class_tokens):
            return turned(rms_norm(x, w[f"{name}.attn.{norm}.weight"]), n_class_tokens, side)

        h = rms_norm(tokens, w[f"{name}.norm1.weight"]) * (1 + scale1) + shift1
        tokens = tokens + gate1 * attention(w, f"{name}.attn", h, heads, prepared)
        h = rms_norm(tokens, w[f"{name}.norm2.weight"]) * (1 + scale2) + shift2
        first, second = np.split(linear(w, f"{name}.mlp.w12", h), 2, axis=1)
        tokens = tokens + gate2 * linear(w, f"{name}.mlp.w3", silu(first) * second)
        blocks.append(tokens)
    shift, scale = np.split(linear(w, "final_layer.adaLN_modulation.1", c), 2)
    h = rms_norm(tokens[n_class_tokens:], w["final_layer.norm_final.weight"])
    outputs = linear(w, "final_layer.linear", h * (1 + scale) + shift)
    return picture(outputs, patch, side), blocks
