"""The door of image models: what can never be drawn is refused here, with field, value and limit."""

from __future__ import annotations

from dataclasses import dataclass, field

from sfumato.core.spec import ImageSpec, Spec
from sfumato.errors import NotSupported, RequestError
from sfumato.image.families.protocol import Family
from sfumato.image.stages import begin
from sfumato.image.state import ImageState
from sfumato.image.work import ImageWork

MAX_IMAGES = 16
MAX_PREVIEWS = 16
_MAX_SCALE = 100.0
# What diffusers' pipelines take at most.
_MAX_TEXT = 1024
# Fields that only some families know, with the value that asks for nothing.
_FAMILY_FIELDS = {
    "guidance_rescale": 0.0,
    "true_cfg_scale": 1.0,
    "cfg_truncation": 1.0,
    "cfg_normalization": 0.0,
    "eta": 0.0,
    "clip_skip": None,
    "guidance_scale_2": None,
    "negative_prompts": None,
    "class_labels": (),
    "original_size": None,
    "target_size": None,
    "crops_coords_top_left": (0, 0),
    "num_frames": 1,
}
# Fields whose plural is the name of the spec alone.
_ASKED_AS = {"negative_prompts": "negative_prompt"}


@dataclass(slots=True)
class ImageDoor:
    """Checks specs and begins the work of requests.

    max_latent_bytes: of one step; a request that needs more alone is refused. is_deterministic: see
    `denoise.answers`.
    """

    family: Family
    max_latent_bytes: int
    max_rows: int
    is_deterministic: bool = False
    works: dict[str, ImageWork] = field(default_factory=dict)

    def __call__(self, request_id: str, spec: Spec) -> ImageWork:
        """Begin the work of one request, or go on with one that an in-process caller brought."""
        if request_id in self.works:
            return self.works.pop(request_id)
        if not isinstance(spec, ImageSpec):
            raise RequestError("this model draws images; ask it for one", field="model")
        self.check(spec)
        return ImageWork(self.begin(spec), self.family, is_deterministic=self.is_deterministic)

    def begin(self, spec: ImageSpec) -> ImageState:
        """Plan the schedule. Raises RequestError for all that diffusers' classes raise at wrong options."""
        try:
            return begin(self.family, spec)
        except RequestError:
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RequestError(
                f"the timestep scheduler refuses what is asked: {reason}",
                field="scheduler",
                value=spec.timestep_scheduler,
            ) from error

    def check(self, spec: Spec) -> None:
        """Raise RequestError for what can never be drawn."""
        if not isinstance(spec, ImageSpec):
            raise RequestError("this model draws images; ask it for one", field="model")
        self._check_fields(spec)
        self._check_counts(spec)
        self._check_numbers(spec)
        self._check_image(spec)
        self.family.check_size(spec)
        self.family.check(spec)
        self._check_room(spec)

    def _check_fields(self, spec: ImageSpec) -> None:
        family = self.family
        neutral = _FAMILY_FIELDS | {
            "guidance_scale": family.default_guidance,
            "max_sequence_length": family.max_sequence_length,
        }
        for name, nothing in neutral.items():
            asked = _ASKED_AS.get(name, name)
            if getattr(spec, name) != nothing and asked not in family.fields:
                known = ", ".join(sorted(family.fields))
                raise NotSupported(
                    f"{asked} is not known to {family.name}; it knows {known}",
                    field=asked,
                    value=getattr(spec, name),
                )

    def _check_counts(self, spec: ImageSpec) -> None:
        _between("n", spec.num_images, 1, MAX_IMAGES)
        num_images = spec.num_images
        counts = {"seed": len(spec.seeds) if len(spec.seeds) != 1 else num_images}
        if spec.negative_prompts is not None:
            counts["negative_prompt"] = len(spec.negative_prompts)
        if self.family.traits().num_classes:
            counts["class_labels"] = len(spec.class_labels)
        for name, count in counts.items():
            if count != num_images:
                raise RequestError(f"{count} of {name} for {num_images} images", field=name, value=count)
        for seed in spec.seeds:
            _between("seed", seed, 0, 2**63 - 1)
        _between("partial_images", spec.num_previews, 0, MAX_PREVIEWS)

    def _check_numbers(self, spec: ImageSpec) -> None:
        _between("num_inference_steps", spec.num_inference_steps, 1, 1000)
        _between("num_frames", spec.num_frames, 1, 1000)
        _between("max_sequence_length", spec.max_sequence_length, 1, _MAX_TEXT)
        for name in ("guidance_scale", "true_cfg_scale", "cfg_normalization"):
            _between(name, getattr(spec, name), 0.0, _MAX_SCALE)
        for name in ("guidance_rescale", "eta", "strength"):
            _between(name, getattr(spec, name), 0.0, 1.0)
        for sigma in spec.sigmas:
            _between("sigmas", sigma, 0.0, 1e4)

    def _check_image(self, spec: ImageSpec) -> None:
        if spec.image is None:
            if spec.strength != 1.0:
                raise RequestError(
                    "strength needs an image to start from", field="strength", value=spec.strength
                )
            return
        if not self.family.takes_images:
            raise NotSupported(f"{self.family.name} starts from no image", field="image")
        found, wanted = f"{spec.image.width}x{spec.image.height}", f"{spec.width}x{spec.height}"
        if found != wanted:
            raise RequestError(
                f"the image is {found}, asked for were {wanted}", field="size", value=found, limit=wanted
            )

    def _check_room(self, spec: ImageSpec) -> None:
        """A request must fit a step alone, with both of its branches."""
        numbers = spec.num_images
        for size in self.family.noise_shape(spec):
            numbers *= size
        if 2 * 4 * numbers > self.max_latent_bytes:
            raise RequestError(
                f"latents of {2 * 4 * numbers} bytes are more than a step's {self.max_latent_bytes}",
                field="size",
                value=f"{spec.width}x{spec.height}",
                limit=self.max_latent_bytes,
            )
        if 2 * spec.num_images > self.max_rows:
            raise RequestError(
                f"n {spec.num_images} makes {2 * spec.num_images} rows, a step has {self.max_rows}",
                field="n",
                value=spec.num_images,
                limit=self.max_rows // 2,
            )


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise RequestError(
            f"{name} is {value}, it must be between {low} and {high}",
            field=name,
            value=value,
            limit=high if value > high else low,
        )
