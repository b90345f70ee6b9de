"""Own the model that is trained: diffusers' SD3 transformer with two small CLIP text encoders.

B: pictures, T: text tokens (18), S: side, W: width of one text encoder.
"""

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from recipes.image.plan import ImagePlan
from recipes.image.render import SIDE
from recipes.image.tokenizer import MODEL_MAX_LENGTH, PromptTokens

NUM_CHANNELS = 3
POSITIONS_PER_SIDE = 32
# The pipeline stands zeros in for the absent T5 encoder: this many by default, other numbers on request.
DEFAULT_NUM_ZEROS = 256


class FoldedZeros:
    """Joint attention in which the last text token stands for many equal ones.

    The zeros of the absent T5 encoder have no position, so they stay equal to each other through all layers.
    n equal keys weigh as much as one whose logit is larger by log n; the result is the same, at a fraction of
    the cost. Otherwise this is diffusers' JointAttnProcessor2_0.
    """

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend over pictures [B, P, D] and texts [B, T+1, D]; attention_mask: f32[B, 1, 1, P+T+1]."""
        B, P, D = hidden_states.shape

        def heads(image: Tensor, text: Tensor) -> Tensor:
            joined = torch.cat((image, text), dim=1)
            return joined.view(B, -1, attn.heads, D // attn.heads).transpose(1, 2)

        query = heads(attn.to_q(hidden_states), attn.add_q_proj(encoder_hidden_states))
        key = heads(attn.to_k(hidden_states), attn.add_k_proj(encoder_hidden_states))
        value = heads(attn.to_v(hidden_states), attn.add_v_proj(encoder_hidden_states))
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        mixed = mixed.transpose(1, 2).reshape(B, -1, D)
        image, text = mixed[:, :P], mixed[:, P:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[0](image), text


class Painter(nn.Module):
    """The three trained parts, called with token ids as the pipeline calls them with prompts."""

    def __init__(self, plan: ImagePlan) -> None:
        super().__init__()
        self.text_encoder = _text_encoder(plan, "quick_gelu")
        self.text_encoder_2 = _text_encoder(plan, "gelu")
        self.transformer = SD3Transformer2DModel(
            sample_size=SIDE,
            patch_size=plan.patch_size,
            in_channels=NUM_CHANNELS,
            out_channels=NUM_CHANNELS,
            num_layers=plan.num_layers,
            attention_head_dim=plan.width // plan.num_heads,
            num_attention_heads=plan.num_heads,
            joint_attention_dim=2 * plan.text_width,
            caption_projection_dim=plan.width,
            pooled_projection_dim=2 * plan.text_width,
            pos_embed_max_size=POSITIONS_PER_SIDE,
        )
        self.transformer.set_attn_processor(FoldedZeros())
        self._spread_positions(plan.width)
        self._start_gently()

    def _spread_positions(self, width: int) -> None:
        """Set the stored positions one apart.

        The transformer makes them for the largest grid and squeezes them to the default size, a quarter
        apart, by which neighbours are hard to tell. They are stored with the weights, where the pipeline
        finds them.
        """
        grid = get_2d_sincos_pos_embed(
            width, POSITIONS_PER_SIDE, base_size=POSITIONS_PER_SIDE, output_type="pt"
        )
        self.transformer.pos_embed.pos_embed.copy_(grid)

    def _start_gently(self) -> None:
        """Let every block begin as the identity and the output as zero (adaLN-zero, arXiv:2212.09748)."""
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear) and ("norm" in name or name == "proj_out"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        for encoder in (self.text_encoder, self.text_encoder_2):
            # Unknown letters stay at zero, where they say nothing; all other tokens are trained.
            embedding = encoder.text_model.embeddings.token_embedding.weight
            known = PromptTokens()
            mask = torch.zeros(len(embedding), 1)
            mask[[known.start_id, known.end_id, *known.word_ids.values()]] = 1
            with torch.no_grad():
                embedding.mul_(mask)

    def encode(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return text states f32[B, T+1, 2W], the last one the zero, and pooled ones f32[B, 2W]."""
        states, pooled = [], []
        for encoder in (self.text_encoder, self.text_encoder_2):
            outputs = encoder(token_ids, output_hidden_states=True)
            states.append(outputs.hidden_states[-2])
            pooled.append(outputs.text_embeds)
        return functional.pad(torch.cat(states, dim=-1), (0, 0, 0, 1)), torch.cat(pooled, dim=-1)

    def forward(
        self, noisy: Tensor, sigma: Tensor, states: Tensor, pooled: Tensor, num_zeros: Tensor
    ) -> Tensor:
        """Predict noise minus picture, f32[B, 3, S, S].

        noisy: f32[B, 3, S, S]; sigma: f32[B] in [0, 1]; states, pooled: from `encode`; num_zeros: f32[B].
        """
        num_patches = (noisy.shape[-1] // self.transformer.config.patch_size) ** 2
        key_bias = torch.zeros(len(noisy), 1, 1, num_patches + states.shape[1])
        # Minus infinity would do for none at all, but a large number keeps every kernel free of NaN.
        key_bias[:, 0, 0, -1] = num_zeros.clamp(min=1e-9).log()
        return self.transformer(
            hidden_states=noisy,
            timestep=sigma * 1000,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            joint_attention_kwargs={"attention_mask": key_bias},
            return_dict=False,
        )[0]


def _text_encoder(plan: ImagePlan, activation: str) -> CLIPTextModelWithProjection:
    tokens = PromptTokens()
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=tokens.size,
            hidden_size=plan.text_width,
            intermediate_size=4 * plan.text_width,
            projection_dim=plan.text_width,
            num_hidden_layers=plan.text_layers,
            num_attention_heads=2,
            max_position_embeddings=MODEL_MAX_LENGTH,
            hidden_act=activation,
            bos_token_id=tokens.start_id,
            eos_token_id=tokens.end_id,
            pad_token_id=tokens.end_id,
        )
    )
