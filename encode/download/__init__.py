"""Downloads from the open web.

In: URLs of a data set. Out: complete bodies in memory, or one line that says why a URL failed.

    client          many URLs at the same time, in one thread
    config          the limits, and the error of a failed attempt
    request         one attempt: redirects, size, sha256
    session         connections to allowed addresses only
    host_limits     requests, failures and pauses of each host
    memory_budget   bytes of bodies in memory
    outage          waiting while the network is down
    media_store     bodies kept as files, named by their sha256

Read client first.
"""
