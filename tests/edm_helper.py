"""Small networks of NVlabs' EDM with random weights, for tests of teachers/."""

import torch

from teachers import edm

SONG = {
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
ADM = {
    "model_type": "DhariwalUNet",
    "model_channels": 32,
    "channel_mult": [2, 4],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "channel_mult_emb": 1,
}
NCSN = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}


def edm_config(precond, **init):
    """A config as edm.build takes it, by default for images of 8 x 8 pixels and 2 channels."""
    init = {"img_resolution": 8, "img_channels": 2} | init
    return {"kind": "nvlabs-edm", "precond": precond, "init": init}


EDM_CONFIGS = {  # every preconditioning, and every variant of both networks
    "vp": edm_config("VPPrecond", label_dim=3, augment_dim=9, **SONG),
    "ve": edm_config("VEPrecond", encoder_type="residual", augment_dim=9, **NCSN, **SONG),
    "edm": edm_config(
        "EDMPrecond", label_dim=3, sigma_data=0.6, encoder_type="skip", decoder_type="skip", **SONG
    ),
    "adm": edm_config("EDMPrecond", label_dim=3, augment_dim=9, **ADM),
    "iddpm": edm_config("iDDPMPrecond", M=50, **ADM),
}


def random_edm(name, dtype=torch.float64):
    """A network of EDM_CONFIGS whose every parameter is random: initial zeros would hide errors."""
    torch.manual_seed(0)
    net = edm.build(EDM_CONFIGS[name]).to(dtype).eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 1:
                p.copy_(1 + 0.3 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5)
    return net
