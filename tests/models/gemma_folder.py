"""A tiny DiffusionGemma with a tokenizer: the goldens' random weights, bytes, and Gemma's control tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CHECKPOINT = (
    Path(__file__).resolve().parent.parent
    / "data"
    / "goldens"
    / "diffusion_gemma"
    / "checkpoints"
    / "dgemma-tiny"
)
# The first three stand where the checkpoint's configuration says.
CONTROL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<|turn>",
    "<turn|>",
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
)
TEMPLATE = """{{ bos_token }}{% if tools %}<|turn>system
{% for tool in tools %}<|tool>declaration:{{ tool.function.name }}<tool|>{% endfor %}<turn|>
{% endif %}{% for message in messages %}<|turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content or '' }}{% for call in message.tool_calls or [] %}\
<|tool_call>call:{{ call.function.name }}{{ '{' }}\
{% for key, value in call.function.arguments | dictsort %}\
{{ key }}:<|"|>{{ value }}<|"|>{% if not loop.last %},{% endif %}{% endfor %}\
{{ '}' }}<tool_call|>{% endfor %}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""


def write_gemma(folder: Path) -> Path:
    """Write the checkpoint with its tokenizer into a folder and return it."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(CHECKPOINT / name, folder / name)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*CONTROL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
