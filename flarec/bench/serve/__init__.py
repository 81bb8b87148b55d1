"""`flarec bench serve`: load on an OpenAI-compatible server, closed loop and open loop.

    client    requests and streams over plain sockets. Own code: a client that costs as much per chunk as the server
              does, as that of the `openai` package, would be measured with it where both share their cores
    load      who asks when, and what came when
    results   numbers of a load
    session   every mode at every load
    picture   the figure
"""
