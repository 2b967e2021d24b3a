"""Tiny random causal language models, one per architecture, built in code.

Knows the configs of transformers and nothing of Trimtab, but for the table of which architecture
has which site: `python tests/model_zoo.py > docs/architectures.md`. The weights are spread far
wider than a fresh model's: at the usual std of .02 four layers give nearly constant logits, and
every law that compares two runs would hold for want of a difference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

PAD, BOS, EOS = 0, 1, 2
LAYERS, HIDDEN, HEADS, CONTEXT = 4, 32, 4, 128

_LLAMA = dict(
    hidden_size=HIDDEN,
    intermediate_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    attention_dropout=0.0,
)
_NO_GROUPS = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
_GPT2 = dict(
    n_embd=HIDDEN,
    n_layer=LAYERS,
    n_head=HEADS,
    n_positions=CONTEXT,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)
# Tied embeddings make some of these tiny models repeat their last token for ever: untied there.
_UNTIED = dict(tie_word_embeddings=False)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
_DENSE_ATTENTION = dict(layer_types=["full_attention"] * LAYERS)
# DeepSeek's: latent attention, and experts after the first layer.
LATENT_ATTENTION = dict(
    num_key_value_heads=HEADS,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)
_SLIDING = dict(
    layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2), sliding_window=CONTEXT
)


def _spread(model: PreTrainedModel, gain: float) -> None:
    """Matrices to std gain/sqrt(fan in), biases and norm weights jittered."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() < 2:  # added, not set: a norm's weight is centred on 1 or on 0
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(gain * parameter.shape[-1] ** -0.5 * noise)
    # A small logit is never the largest of hundreds: greedy decoding never stops early. Not
    # zero, for where the embedding is tied a pad's residual stream would be exactly zero.
    model.get_output_embeddings().weight[[PAD, EOS]] *= 0.1


def build(
    model_type: str, seed: int = 0, vocab_size: int = 512, gain: float = 1.5, **settings: Any
) -> PreTrainedModel:
    """One model of that type, in eval mode and float32; the global random state is kept."""
    special = dict(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    config = AutoConfig.for_model(model_type, vocab_size=vocab_size, **special, **settings)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _spread(model, gain)
    return model.eval()


def _row(model_type: str, *settings: dict[str, Any], **more: Any) -> Callable[..., PreTrainedModel]:
    merged = {key: value for part in (*settings, more) for key, value in part.items()}
    return partial(build, model_type, **merged)


ARCHITECTURES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _row("llama", _LLAMA),
    "mistral": _row("mistral", _LLAMA, sliding_window=None),
    "mixtral": _row("mixtral", _LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": _row("qwen2", _LLAMA),
    "qwen2_moe": _row("qwen2_moe", _LLAMA, _EXPERTS, shared_expert_intermediate_size=32),
    "qwen3": _row("qwen3", _LLAMA, head_dim=8),
    "qwen3_moe": _row("qwen3_moe", _LLAMA, _EXPERTS, head_dim=8),
    "gemma": _row("gemma", _LLAMA, head_dim=8),
    "gemma2": _row("gemma2", _LLAMA, _SLIDING, _UNTIED, head_dim=8, query_pre_attn_scalar=8),
    "gemma3": _row("gemma3_text", _LLAMA, _SLIDING, _UNTIED, head_dim=8, query_pre_attn_scalar=8),
    "phi": _row("phi", _LLAMA),
    "phi3": _row("phi3", _LLAMA, resid_pdrop=0.0, original_max_position_embeddings=CONTEXT),
    "gpt2": _row("gpt2", _GPT2),
    "gpt_neo": _row(
        "gpt_neo",
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        max_position_embeddings=CONTEXT,
        attention_types=[[["global", "local"], LAYERS // 2]],
        window_size=CONTEXT,
    ),
    "gpt_neox": _row("gpt_neox", _NO_GROUPS, hidden_dropout=0.0),
    "gptj": _row("gptj", _GPT2, rotary_dim=4),
    "gpt_bigcode": _row("gpt_bigcode", _GPT2),
    "codegen": _row("codegen", _GPT2, rotary_dim=4),
    "opt": _row("opt", _NO_GROUPS, ffn_dim=64, word_embed_proj_dim=HIDDEN, dropout=0.0),
    "opt_post_norm": _row(
        "opt",
        _NO_GROUPS,
        gain=1.0,
        ffn_dim=64,
        word_embed_proj_dim=16,
        dropout=0.0,
        do_layer_norm_before=False,
    ),
    "bloom": _row("bloom", _UNTIED, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS),
    "falcon": _row("falcon", _NO_GROUPS),
    "falcon_new": _row(
        "falcon", _NO_GROUPS, _UNTIED, new_decoder_architecture=True, num_kv_heads=2
    ),
    "mpt": _row(
        "mpt",
        _UNTIED,
        d_model=HIDDEN,
        n_layers=LAYERS,
        n_heads=HEADS,
        max_seq_len=CONTEXT,
        resid_pdrop=0.0,
    ),
    "olmo": _row("olmo", _LLAMA),
    "olmo2": _row("olmo2", _LLAMA),
    "olmoe": _row("olmoe", _LLAMA, num_experts=4, num_experts_per_tok=2),
    "stablelm": _row("stablelm", _LLAMA, hidden_dropout=0.0),
    "starcoder2": _row(
        "starcoder2", _LLAMA, sliding_window=None, residual_dropout=0.0, embedding_dropout=0.0
    ),
    "cohere": _row("cohere", _LLAMA, logit_scale=1.0),
    "cohere2": _row("cohere2", _LLAMA, _SLIDING, logit_scale=1.0),
    "granite": _row("granite", _LLAMA, residual_multiplier=0.5, embedding_multiplier=2.0),
    "granitemoe": _row("granitemoe", _LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "smollm3": _row("smollm3", _LLAMA, no_rope_layers=[1, 1, 1, 0]),
    "glm": _row("glm", _LLAMA, head_dim=8),
    "glm4": _row("glm4", _LLAMA, head_dim=8),
    "nemotron": _row("nemotron", _LLAMA, hidden_dropout=0.0),
    "ernie4_5": _row("ernie4_5", _LLAMA, head_dim=8),
    "helium": _row("helium", _LLAMA, head_dim=8),
    "exaone4": _row("exaone4", _LLAMA, _DENSE_ATTENTION, sliding_window=None),
    "gpt_oss": _row(
        "gpt_oss", _LLAMA, _SLIDING, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek_v3": _row("deepseek_v3", _NO_GROUPS, LATENT_ATTENTION),
}

HYBRIDS: dict[str, Callable[..., PreTrainedModel]] = {
    "lfm2": _row("lfm2", _LLAMA, layer_types=["conv", "full_attention", "conv", "full_attention"]),
    "qwen3_next": _row(
        "qwen3_next",
        _LLAMA,
        _EXPERTS,
        head_dim=8,
        shared_expert_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}


def tiny(name: str, seed: int = 0, vocab_size: int = 512) -> PreTrainedModel:
    """The tiny model of that architecture, plain or hybrid; the same seed gives equal weights."""
    return (ARCHITECTURES | HYBRIDS)[name](seed=seed, vocab_size=vocab_size)


_HEAD = """\
# Architectures and their sites

Made by `python tests/model_zoo.py > docs/architectures.md`; a test keeps it up to date. Every row
is a tiny model of that type on which the laws of `tests/test_laws.py` hold. Where only some layers
have a site, their number stands there. A decoder that is not here works too if its blocks are one
list: ask `lm.sites()`. Models that take no cache of keys and values (Mamba, the first GPT, MiniMax)
generate more slowly: each token runs the whole text.

"""


def architecture_table() -> str:
    """Which architecture has which site, as a page of markdown."""
    from trimtab.anatomy import Anatomy
    from trimtab.place import SITES

    def cell(anatomy: Anatomy, site: str) -> str:
        layers = anatomy.layers(site)
        everywhere = len(layers) == anatomy.n_layers or site == "embed"
        some = f"{len(layers)} of {anatomy.n_layers} layers"
        return "no" if not layers else "yes" if everywhere else some

    lines = [("architecture", *SITES), ("---",) * (1 + len(SITES))]
    for name in sorted(ARCHITECTURES | HYBRIDS):
        anatomy = Anatomy.of(tiny(name))
        lines.append((f"`{name}`", *(cell(anatomy, site) for site in SITES)))
    return _HEAD + "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(architecture_table(), end="")
