"""The network of train_diffusion.py --self-conditioning: DDAE++'s self-conditioning of a U-Net.

DDAE++ (Xiang et al., arXiv 2505.10999) aggregates features of the middle of the network and guides
the decoder by them, so that these features come to hold what the whole image is. We know its
abstract and no code for U-Nets. Ours: h is the output of the middle block, averaged over space, and
the blocks of the decoder receive

    emb(sigma, y) + W h + b

in place of the embedding of noise level and label alone. W and b start at 0, where the network is
the plain one. The gradient flows through h.
"""

import functools

from diffusers import UNet2DModel
from torch import nn


class SelfConditionedUNet(UNet2DModel):
    """A UNet2DModel with one layer more, self_conditioning. It takes the same arguments.

    Its class name in config.json tells it from a plain one.
    """

    @functools.wraps(UNet2DModel.__init__)  # diffusers looks the arguments up there
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        channels = self.config.block_out_channels[-1]
        self.self_conditioning = nn.Linear(channels, self.time_embedding.linear_2.out_features)
        nn.init.zeros_(self.self_conditioning.weight)
        nn.init.zeros_(self.self_conditioning.bias)

    def forward(self, sample, timestep, class_labels, return_dict=False):
        """UNet2DModel's forward with the one line more, for the blocks of train_diffusion.py.

        sample: (B, C, H, W). timestep: (B,). class_labels: (B,) int64. Returns a tuple of one
        tensor like sample.
        """
        emb = self.time_embedding(self.time_proj(timestep).to(self.dtype))
        emb = emb + self.class_embedding(class_labels).to(self.dtype)
        h = self.conv_in(sample)
        skips = [h]
        for block in self.down_blocks:
            h, outputs = block(h, emb)
            skips += outputs
        h = self.mid_block(h, emb)
        emb = emb + self.self_conditioning(h.mean((2, 3)))
        for block in self.up_blocks:
            n = len(block.resnets)
            h = block(h, tuple(skips[-n:]), emb)
            del skips[-n:]
        return (self.conv_out(self.conv_act(self.conv_norm_out(h))),)
