"""Times as the documents hold them."""

import time


def now() -> str:
    """The present time, RFC 3339 in UTC with microseconds."""
    seconds, micros = divmod(int(time.time() * 1000000), 1000000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + ".%06dZ" % micros
