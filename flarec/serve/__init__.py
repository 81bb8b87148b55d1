"""An OpenAI-compatible server on the engine's `add`, `step` and `cancel`: one machine, every family, every mode.

    fields    what a request may say (pydantic), every other field is refused by its name
    prompts   from a request to token ids and `GenerationOptions`
    jobs      a generation that a client asked for, and the news about it
    worker    the thread that owns the engine
    exchanges one HTTP request's choices, on the event loop
    calls     calls of functions in what the model writes
    replies   what is sent back, whole or as server-sent events
    refusals  errors with an HTTP status
    meter     what `/metrics` tells
    app       the routes
    run       a socket, uvicorn and signals
"""
