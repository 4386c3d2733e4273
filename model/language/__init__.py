"""The language model: its weights, its tokenizer, and the chat template.

    in     `random:<preset>`, a folder in Hugging Face's layout, or a Hugging Face id; conversations
    out    a transformers model with its tokenizer; token ids and loss weights

    tokenizer        text to ids, so that plain text never becomes a control token
    chat_template    messages to ids and loss weights; where images and videos go
    model            load, check and save a language model

Read chat_template.py first.
"""
