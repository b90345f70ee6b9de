"""Own the export of a trained state as an ordinary diffusers folder, and its check through the pipeline."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from transformers import CLIPTokenizer

from recipes.image.autoencoder import build_autoencoder
from recipes.image.model import Painter
from recipes.image.plan import ImagePlan
from recipes.image.render import SIDE
from recipes.image.sample import DEFAULT_GUIDANCE, DEFAULT_STEPS, NUM_TRAIN_TIMESTEPS, SHIFT, sample
from recipes.image.silent_t5 import build_silent_encoder, build_silent_tokenizer
from recipes.image.tokenizer import save_tokenizer
from recipes.image.train import State

CHECK_PROMPTS = ("a red circle above a green square", "a small blue ring on a black background")
CHECK_STEPS = 8
# The pipeline draws from the same weights with 256 real zeros, and its decoder bends colours a little.
PICTURE_TOLERANCE = 0.02

# What a request takes that says nothing; prompts have 18 tokens at most.
DEFAULTS = {
    "default_steps": DEFAULT_STEPS,
    "default_guidance_scale": DEFAULT_GUIDANCE,
    "max_sequence_length": 96,
}


def export(state: State, plan: ImagePlan) -> None:
    """Write the averaged weights in half precision to the zoo and check that the pipeline draws the same."""
    folder = plan.zoo_folder
    if folder.exists():
        shutil.rmtree(folder)
    painter = state.averaged_model(plan)
    with tempfile.TemporaryDirectory() as tokenizer_folder:
        save_tokenizer(Path(tokenizer_folder))
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    pipeline = StableDiffusion3Pipeline(
        transformer=painter.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=SHIFT),
        vae=build_autoencoder(),
        text_encoder=painter.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=painter.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=build_silent_encoder(2 * plan.text_width),
        tokenizer_3=build_silent_tokenizer(),
    )
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.half()
    pipeline.save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        save_tokenizer(folder / name)
    _mend_configs(folder)
    (folder / "sfumato.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n", encoding="utf-8")
    print(f"{folder}: largest difference to the recipe's own sampling {check(plan):.4f}")


def _mend_configs(folder: Path) -> None:
    """Let the folder open in float32 and without warnings; only the files are in half precision."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        # AutoencoderTiny makes this entry itself and warns of one that it finds.
        config.pop("block_out_channels", None)
        if "dtype" in config:
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_pipeline(plan: ImagePlan) -> StableDiffusion3Pipeline:
    """Open the exported folder as anybody would."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(plan.zoo_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_exported(plan: ImagePlan) -> Painter:
    """Return the training form of the exported weights."""
    pipeline = load_pipeline(plan)
    painter = Painter(plan)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        getattr(painter, name).load_state_dict(getattr(pipeline, name).state_dict())
    return painter.eval()


def check(plan: ImagePlan) -> float:
    """Draw from the exported folder in both ways; returns the largest difference of colours in [0, 1].

    Raises:
        ValueError: the pictures differ by more than PICTURE_TOLERANCE.
    """
    pipeline = load_pipeline(plan)
    ours = sample(load_exported(plan), list(CHECK_PROMPTS), seed=0, num_steps=CHECK_STEPS)
    latents = torch.randn(len(CHECK_PROMPTS), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        list(CHECK_PROMPTS),
        num_inference_steps=CHECK_STEPS,
        guidance_scale=DEFAULT_GUIDANCE,
        latents=latents,
        output_type="pt",
    ).images
    assert theirs.shape == ours.shape, theirs.shape
    difference = float((ours - theirs).abs().max())
    if difference > PICTURE_TOLERANCE:
        raise ValueError(f"the pipeline's pictures differ from the recipe's by {difference:.3f}")
    return difference
