"""The HTTP server, ``dvq-rt serve``: one batch for the requests of all clients. It needs the extra ``[serve]``.

``docs/server.md`` describes what it answers. It stands on ``dvq_rt.asynchronous.AsyncGenerator``, which needs no extra.
"""
