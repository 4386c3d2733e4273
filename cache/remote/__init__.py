"""Read a feature cache over the network: https://, s3:// and hf://.

    in       a URL, and a folder on the local disk
    out      the tables as local files, and a FeatureReader whose rows are fetched when they are needed

    open.py         the entry: a folder or a URL -> a reader, or the folder of the tables
    stores.py       what a store must offer; S3 and the hub
    http.py         web servers: ranges, redirects
    connections.py  connections to them, kept for the next request
    wire.py         a connection whose every wait ends by a deadline
    deadline.py     deadlines; calls that cannot be interrupted
    net.py          addresses that may be connected to, TLS (also used by encode.download)
    retry.py        limits, pauses and repeated requests (its Retry-After parser also serves encode.download)
    listing.py      which files are tables; listing.json
    mirror.py       local copies of the tables
    reader.py       rows by ranged requests, verified
    row_cache.py    rows kept on the local disk, with a size limit

Nothing that a server sends is trusted: names, sizes, redirects and bytes are checked. Read open.py first.
"""
