"""The collector: an HTTP server that keeps for a team what runs report of themselves, and answers for them.

A cache of what the hosts know, but one that may lose nothing it has acknowledged: an append is in the database, and the database on the
disk, before its answer is sent. Appending the same bytes twice changes nothing, so everybody may repeat everything.

    limits  what one token may cost, and the clock that says no       tokens   who may do what
    schema  the tables, as migrations make them                       store    the tables' only user: one writer, many readers
    events  who watches which run                                     webhooks who is told of an end
    pages   what a person or a program reads about the server itself  app      HTTP: check, one call, answer
    serve   the command: where it listens, how it begins and ends
"""
