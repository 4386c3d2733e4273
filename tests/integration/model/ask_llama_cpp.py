"""Ask llama.cpp about images; runs in an environment with llama-cpp-py-sync and without this package.

python ask_llama_cpp.py request.json answers.json

The request has `model` and `mmproj` (files), `template` (a prompt with {} for the question), `ends` (tokens),
`tokens` (of an answer) and `questions`, a list of `text` and `image` (path of a PNG file). An answer has
`prompt` (tokens, with -1 for each token of the image), `answer` (tokens) and `embeddings` of the image.
"""

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp_py_sync import Llama
from llama_cpp_py_sync.multimodal import MultimodalContext

request = json.loads(Path(sys.argv[1]).read_text())
model = Llama(request["model"], n_ctx=512, n_threads=1, n_threads_batch=1, flash_attn_type=0)
vision = MultimodalContext(model, request["mmproj"], use_gpu=False, n_threads=1, flash_attn_type=0)
result = []
for question in request["questions"]:
    model._clear_context_state()
    text = request["template"].replace("{}", vision.marker + question["text"])
    images = [("image/png", Path(question["image"]).read_bytes())]
    with vision.tokenize_prompt(text, images) as prompt:
        chunks = [c.text_tokens if c.type == "text" else [-1] * c.n_tokens for c in prompt]
        (embeddings,) = (c.embeddings for c in prompt if c.type == "image")
        place = vision.evaluate_prompt(prompt)
    answer: list[int] = []
    while len(answer) < request["tokens"]:
        pointer = model._lib.llama_get_logits_ith(model._ctx, -1)
        logits = np.frombuffer(model._ffi.buffer(pointer, 4 * model.n_vocab), np.float32)
        token = int(logits.argmax())
        if token in request["ends"]:
            break
        answer.append(token)
        model._eval_tokens([token], place)
        place += 1
    result.append(
        {
            "prompt": [token for chunk in chunks for token in chunk],
            "answer": answer,
            "embeddings": embeddings,
        }
    )
Path(sys.argv[2]).write_text(json.dumps(result))
