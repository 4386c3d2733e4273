"""Ask vLLM about images; runs in an environment with vLLM and without this package.

python ask_vllm.py request.json answers.json

The request has `model` (folder), `overrides` (of its config), `implementation` (vLLM's model_impl), `tokens`
(of an answer) and `questions`, a list of `text` and `image` (path). An answer has `prompt` and `answer`, both
lists of tokens, and `text`.
"""

import json
import sys
from pathlib import Path

from PIL import Image


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.loads(Path(sys.argv[1]).read_text())
    model = LLM(
        request["model"],
        dtype="float32",
        enforce_eager=True,  # compiling takes minutes
        max_model_len=256,
        max_num_seqs=2,
        hf_overrides=request["overrides"],
        model_impl=request["implementation"],
    )
    greedy = SamplingParams(temperature=0, max_tokens=request["tokens"])
    result = []
    for question in request["questions"]:
        image = {"type": "image_pil", "image_pil": Image.open(question["image"]).convert("RGB")}
        content = [image, {"type": "text", "text": question["text"]}]
        (made,) = model.chat([{"role": "user", "content": content}], greedy)
        answer = made.outputs[0]
        result.append(
            {
                "prompt": list(made.prompt_token_ids),
                "answer": list(answer.token_ids),
                "text": answer.text,
            }
        )
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
