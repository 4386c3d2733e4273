"""The data side of training: a feature cache in, packed micro-batches out.

    1. select   samples whose media all have features; held out or not     join.py, sample_list.py
    2. tokenise the text of each sample, once, into mapped files           tokens.py
    3. measure  the tokens that represent each image and video            placeholders.py
    4. fit      leave out what cannot be trained on, cut what is too long  usable.py
    5. group    samples of equal media and equal beginning into trees      message_trees.py
    6. schedule which trees, and which answers, each optimizer step takes  schedule.py, choices.py
    7. pack     trees into sequences of at most `max_tokens`               packing.py
    8. read     the feature rows of each micro-batch, ahead of its use     loader.py

The iterators are nested: FeatureLoader asks a Schedule for each step, splits the step by rank, packs each
rank's part into micro-batches, and lets threads fill them with rows:

    samples = join(root, reader, {"demo": None}, split="train", held_out=0.05, min_coverage=0.95)
    tokens = TokenStore.open(root, samples.names, tokenizer, folder=Path("runs/.tokens"))
    placeholders = Placeholders.of(reader.spec, tokenizer)
    trees = build_message_trees(
        samples, tokens, max_tokens=4096, max_branches=16, placeholders=placeholders
    )
    schedule = TrainingSchedule(trees, samples_per_step=32, seed=0)
    with FeatureLoader(schedule, reader, max_tokens=8192, start=0, stop=1000) as loader:
        for micro in loader:
            forward.loss(micro).backward()  # Forward: train/step.py
            if micro.last:
                optimizer.step()

Beside the pipeline: inspect.py prints a micro-batch as text, features.py reads the features of one sample.
Read join.py first: it also decides what is held out.
"""
