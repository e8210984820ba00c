"""The collector: an HTTP server that keeps what runs report, and answers questions about them.

The hosts keep the truth and the collector a copy. It loses nothing that it has acknowledged: before
it answers an append, the bytes are in the database and the database is on the disk. Appending the
same bytes twice changes nothing, so any client may repeat any request.

    limits   what one token may cost, and the refusals     tokens    who may do what
    schema   the tables, as the migrations make them       store     the only user of the tables
    events   who watches which run                         notices   what a webhook is sent
    webhooks sending it, until it is taken                 pages     the index, the OpenAPI text
    app      HTTP: check, one call, answer                 serve     the process: listen, begin, end
    protocol what a connection may cost before its token   client    the operator's side of the API
    tunnel   a way from a host to a collector
"""
