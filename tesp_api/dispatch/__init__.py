"""What moves tasks: due QUEUED tasks go to a site (dispatcher), active ones are looked at (poller).

In reading order: place (which site), plan (the node's job document), dispatcher, poller, record, loop.
"""
