"""Make a folder with a small, untrained language model, to try a recipe offline.

python docs/recipes/tiny_llm.py runs/tiny-llm

It is a Qwen3 of 0.5 million parameters whose tokens are the 256 bytes and the marks of ChatML. It has never
seen a text, so it learns short answers in minutes on a CPU, and nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


def make(folder: Path, width: int = 128, layers: int = 3, seed: int = 0) -> None:
    """Write the model and its tokenizer into `folder`, as `from_pretrained` reads them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable letter for each byte
    text = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = decoders.ByteLevel()
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    text.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    config = Qwen3Config(
        vocab_size=320,  # 259 tokens, rounded up
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a small, untrained language model.")
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)
