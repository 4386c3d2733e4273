"""Hugging Face's Trainer on cached features: a model that takes `inputs_embeds`.

    pip install accelerate                                    # Trainer needs it
    python -m encode.run --dataset demo --encoder demo        # once: features of 3,000 drawings
    python docs/recipes/tiny_llm.py runs/tiny-llm             # a language model without a download
    python docs/recipes/hf_trainer.py --llm runs/tiny-llm --datasets demo-points --rate 2e-3

Template, model and saving are those of train_loop.py, in the same folder; read that first.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Subset
from train_loop import collate, load, save
from transformers import Trainer, TrainingArguments

import nanomolmo2 as nm

OPTIONS = {  # each is a flag: --batch 8
    "features": "cache", "datasets": "", "llm": "Qwen/Qwen3-0.6B", "out": "runs/own-hf", "workers": 2,
    "steps": 1000, "batch": 32, "accumulate": 1, "rate": 1e-4, "warm_up": 50, "validate_every": 100,
    "validation_samples": 256, "seed": 0,
}  # fmt: skip


class ForTrainer(nn.Module):
    """The model as Trainer calls it: by the names of the collator, and with the loss in what it returns."""

    accepts_loss_kwargs = (
        True  # so that Trainer counts the learned tokens of a step and passes the number
    )

    def __init__(self, vlm):
        super().__init__()
        self.vlm = vlm

    def forward(self, batch, ids, labels, num_items_in_batch=None):
        """Return the mean loss of the learned tokens, or their sum / num_items_in_batch.

        Trainer counts the items of all parts of a step, so accumulated parts weigh as one large batch.
        """
        total, count = self.vlm.loss(batch, ids, (labels != -100).float())
        return {"loss": total / (count if num_items_in_batch is None else num_items_in_batch)}


def collator(tokenizer):
    """Return the `data_collator`. Trainer moves `ids` and `labels`; the batch moves its own bytes."""

    def collated(samples):
        batch, ids, weights = collate(tokenizer, samples)
        # Trainer has labels, not weights: every learned token counts as one.
        return {"batch": batch, "ids": ids, "labels": ids.masked_fill(weights <= 0, -100)}

    return collated


def main(options):
    """Train with Trainer, save as train_loop.py does, and return the Trainer."""
    cache = nm.open(options.features)
    names = options.datasets.split(",") if options.datasets else None
    data, held_out = cache.dataset(names, "train"), cache.dataset(names, "val")
    vlm, tokenizer = load(options.llm, cache.spec.width)
    settings = TrainingArguments(
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.rate,
        lr_scheduler_type="cosine",
        warmup_steps=options.warm_up,
        eval_strategy="steps",
        eval_steps=options.validate_every,
        logging_steps=options.validate_every,
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=options.seed,
        remove_unused_columns=False,  # otherwise it drops what `forward` does not name
        label_names=["labels"],  # without it, validation has no loss
        prediction_loss_only=True,
        save_strategy="no",  # its checkpoints refuse tied embeddings of a plain module; see `save`
        report_to="none",
    )
    trainer = Trainer(
        ForTrainer(vlm),
        settings,
        data_collator=collator(tokenizer),
        train_dataset=data,
        eval_dataset=Subset(held_out, range(min(len(held_out), options.validation_samples))),
    )
    trainer.train()
    save(vlm, tokenizer, Path(options.out))
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    main(parser.parse_args())
