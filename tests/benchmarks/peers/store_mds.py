"""Write and read MosaicML's MDS, as JSON commands on standard input tell.

`stores.py` starts this script with the interpreter of another environment. A command is one line,
{"do": "write" | "open" | "read" | "close", ...}; the answer is one line, {"seconds": ...}.
"""

import json
import sys
import time

import numpy as np
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory


def write(command: dict) -> None:
    data = np.random.default_rng(0).normal(size=(8, command["row_bytes"] // 2)).astype(np.float16)
    with MDSWriter(
        out=command["folder"], columns={"row": "bytes"}, size_limit=command["shard_bytes"]
    ) as out:
        for number in range(command["count"]):
            out.write({"row": data[number % 8].tobytes()})


def main() -> None:
    rows, batch = None, np.zeros((32, int(sys.argv[2])), np.uint8)
    for line in sys.stdin:
        command = json.loads(line)
        started = time.perf_counter()
        if command["do"] == "write":
            write(command)
        elif command["do"] == "open":
            clean_stale_shared_memory()
            rows = StreamingDataset(local=sys.argv[1], batch_size=1, shuffle=False)
        elif command["do"] == "read":
            for i, row in enumerate(command["rows"]):
                batch[i % 32] = np.frombuffer(rows[row]["row"], np.uint8)
        else:
            rows = None
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
