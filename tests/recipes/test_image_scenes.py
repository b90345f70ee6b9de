"""Scenes, their wording, and the held-out rule."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from recipes.image.render import SIDE, draw_layout, render
from recipes.image.scenes import (
    BACKGROUNDS,
    COLORS,
    Scene,
    Thing,
    draw_held_out_scenes,
    draw_scene,
    draw_training_scene,
    is_held_out,
)
from recipes.image.tokenizer import MODEL_MAX_LENGTH, PromptTokens, build_vocabulary, save_tokenizer
from recipes.image.wording import draw_prompt, plain_prompt

RED, GREEN = Thing("red", "circle"), Thing("green", "square", "small")


@pytest.mark.parametrize(
    ("scene", "prompt"),
    [
        (Scene((RED,)), "a red circle"),
        (Scene((RED, GREEN), "above"), "a red circle above a small green square"),
        (Scene((Thing("orange", "ring"),), None, "black"), "an orange ring on a black background"),
        (Scene((RED, GREEN)), "a red circle and a small green square"),
    ],
)
def test_the_plain_prompt(scene: Scene, prompt: str) -> None:
    assert plain_prompt(scene) == prompt


def test_mirrored_scenes_are_one_scene() -> None:
    assert Scene((RED, GREEN), "above").key == Scene((GREEN, RED), "below").key
    assert Scene((RED, GREEN), "right of").key == Scene((GREEN, RED), "left of").key
    assert Scene((RED, GREEN)).key == Scene((GREEN, RED)).key
    assert Scene((RED, GREEN), "above").key != Scene((GREEN, RED), "above").key


def test_training_and_held_out_scenes_share_nothing() -> None:
    random_source = random.Random(0)
    trained = {draw_training_scene(random_source).key for _ in range(2000)}
    held_out = {scene.key for n in (1, 2) for scene in draw_held_out_scenes(n, 200, seed=0)}
    assert not trained & held_out
    assert 0.08 < sum(is_held_out(draw_scene(random_source, 2)) for _ in range(2000)) / 2000 < 0.17


def test_every_prompt_fits_the_tokenizer() -> None:
    random_source, tokens = random.Random(1), PromptTokens()
    for i in range(500):
        prompt = draw_prompt(random_source, draw_scene(random_source, 1 + i % 2))
        ids = tokens.encode(prompt)
        assert len(ids) == MODEL_MAX_LENGTH
        assert ids[0] == tokens.start_id
        assert ids[len(prompt.split()) + 1 :] == [tokens.end_id] * (
            MODEL_MAX_LENGTH - len(prompt.split()) - 1
        )


def test_words_are_single_tokens_and_the_end_token_is_last() -> None:
    vocabulary, _ = build_vocabulary()
    assert max(vocabulary, key=vocabulary.__getitem__) == "<|endoftext|>"
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def test_palette_entries_are_far_apart() -> None:
    entries = torch.tensor([*COLORS.values(), *BACKGROUNDS.values()], dtype=torch.float32)
    distances = torch.cdist(entries, entries) + 1000 * torch.eye(len(entries))
    assert distances.min() >= 80


def test_renders_stay_inside_and_show_pure_colors() -> None:
    random_source = random.Random(2)
    scenes = [draw_scene(random_source, 1 + i % 2) for i in range(100)]
    pictures = render(scenes, [draw_layout(random_source, scene) for scene in scenes])
    assert pictures.shape == (100, 3, SIDE, SIDE)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    for scene, picture in zip(scenes, pictures, strict=True):
        ground = torch.tensor(BACKGROUNDS[scene.background]) / 255
        for corner in (picture[:, 0, 0], picture[:, -1, -1]):
            assert torch.allclose(corner, ground, atol=1e-6)
        for thing in scene.things:
            color = (torch.tensor(COLORS[thing.color]) / 255).view(3, 1, 1)
            assert (picture - color).norm(dim=0).min() < 1e-3


def test_the_saved_tokenizer_reads_prompts_as_training_does(tmp_path: Path) -> None:
    random_source, tokens = random.Random(3), PromptTokens()
    save_tokenizer(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    prompts = [draw_prompt(random_source, draw_scene(random_source, 1 + i % 2)) for i in range(100)]
    ids = saved(["", *prompts], padding="max_length", truncation=True)["input_ids"]
    assert saved.model_max_length == MODEL_MAX_LENGTH
    assert ids == [tokens.encode(prompt) for prompt in ("", *prompts)]
