"""Own the autoencoder that changes nothing: a full-resolution AutoencoderTiny with weights set by hand."""

import math

import torch
from diffusers import AutoencoderTiny

# The decoder squashes its input by 3 tanh(x / 3); straight pieces between these points undo that.
KNOTS = (0.0, 0.25, 0.5, 0.75, 1.0)
NUM_CHANNELS = 3


def build_autoencoder() -> AutoencoderTiny:
    """Return an autoencoder whose decode(encode(x)) is x within a fifth of a step of 8-bit colour."""
    slopes = _slope_changes()
    hidden = NUM_CHANNELS * 2 * len(slopes)
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(NUM_CHANNELS,),
        decoder_block_out_channels=(hidden,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        latent_channels=NUM_CHANNELS,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.zero_()
        # The encoder maps to [0, 1] by itself first; its two convolutions lead back to [-1, 1].
        into, out_of = autoencoder.encoder.layers
        for channel in range(NUM_CHANNELS):
            into.weight[channel, channel, 1, 1] = 1
            out_of.weight[channel, channel, 1, 1] = 2
            out_of.bias[channel] = -1
        into, _, out_of = autoencoder.decoder.layers
        for channel in range(NUM_CHANNELS):
            # The decoder's last operation is 2x - 1.
            out_of.bias[channel] = 0.5
            for i, (start, change) in enumerate(slopes):
                for j, sign in enumerate((1, -1)):
                    unit = (channel * len(slopes) + i) * 2 + j
                    into.weight[unit, channel, 1, 1] = sign
                    into.bias[unit] = -start
                    out_of.weight[channel, unit, 1, 1] = sign * change / 2
    return autoencoder.eval()


def _slope_changes() -> list[tuple[float, float]]:
    """Return (squashed knot, change of slope there) of the inverse of 3 tanh(x / 3) for positive x."""
    squashed = [3 * math.tanh(knot / 3) for knot in KNOTS]
    slopes = [(KNOTS[i + 1] - KNOTS[i]) / (squashed[i + 1] - squashed[i]) for i in range(len(KNOTS) - 1)]
    return [(squashed[i], slope - (slopes[i - 1] if i else 0.0)) for i, slope in enumerate(slopes)]
