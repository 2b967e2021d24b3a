"""Tiny tokenizers built in code: two spellings, and templates in the spirit of eight families.

Knows nothing of Trimtab. Every tokenizer has <s>, </s>, <pad>, puts <s> before plain text, and has
fewer than 600 ids.
"""

from __future__ import annotations

import json
from functools import lru_cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_SPECIAL = [
    *("<pad>", "<s>", "</s>", "<unk>"),
    *("<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
]
_THINK = ["<think>", "</think>"]  # in the vocabulary, but not special: decoding shows them

_ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant turns must alternate, the user first') }}"
    "{% endif %}{% endfor %}"
)
_CHATML_TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
_CHATML_START = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

TEMPLATES: dict[str, str] = {
    # Content as it is; no BOS.
    "chatml": "{% for m in messages %}" + _CHATML_TURN + "{% endfor %}" + _CHATML_START,
    # BOS once, headers, content stripped.
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    # System inside the first user turn, BOS before each user turn, a space before the answer, no
    # generation prompt of its own.
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set head = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% set turns = messages[1:] %}"
        "{% else %}{% set head = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (head if loop.first else '') }}"
        "{{ m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    # No space before the answer, strict alternation, no system.
    "mistral": (
        "{{ bos_token }}" + _ALTERNATE + "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST]' + m['content'] + '[/INST]' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    # The assistant is called model; a system message is refused.
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        + _ALTERNATE
        + "{% for m in messages %}"
        "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    # A special token per role; a system message is dropped without a word.
    "phi3": (
        "{% for m in messages %}{% if m['role'] != 'system' %}"
        "{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    # ChatML, but the last assistant turn is written with an empty thought, which the generation
    # prompt does not have.
    "qwen3": (
        "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
        "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}"
        "{{ m['content'].lstrip('\\n') + '<|im_end|>\\n' }}"
        "{% else %}" + _CHATML_TURN + "{% endif %}{% endfor %}" + _CHATML_START
    ),
    # The generation prompt opens a thought, which the finished turn does not have.
    "reasoner": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ '<|assistant|>' + m['content'].split('</think>')[-1] + eos_token }}"
        "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
    ),
}

_TEXT = [
    "Question: What is the capital of France?\nAnswer: The capital of France is Paris.\n\n",
    "The quick brown fox jumps over the lazy dog, and the dog is not amused at all.\n\n\n",
    "user assistant system model: Are you happy? Yes, I am happy. No, I am sad. \n\n",
    "You are a helpful and honest assistant. Give a short answer to the question.\n\n \n",
    "Once upon a time there was a small ship, and a small surface turned its rudder.\n",
    "Why did the chicken cross the road? Because nobody had told it about the other side.\n",
    "I feel wonderful today: the weather is bright, my friends are near and work is done.\n",
    "Everything went wrong this morning, I missed the train and lost my favourite gloves.\n",
]


def byte_tokenizer(template: str | None = None, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in GPT-2: loses no text, invents no space. `template`: name or text."""
    return _wrap(_byte_json(vocab_size), template)


def spaced_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Sentencepiece-like BPE with byte fallback, as in Llama 2: puts a space before every text."""
    return _wrap(_spaced_json(), template)


def _wrap(text: str, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    if template is not None:
        tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer


@lru_cache(maxsize=8)
def _byte_json(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_THINK),
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 2, trainer)
    return _finished(tokenizer)


@lru_cache(maxsize=1)
def _spaced_json() -> str:
    space = pre_tokenizers.Metaspace(prepend_scheme="always")
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = space
    learned.train_from_iterator(
        [*_TEXT, *["to\n\nbe"] * 40],  # so that newlines merge, as they do in large vocabularies
        trainers.BpeTrainer(vocab_size=254, special_tokens=_SPECIAL, show_progress=False),
    )
    model = json.loads(learned.to_str())["model"]
    vocab = model["vocab"]
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = space
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(_SPECIAL)
    return _finished(tokenizer)


def _finished(tokenizer: Tokenizer) -> str:
    """Adds what both kinds share: the thought marks and the BOS before plain text."""
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in _THINK])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return str(tokenizer.to_str())
