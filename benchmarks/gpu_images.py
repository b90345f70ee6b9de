"""Denoise steps of a transformer as large as Stable Diffusion 3's, through the engine, beside their floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from msgspec.structs import replace as changed

from benchmarks.gpu_timing import Machine, Section, seconds_of

HEADINGS = ["requests", "floor ms", "step ms", "step / floor", "transformer alone ms", "pictures/s over one"]
# Stable Diffusion 3 medium's transformer; the parts around it are tiny.
_REAL = {
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
}
_TINY = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32}
# 1024 image tokens: 64 x 64 latents in patches of two.
_SIDE, _TINY_SIDE = 128, 32
_STEPS = 10


def fill(machine: Machine, batches: list[int], *, is_tiny: bool) -> Callable[[Section], None]:
    """Return what fills the table."""

    def run(section: Section) -> None:
        from diffusers import SD3Transformer2DModel

        from benchmarks.images import PIPELINES
        from sfumato.config import EngineConfig
        from sfumato.engine.build_image import load_pipeline
        from sfumato.engine.image_engine import ImageEngine
        from sfumato.engine.image_params import ImageParams, make_image_spec
        from sfumato.engine.limits import Limits

        folder, device = PIPELINES / "sd3-tiny", machine.device
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        named = str(dtype).removeprefix("torch.")
        loaded = load_pipeline(EngineConfig(model=str(folder), dtype=named, device=device), folder, device)
        side = _TINY_SIDE if is_tiny else _SIDE
        config = {
            **loaded.family.pipeline.transformer.config,
            **(_TINY if is_tiny else _REAL),
            "sample_size": side // 2,
        }
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        with torch.device(device):
            transformer = SD3Transformer2DModel(**config).to(dtype).eval().requires_grad_(False)
        loaded.family.pipeline.transformer = transformer
        weights = sum(parameter.nbytes for parameter in transformer.parameters())
        products = sum(parameter.numel() for parameter in transformer.parameters() if parameter.dim() > 1)
        params = ImageParams(
            prompt="a red cat",
            height=side,
            width=side,
            num_inference_steps=_STEPS,
            guidance_scale=1.0,
            seed=1,
            max_sequence_length=16,
        )
        first = 0.0
        for number in batches:
            limits = Limits(max_running_requests=number)
            engine = ImageEngine.from_loaded(replace(loaded, config=changed(loaded.config, limits=limits)))
            specs = [make_image_spec(params, loaded.traits) for _ in range(number)]
            found: list[float] = []
            for _ in range(3):
                for spec in specs:
                    engine.add_request(spec)
                found = []
                while engine.has_work:
                    for turn in engine.step():
                        found += [step.device_seconds for step in turn.steps if step.kind == "denoise"]
                        for output in turn.outputs:
                            assert output.error is None, output.error
            engine.close()
            tokens = (side // 4) ** 2
            floor = max(2 * products * tokens * number / machine.operations, weights / machine.bandwidth)
            step = statistics.median(found)
            sample = torch.randn(number, config["in_channels"], side // 2, side // 2, device=device).to(dtype)
            texts = torch.randn(number, 16 + 77, config["joint_attention_dim"], device=device).to(dtype)
            pooled = torch.randn(number, config["pooled_projection_dim"], device=device).to(dtype)
            times = torch.full((number,), 500.0, device=device)
            bare = seconds_of(
                lambda s=sample, t=texts, p=pooled, w=times: _forward(transformer, s, t, p, w), device, runs=5
            )
            first = first or step
            section.rows.append(
                [
                    str(number),
                    f"{1e3 * floor:.2f}",
                    f"{1e3 * step:.2f}",
                    f"{step / floor:.2f}",
                    f"{1e3 * bare:.2f}",
                    f"{number * first / step:.2f}",
                ]
            )
        section.notes.append(
            f"{products / 1e9:.2f} billion weights in products; the floor leaves attention and texts out. "
            "Wanted: within 1.5 times."
        )

    return run


@torch.no_grad()
def _forward(
    transformer: torch.nn.Module,
    sample: torch.Tensor,
    texts: torch.Tensor,
    pooled: torch.Tensor,
    times: torch.Tensor,
) -> object:
    return transformer(
        hidden_states=sample,
        encoder_hidden_states=texts,
        pooled_projections=pooled,
        timestep=times,
        return_dict=False,
    )
