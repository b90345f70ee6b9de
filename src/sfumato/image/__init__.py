"""Images and short videos: request state, stages, batched denoise steps; the models are diffusers' own."""
