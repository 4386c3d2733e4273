"""From the cache to packed micro-batches: the trainer's one door to its data.

    reader = FeatureReader(find_space(root, None))
    train = join(root, reader, {"demo": None}, split="train", held_out=0.05, min_coverage=0.95)
    tokens = TokenStore.open(root, train.names, tokenizer, folder=runs / ".tokens")
    trees = grow_trees(train, tokens, max_tokens=4096, max_branches=16)
    plan = StepPlan(trees, samples_per_step=32, seed=0)
    with FeatureLoader(plan, tokens, reader, max_tokens=4096, start=0, stop=1000) as loader:
        for micro in loader:                       # MicroBatch, step after step
            micro = micro.to(device)               # CPU: nothing is copied
            features = unpack(micro.codes, ...)[micro.pictures]
            loss, weight = vlm.loss(micro.packed, features if len(features) else None)
            (loss / micro.step_weight).backward()
            if micro.last: ...                     # optimizer.step(): step micro.step is whole

Names (each lives in the file named, all can be imported from here):

join.py      Join, join(root, reader, datasets, *, split, held_out, min_coverage, limit=None,
             frozen=None): which samples have all their features, and their rows.
             Join.names, .size, .digest, .coverage, .missing, .failed, .mix, .describe() -> str,
             .freeze(path) (later: join(..., frozen=path) gives exactly that list again, or says
             what changed), .blind(seed) (the same samples, every picture exchanged for another)
text.py      TokenStore.open(root, names, tokenizer, *, folder): tokenised once, memory-mapped.
             placed_messages(sample) -> [(role, content, weight)]: what is tokenised, exactly
trees.py     Trees, grow_trees(join, tokens, *, max_tokens, max_branches, picture_tokens): samples
             that share pictures and the words before them. Refuses a sample longer than max_tokens
plan.py      StepPlan(trees, samples_per_step, *, seed, order="random"|"blocks"): step -> trees.
             .step(s), .epoch(s) -> float (passes begun when step s starts), .samples_per_epoch,
             .describe() -> str
             OnePass(trees, samples_per_step): every sample once, in order, no shuffling (evaluation);
             len(one_pass) steps
packing.py   build_tree, pack: trees -> PackedBatch, first-fit decreasing
loader.py    FeatureLoader(plan, tokens, reader, *, max_tokens, start=0, stop=None, rank=0, world=1,
             threads=2, ahead=4, pin=False): iterator of MicroBatch, context manager, .close()
             MicroBatch: packed (PackedBatch), codes uint8 (P, row_bytes): distinct rows, pictures
             int64 (O,): which of them stands at each place (features = unpack(codes)[pictures]),
             step, index, last, step_weight (sum of the loss weights of the whole step, every rank),
             samples, tokens, step_samples, wait_s (the trainer waited), read_s, placed
             codes are valid until the next micro-batch is asked for
here         held_out_samples(root, join) -> Iterator[HeldOut]: sample (the whole tables.Sample),
             messages (as placed_messages), rows int64, task, dataset: in a fixed order
             inspect_text(micro, tokenizer, trees) -> str: a real packed batch as text
"""
