"""The language model: its weights, its tokenizer, and the chat template.

    in     `random:<preset>`, a folder in Hugging Face's layout, or a Hugging Face id; conversations
    out    a transformers model with its tokenizer; token ids and loss weights

    tokenizer          text to ids, so that plain text never becomes a control token
    chat_template      messages to ids and loss weights; where images and videos go
    model              load, check and save a language model
    sources            a hub id becomes a folder
    checkpoint         what a folder contains, before transformers reads it (files: JSON, safetensors)
    loading            every tensor into the model (tokenizer_files: its tokenizer)
    loss               cross-entropy without all logits in memory
    lora               low-rank adapters: added for training, saved as peft does, merged
    records            what a saved model records of it; torch is not imported for that

Read chat_template.py first. Other people's folders are refused with one line unless they are whole.
"""
