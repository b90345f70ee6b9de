"""Train `sfumato-tiny-image`, a text-to-image pipeline in diffusers form, on drawn shapes."""
