"""Ask an exported model about images. It needs torch, transformers and Pillow, and nothing of ours.

python ask.py EXPORTED questions.json answers.json
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, asked, told = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=True
).eval()
questions = json.loads(Path(asked).read_text())
answers = []
for start in range(0, len(questions), 32):
    some = questions[start : start + 32]
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": f"<image>\n{one['question']}"}],  # as in training
            add_generation_prompt=True,
        )
        for one in some
    ]
    images = [Image.open(one["image"]).convert("RGB") for one in some]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=16)
    answers += processor.batch_decode(
        ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    print(len(answers), "of", len(questions), flush=True)
Path(told).write_text(json.dumps([answer.strip() for answer in answers]))
