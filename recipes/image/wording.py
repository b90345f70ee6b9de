"""Own the wording: how a scene becomes a prompt, and the words that prompts are made of."""

import random

from recipes.image.scenes import BACKGROUNDS, COLORS, DEFAULT_BACKGROUND, SHAPES, SIZES, Scene

RELATION_PHRASES = {
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    None: ("and", "and", "next to"),
}
ARTICLES = ("a", "the")
_PHRASE_WORDS = " ".join(phrase for phrases in RELATION_PHRASES.values() for phrase in phrases).split()
WORDS = tuple(
    dict.fromkeys(
        (*COLORS, *BACKGROUNDS, *SHAPES, *SIZES, *ARTICLES, *_PHRASE_WORDS, "an", "on", "background")
    )
)


def plain_prompt(scene: Scene) -> str:
    """Word a scene in the ordinary way, such as `a red circle above a green square`."""
    relation = f" {scene.relation or 'and'} "
    prompt = relation.join(_with_article("a", thing.describe()) for thing in scene.things)
    if scene.background != DEFAULT_BACKGROUND:
        prompt += f" on a {scene.background} background"
    return prompt


def draw_prompt(random_source: random.Random, scene: Scene) -> str:
    """Word a scene in one of many ways; the default background is named now and then."""
    article = random_source.choice(("a", "a", "a", "a", "the", ""))
    phrase = random_source.choice(RELATION_PHRASES[scene.relation])
    prompt = f" {phrase} ".join(_with_article(article, thing.describe()) for thing in scene.things)
    if scene.background != DEFAULT_BACKGROUND or random_source.random() < 0.15:
        ending = f"{_with_article(article, scene.background)} background"
        prompt += f" on {ending}"
    return prompt


def _with_article(article: str, words: str) -> str:
    if article == "a" and words[0] in "aeiou":
        article = "an"
    return f"{article} {words}".strip()
